"""FlashAttention on the card in front of you, beside PyTorch's: `python -m tests.benchmarks.attention_gpu`.

TFLOP/s of the forward pass, and of forward and backward, in float16, for 16384 tokens in sequences of N; and
the peak of the memory beyond inputs, in MB. As the FlashAttention paper counts, the forward pass has 4 N^2 d
operations a head, half of them when causal, and the backward pass 2.5 times as many: what a kernel computes
twice is not counted twice. Needs CuPy; PyTorch with CUDA, where it is, runs in the same process, in turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from autograd import backend

TOKENS, WIDTH = 16384, 1024  # batch * N, heads * d
LAUNCHES = 10  # timed together, so that what Python takes for each is hidden behind the one before
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
REFERENCES = {"flash": "FLASH_ATTENTION", "math": "MATH"}


class Ours:
    """Our kernel, through CuPy."""

    def __init__(self, B: int, H: int, N: int, d: int, causal: bool) -> None:
        import cupy

        self.cupy, self.causal = cupy, causal
        self.pool = cupy.get_default_memory_pool()
        shape = (B, N, H, d)  # heads side by side, as linear maps make them
        make = lambda: (
            cupy.random.standard_normal(shape, dtype=np.float32).astype(np.float16).transpose(0, 2, 1, 3)
        )
        self.q, self.k, self.v, self.g = (make() for _ in range(4))
        self.pool.free_all_blocks()
        self.inputs = self.pool.used_bytes()

    def forward(self) -> Any:
        import kernels

        return kernels.flash_attention(self.q, self.k, self.v, causal=self.causal)

    def both(self) -> None:
        import kernels

        out, logsumexp = self.forward()
        kernels.flash_attention_backward(self.g, self.q, self.k, self.v, out, logsumexp, causal=self.causal)

    def seconds(self, run: Callable[[], Any]) -> float:
        start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record()
        for _ in range(LAUNCHES):
            run()
        stop.record()
        stop.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, stop) / 1e3 / LAUNCHES

    def peak(self) -> float:
        """MB that the pool had to take for forward and backward."""
        self.pool.free_all_blocks()
        self.both()
        return (self.pool.total_bytes() - self.inputs) / 1e6


class PyTorch:
    """scaled_dot_product_attention by one of its backends."""

    def __init__(self, kind: str, B: int, H: int, N: int, d: int, causal: bool) -> None:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self.torch, self.causal = torch, causal
        self.only = lambda: sdpa_kernel(getattr(SDPBackend, REFERENCES[kind]))
        make = lambda: torch.randn(B, N, H, d, dtype=torch.float16, device="cuda").transpose(1, 2)
        self.q, self.k, self.v = (make().requires_grad_() for _ in range(3))
        self.g = make()

    def forward(self) -> Any:
        with self.only(), self.torch.no_grad():
            return self.attend()

    def attend(self) -> Any:
        return self.torch.nn.functional.scaled_dot_product_attention(
            self.q, self.k, self.v, is_causal=self.causal
        )

    def both(self) -> None:
        with self.only():
            self.torch.autograd.grad(self.attend(), (self.q, self.k, self.v), self.g)

    def seconds(self, run: Callable[[], Any]) -> float:
        start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(LAUNCHES):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / LAUNCHES

    def peak(self) -> float:
        self.torch.cuda.empty_cache()
        self.torch.cuda.reset_peak_memory_stats()
        before = self.torch.cuda.memory_allocated()
        self.both()
        self.torch.cuda.synchronize()
        return (self.torch.cuda.max_memory_allocated() - before) / 1e6


def measure(made: dict[str, Any], flops: float, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Name -> TFLOP/s forward, TFLOP/s of both passes, MB. In turns: a card gets slower as it gets warm."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in made}
    for i in range(rounds + 2):  # the first two compile, and wake the card
        for name, kind in made.items():
            forward, both = kind.seconds(kind.forward), kind.seconds(kind.both)
            if i >= 2:
                times[name][0].append(forward)
                times[name][1].append(both)
    speed = lambda runs, count: count / statistics.median(runs) / 1e12
    return {
        name: (speed(forward, flops), speed(both, 3.5 * flops), made[name].peak())
        for name, (forward, both) in times.items()
    }


def measure_what_fits(made: dict[str, Any], flops: float, rounds: int) -> dict[str, tuple]:
    """`measure`, without those that run out of memory; where all together do, each alone."""
    try:
        return measure(made, flops, rounds)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free()
    if len(made) < 2:
        return {}
    alone = [measure_what_fits({name: kind}, flops, rounds) for name, kind in made.items()]
    return {name: found for part in alone for name, found in part.items()}


def has_torch() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def is_out_of_memory(error: Exception) -> bool:
    kind = type(error).__name__
    return kind == "OutOfMemoryError" or kind == "AcceleratorError" and "out of memory" in str(error).lower()


def free() -> None:
    """Give back to the card what CuPy and PyTorch keep for later: neither sees the other's."""
    gc.collect()
    sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
    if has_torch():
        sys.modules["torch"].cuda.empty_cache()


def make(name: str, *sizes: Any) -> Any:
    """The contestant, tried once; None if it does not fit in the card's memory."""
    made = None
    try:
        made = Ours(*sizes) if name == "ours" else PyTorch(name, *sizes)
        made.both()
        return made
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    del made
    free()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    args = parser.parse_args()
    try:
        cupy = backend.device_module("cuda")
    except backend.DeviceError as error:
        sys.exit(f"error: {error}")
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    names = ["ours", *REFERENCES] if has_torch() else ["ours"]
    card = properties["name"].decode()
    print(f"{card}, CuPy {cupy.__version__}; float16, {TOKENS} tokens, heads * d = {WIDTH}")
    print("TFLOP/s forward | forward and backward | peak MB")
    print(f"{'mask':7} {'d':>4} {'N':>6}   " + "".join(f"{name:>25}" for name in names))
    for causal in (False, True):
        for d in (64, 128):
            for N in args.lengths:
                sizes = (max(TOKENS // N, 1), WIDTH // d, N, d, causal)
                made = {name: make(name, *sizes) for name in names}
                made = {name: kind for name, kind in made.items() if kind is not None}
                flops = 4 * sizes[0] * sizes[1] * N * N * d * (0.5 if causal else 1)
                found = measure_what_fits(made, flops, args.rounds)
                cells = [
                    "{:7.1f} |{:6.1f} |{:7.0f}".format(*found[name]) if name in found else "out of memory"
                    for name in names
                ]
                mask = "causal" if causal else "full"
                print(f"{mask:7} {d:4} {N:6}   " + "".join(f"{cell:>25}" for cell in cells), flush=True)
                made.clear()
                free()


if __name__ == "__main__":
    main()
