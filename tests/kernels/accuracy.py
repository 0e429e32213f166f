"""How exact the kernel is beside plain attention of the same precision: `python -m tests.kernels.accuracy`.

For each type and kind of values, and for each result: the largest error against float64 as a multiple of that
of plain attention, in the median problem and in the worst. And what the worst needs beyond twice the error of
plain attention, in roundings of the largest sum: `check` allows four. Where plain attention makes no error,
inf.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

import kernels
from kernels.flash_attention import SOURCE
from kernels.module import Module

from .attention import DTYPES, NAMES, Case, attention, case, largest_terms, plain_errors, unit

SHAPES = [  # heads, key heads, queries, keys, d, and the mask
    (2, 1, 33, 33, 32, {"causal": True}),
    (2, 1, 100, 130, 64, {}),
    (2, 2, 200, 200, 64, {"causal": True}),
    (2, 1, 300, 300, 128, {}),
    (2, 1, 290, 300, 96, {"causal": True, "window": 40}),
    (2, 1, 300, 7, 20, {}),
    (1, 1, 5, 300, 64, {}),
    (2, 1, 1, 500, 64, {}),
    (1, 1, 40, 1, 64, {}),
    (4, 1, 150, 150, 40, {"scale": 0.5}),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--without-sums", action="store_true", help="leave P as it is in float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, without_sums(Path(folder)) if args.without_sums else Module(SOURCE, backend="emulator"))


def without_sums(folder: Path) -> Module:
    """A copy of the kernel that takes P = exp(S - L) as it is in float32 too."""
    text = SOURCE.read_text(encoding="utf-8")
    rule = "constexpr bool divides_by_sum = sizeof(T) == sizeof(float);"
    assert rule in text
    path = folder / SOURCE.name
    path.write_text(text.replace(rule, "constexpr bool divides_by_sum = false;"), encoding="utf-8")
    shutil.copy(SOURCE.with_name("ptx.cuh"), folder)
    return Module(path, backend="emulator")


def compare(args: argparse.Namespace, module: Module) -> None:
    print(f"{'':17}" + "".join(f"{name:^25} |" for name in NAMES))
    print(f"{'':17}" + "   median    worst  beyond |" * len(NAMES))
    for dtype, values in itertools.product(args.dtypes, ("normal", "large", "tailed")):
        found = defaultdict(list)
        for (H, H_kv, n, m, d, mask), seed in itertools.product(SHAPES, range(args.seeds)):
            for name, pair in errors(case(dtype, 1, H, H_kv, n, m, d, values, seed, **mask), module).items():
                found[name].append(pair)
        cells = []
        for name in NAMES:
            ratios, beyond = np.transpose(found[name])
            cells.append(f"{np.median(ratios):9.2f} {ratios.max():8.2g} {beyond.max():7.2f} |")
        print(f"{dtype:10}{values:7}" + "".join(cells), flush=True)


def errors(c: Case, module: Module) -> dict[str, tuple[float, float]]:
    """Of each result: its error as a multiple of plain attention's, and what it needs beyond twice that."""
    out, logsumexp = kernels.flash_attention(c.q, c.k, c.v, **c.keywords, backend=module)
    keywords = {**c.keywords, "backend": module}
    found = (
        out,
        logsumexp,
        *kernels.flash_attention_backward(c.g, c.q, c.k, c.v, out, logsumexp, **keywords),
    )
    exact, result = attention(c, np.float64), {}
    for name, x, y, plain, terms in zip(NAMES, found, exact, plain_errors(c, exact), largest_terms(c)):
        error = np.abs(x.astype(np.float64) - y)[np.isfinite(y)].max(initial=0)
        ratio = error / plain if plain else 1.0 if error == 0 else np.inf
        result[name] = ratio, max(error - 2 * plain, 0) / (unit(name, c) * terms) if terms else 0
    return result


if __name__ == "__main__":
    main()
