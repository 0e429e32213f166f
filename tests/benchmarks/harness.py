"""Paired measurements in separate processes: A B A B ..., for the machine is shared and its speed drifts."""

import json
import os
import statistics
import subprocess
import sys

from tqdm import tqdm

# What glibc is told for the run "PyTorch, memory kept": ours asks for the same with mallopt.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def child(module: str, *arguments: str, env: dict[str, str] | None = None) -> dict[str, float]:
    """Run `python -m module --child ...`, and read the JSON line that it prints last."""
    command = [sys.executable, "-m", module, "--child", *arguments]
    output = subprocess.run(command, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, check=True)
    return json.loads(output.stdout.decode().strip().splitlines()[-1])


def rounds(
    module: str, kinds: dict[str, tuple[list[str], dict[str, str]]], count: int
) -> dict[str, list[dict]]:
    """Every kind once a round, `count` rounds."""
    results: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for _ in tqdm(range(count), desc=" ".join(next(iter(kinds.values()))[0]), leave=False):
        for kind, (arguments, env) in kinds.items():
            results[kind].append(child(module, *arguments, env=env))
    return results


def median(results: list[dict], key: str) -> float:
    return statistics.median(result[key] for result in results)


def ratio(a: list[dict], b: list[dict], key: str) -> float:
    """The median over the rounds of a / b."""
    return statistics.median(x[key] / y[key] for x, y in zip(a, b))


def peak_megabytes() -> float:
    """The largest resident size of this process so far; NaN on Windows, which does not tell."""
    if sys.platform == "win32":
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
