"""WKV forward and backward, fused beside its composition: `python -m tests.benchmarks.wkv`.

float32, from random decays, keys and values to the gradients of all four inputs.
"""

import argparse
import json
import os
import statistics
import time

import numpy as np

from tests.benchmarks import harness

# (B, T, C): a shard of the example's batch and all of it, a wide and a long text of the 169M model.
SHAPES = [(8, 128, 128), (16, 128, 128), (4, 512, 768), (1, 1024, 768)]
KINDS = ["fused", "composed"]


def inputs(B: int, T: int, C: int) -> list[np.ndarray]:
    """w, u, k, v and the gradient of the result."""
    rng = np.random.default_rng(0)
    w, u = np.exp(rng.uniform(-5, 3, C)), rng.normal(0, 1, C)
    return [a.astype(np.float32) for a in (w, u, *rng.normal(0, 1, (3, B, T, C)))]


def child(kind: str) -> dict[str, float]:
    """Shape -> seconds, the median of several runs."""
    from autograd import Tensor, backend
    from autograd.fused import FUSED

    backend.keep_memory()
    operation, found = getattr(FUSED["wkv"], kind), {}
    for shape in SHAPES:
        *arrays, g = inputs(*shape)
        runs = []
        for _ in range(22 if kind == "fused" else 4):
            started = time.perf_counter()
            operation(*[Tensor(a, requires_grad=True) for a in arrays]).backward(g)
            runs.append(time.perf_counter() - started)
        found[str(shape)] = statistics.median(runs[1:])  # the first one finds no memory kept
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    results = harness.rounds("tests.benchmarks.wkv", {kind: ([kind], {}) for kind in KINDS}, args.rounds)
    print(f"{os.cpu_count()} cores, NumPy {np.__version__}; medians of {args.rounds} rounds")
    for shape in SHAPES:
        key = str(shape)
        print(f"  (B, T, C) = {key}")
        for kind, runs in results.items():
            times = "" if kind == "fused" else f"fused is {harness.ratio(runs, results['fused'], key):.1f}x"
            print(f"    {kind:14} {1e3 * harness.median(runs, key):8.2f} ms   {times}")


if __name__ == "__main__":
    main()
