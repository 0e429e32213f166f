"""Loading a checkpoint of 500 MB: `python -m tests.benchmarks.load`.

Seconds of from_pretrained beside those of reading the file alone, from a warm cache; and the peak of memory
above what the process had before, beside the size of the model in memory. GPT-2's matrices are stored (in,
out) and turned in loading; bfloat16 becomes float32, twice the size of the file.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks import harness

KINDS = ("gpt2-float32", "llama-float32", "llama-bfloat16")


def make(kind: str, folder: Path) -> dict[str, float]:
    """Save a model of this kind whose file has about 500 MB."""
    import ml_dtypes

    from tinyllm.models import GPT2, GPT2Config, LLaMA, LLaMAConfig

    if kind == "gpt2-float32":
        model = GPT2(GPT2Config())
    else:
        deeper = 2 if kind == "llama-bfloat16" else 1
        model = LLaMA(LLaMAConfig(24000, 768 * deeper, 2048 * deeper, 12 // deeper, 12))
    if kind == "llama-bfloat16":
        model.to(dtype=ml_dtypes.bfloat16)
    model.save_pretrained(folder)
    return {}


def load(kind: str, folder: Path) -> dict[str, float]:
    import tinyllm

    file = folder / "model.safetensors"
    buffer = bytearray(2**24)
    started = time.perf_counter()
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    reading = time.perf_counter() - started
    before = harness.peak_megabytes()
    started = time.perf_counter()
    model = tinyllm.from_pretrained(folder)
    loading = time.perf_counter() - started
    peak = harness.peak_megabytes() - before
    size = 4 * model.parameter_count() / 1e6
    return {
        "file": file.stat().st_size / 1e6,
        "size": size,
        "read": reading,
        "load": loading,
        "beyond": loading - reading,
        "peak": peak,
        "ratio": peak / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        step, kind, folder = args.child
        print(json.dumps({"make": make, "load": load}[step](kind, Path(folder))))
        return
    print(f"{os.cpu_count()} cores, NumPy {np.__version__}; medians of {args.rounds} rounds")
    print(f"{'':16} {'file':>8} {'model':>8} {'read':>8} {'load':>8} {'beyond':>8} {'peak':>8}  of the model")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            harness.child("tests.benchmarks.load", "make", kind, folder)
            runs = [harness.child("tests.benchmarks.load", "load", kind, folder) for _ in range(args.rounds)]
        m = {key: harness.median(runs, key) for key in runs[0]}
        print(
            f"{kind:16} {m['file']:5,.0f} MB {m['size']:5,.0f} MB {m['read']:6.2f} s {m['load']:6.2f} s "
            f"{m['beyond']:6.2f} s {m['peak']:5,.0f} MB  {m['ratio']:.2f}x"
        )


if __name__ == "__main__":
    main()
