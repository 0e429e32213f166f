"""FlashAttention on a laptop: the CUDA kernel runs in the emulator, which counts every byte it moves.

Without arguments, in under a minute on 2 cores, no GPU: attention of one head, d = 64, float32, N = 256
to 2048, by the three kernels of kernels/naive_attention.cu and by kernels/flash_attention.cu. For each N it
prints the bytes that went between global memory and the chip, counted and by the closed form, which agree to
the byte; and the memory that each needs besides inputs and output: N x N numbers twice, against N.

Then it gives the kernel smaller and smaller tiles. K and V are read once for each tile of queries, so with
few rows in a tile FlashAttention moves more than before, and with very few it would lose to the naive way.

Last it takes one barrier out of a copy of the kernel and shows what the checking emulator says of it. The
pictures in runs/flash_attention have the curves beside the paper's Theta(N d + N^2) and Theta(N^2 d^2 / M),
and how numbers lie in the registers of a warp and in the banks of shared memory.

    python examples/flash_attention.py
    python examples/flash_attention.py --longest 512
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle
from tqdm import tqdm

import kernels
from kernels.flash_attention import SOURCE, TILES, kernel_name
from kernels.module import EmulatorUnavailable, KernelError, Module
from kernels.traffic import (
    NAIVE,
    flash_backward_bytes,
    flash_forward_bytes,
    naive_attention,
    naive_forward_bytes,
)
from tinyllm import cli, plots
from tinyllm.errors import InputError
from tinyllm.files import disk_errors

D = 64  # numbers of the head
SHORTEST = 256
ROWS = (16, 32, 64, 128)  # of the tiles that are compared
BACKWARD = ("row_dots", "backward_keys", "backward_queries")


def main() -> None:
    args = arguments()
    with disk_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    try:
        flash, naive = (
            Module(path, backend="emulator", checked=True) for path in (SOURCE, SOURCE.with_name(NAIVE))
        )
        flash.kernel(kernel_name("forward", "float32", D))
    except EmulatorUnavailable as error:
        raise InputError(str(error)) from None
    lengths = [n for n in (SHORTEST << i for i in range(20)) if n <= args.longest]

    counts = [measure(n, args.seed, flash, naive) for n in tqdm(lengths, desc="lengths", leave=False)]
    print_lengths(counts)
    n = lengths[-1] if len(lengths) < 2 else lengths[-2]
    tiles = [count_tiles(n, rows, args.seed, flash) for rows in tqdm(ROWS, desc="tiles", leave=False)]
    print_tiles(n, tiles)
    print("\nwithout the barrier of the forward pass, the emulator says:")
    print(f"   {without_its_barrier(args.seed)}")

    path, layout = args.out / "flash_attention.png", args.out / "flash_attention_layout.png"
    plots.save(draw(counts, n, tiles), path)
    plots.save(draw_layout(), layout)
    print(f"\ndrawn in {path} and {layout}")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--longest", type=cli.number(int, SHORTEST), default=2048, help="the largest N (default: 2048)")
    add("--seed", type=cli.number(int, 0), default=0, help="of the random inputs (default: 0)")
    out = Path("runs/flash_attention")
    add("--out", type=cli.path, default=out, help=f"folder of the picture (default: {out.as_posix()})")
    return parser.parse_args()


def inputs(n: int, seed: int) -> list[np.ndarray]:
    """q, k, v and the gradient of the output, each (1, 1, n, D)."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 1, n, D), dtype=np.float32) for _ in range(4)]


def measure(n: int, seed: int, flash: Module, naive: Module) -> dict[str, Any]:
    """The bytes of both ways at length n, counted and by their closed forms, and by how much they differ."""
    q, k, v, g = inputs(n, seed)
    expected = naive_attention(q[0], k[0], v[0], naive)
    out, logsumexp = kernels.flash_attention(q, k, v, backend=flash)
    kernels.flash_attention_backward(g, q, k, v, out, logsumexp, backend=flash)
    forms = {
        "naive": naive_forward_bytes(1, n, D),
        "flash": flash_forward_bytes(1, n, D, 4),
        "backward": flash_backward_bytes(1, n, D, 4),
    }
    return {
        "n": n,
        "difference": float(np.abs(out[0] - expected).max()),
        "naive": moved(naive, ["scores", "softmax", "output"]),
        "flash": moved(flash, [kernel_name("forward", "float32", D)]),
        "backward": moved(flash, [kernel_name(name, "float32", D) for name in BACKWARD]),
        "forms": {name: sum(form) for name, form in forms.items()},
    }


def moved(module: Module, names: list[str]) -> int:
    """The bytes that the last launch of each of these kernels read and wrote."""
    counts = [module.kernel(name).counts for name in names]
    return sum(c.global_read_bytes + c.global_written_bytes for c in counts)


def print_lengths(counts: list[dict[str, Any]]) -> None:
    print("MB moved, one head of 64 numbers in float32; in brackets counted minus closed form, in bytes")
    print("     N        naive        flash   naive/flash     backward   memory: naive   flash   difference")
    for c in counts:
        n, cells = c["n"], []
        for name in ("naive", "flash", "backward"):
            cells.append(f"{c[name] / 1e6:8.2f} [{c[name] - c['forms'][name]}]")
        naive, flash, backward = cells
        print(
            f"{n:6} {naive} {flash} {c['naive'] / c['flash']:12.1f}x {backward} "
            f"{8 * n * n / 1e3:10,.0f} KB {4 * n / 1e3:4.0f} KB {c['difference']:12.1e}"
        )


@contextmanager
def tile(Br: int, Bc: int) -> Iterator[None]:
    """The forward kernel with other tiles."""
    table = TILES["forward"][4]
    usual, table[D] = table[D], (Br, Bc)
    try:
        yield
    finally:
        table[D] = usual


def count_tiles(n: int, rows: int, seed: int, flash: Module) -> tuple[int, int, int]:
    """Rows of a tile of queries, the numbers that are on the chip then, and the bytes moved."""
    Bc = 16
    with tile(rows, Bc):
        kernels.flash_attention(*inputs(n, seed)[:3], backend=flash)
        return rows, (rows + 4 * Bc) * D, moved(flash, [kernel_name("forward", "float32", D)])


def print_tiles(n: int, tiles: list[tuple[int, int, int]]) -> None:
    naive = sum(naive_forward_bytes(1, n, D))
    print(f"\nN = {n}, tiles of other sizes; the naive way moves {naive / 1e6:.2f} MB")
    print("rows of a tile   KB on the chip    MB moved")
    for rows, numbers, count in tiles:
        print(f"{rows:14} {4 * numbers / 1024:16.0f} {count / 1e6:11.2f}")
    even = even_rows(n)
    print(f"with {even:.1f} rows or fewer FlashAttention would move more than the naive way")


def even_rows(n: int) -> float:
    """The rows of a tile at which both ways move the same: solves 4 d (2 n + 2 n^2 / rows) = naive."""
    return 8 * D * n * n / (sum(naive_forward_bytes(1, n, D)) - 8 * D * n - 4 * n)


def without_its_barrier(seed: int) -> str:
    """The first report on a copy of the kernel whose warps do not wait for each other's copies."""
    text = SOURCE.read_text(encoding="utf-8")
    start = text.index("forward(")
    barrier = text.index("__syncthreads();", start)
    broken = text[:barrier] + text[barrier:].replace("__syncthreads();", "", 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SOURCE.name
        path.write_text(broken, encoding="utf-8")
        (Path(folder) / "ptx.cuh").write_text(
            SOURCE.with_name("ptx.cuh").read_text(encoding="utf-8"), encoding="utf-8"
        )
        try:
            kernels.flash_attention(
                *inputs(128, seed)[:3], backend=Module(path, backend="emulator", checked=True)
            )
        except KernelError as error:
            return str(error.reports[0])
    return "nothing"


def draw(counts: list[dict[str, Any]], n: int, tiles: list[tuple[int, int, int]]) -> Any:
    figure, axes = plots.figure(1, 3, size=(11, 3.6))
    traffic, memory, sizes = axes
    lengths = np.array([c["n"] for c in counts], float)
    fine = np.geomspace(lengths[0] / 1.2, lengths[-1] * 1.2, 50)
    for name, label, color in (
        ("naive", "naive", plots.COLORS[3]),
        ("flash", "FlashAttention", plots.COLORS[0]),
    ):
        traffic.plot(lengths, [c[name] / 1e6 for c in counts], "o", color=color, label=f"{label}, counted")
    # The paper's Theta has no constant: each curve is laid through the last point.
    naive, flash = counts[-1]["naive"] / 1e6, counts[-1]["flash"] / 1e6
    theta = lambda x: x * D + x * x
    label = r"$\Theta(N d + N^2)$"
    traffic.plot(
        fine, naive * theta(fine) / theta(lengths[-1]), color=plots.COLORS[3], alpha=0.6, label=label
    )
    label = r"$\Theta(N^2 d^2 / M)$"
    traffic.plot(fine, flash * (fine / lengths[-1]) ** 2, color=plots.COLORS[0], alpha=0.6, label=label)
    for axis in (traffic, memory):
        axis.set(xscale="log", yscale="log", xticks=lengths, xticklabels=[f"{x:.0f}" for x in lengths])
        axis.minorticks_off()
    plots.finish(traffic, xlabel="N", ylabel="MB", title="moved between global memory and the chip")

    memory.plot(
        lengths, 8 * lengths**2 / 1e6, "o-", color=plots.COLORS[3], label="naive: S and P, 2 N² numbers"
    )
    memory.plot(lengths, 4 * lengths / 1e6, "o-", color=plots.COLORS[0], label="FlashAttention: L, N numbers")
    plots.finish(memory, xlabel="N", ylabel="MB", title="memory besides inputs and output")

    rows = np.array([row for row, _, _ in tiles], float)
    few = np.geomspace(4, rows[-1], 50)
    sizes.plot(rows, [count / 1e6 for *_, count in tiles], "o", color=plots.COLORS[0], label="counted")
    formula = (4 * D * (2 * n + 2 * n * n / few) + 4 * n) / 1e6
    sizes.plot(few, formula, color=plots.COLORS[0], alpha=0.6, label=r"$4 d (2 N + 2 N^2 / B_r) + 4 N$")
    sizes.axhline(sum(naive_forward_bytes(1, n, D)) / 1e6, color=plots.COLORS[3], label="naive")
    sizes.axvline(even_rows(n), color="gray", linestyle=":", linewidth=1)
    sizes.set(xscale="log", xticks=[4, 8, *rows], xticklabels=[4, 8, *map(int, rows)])
    sizes.minorticks_off()
    plots.finish(
        sizes, xlabel="rows of a tile of queries, $B_r$", ylabel="MB", title=f"tiny tiles lose, N = {n}"
    )
    return figure


def draw_layout() -> Any:
    """Who holds what of a 16 x 8 result of the tensor cores, and in which banks the chunks of a tile lie."""
    figure, axes = plots.figure(1, 3, size=(9, 3.4))
    lanes = np.zeros((16, 8), int)
    for lane in range(32):
        for e in range(4):
            lanes[lane // 4 + e // 2 * 8, lane % 4 * 2 + e % 2] = lane
    grid(axes[0], lanes, lanes % 4, "lane that holds a number\nof a 16 x 8 result", "column", "row")

    row, chunk = np.indices((8, 8))  # of a tile with 64 numbers of 16 bits: 8 chunks of 16 bytes a row
    for axis, place, title in (
        (axes[1], chunk, "place of chunk c: c\nplace p is banks 4p to 4p + 3"),
        (axes[2], chunk ^ row, "place of chunk c: c ^ row\na column meets all 32 banks"),
    ):
        grid(axis, place, place, title, "chunk of 16 bytes", "row of the tile")
        axis.add_patch(Rectangle((1.5, -0.5), 1, 8, fill=False, linewidth=2))  # what a warp reads at once
    return figure


def grid(axis: Any, labels: np.ndarray, colors: np.ndarray, title: str, xlabel: str, ylabel: str) -> None:
    axis.imshow(colors, cmap="Set3", vmin=0, vmax=11, aspect="auto")
    for (y, x), label in np.ndenumerate(labels):
        axis.text(x, y, label, ha="center", va="center", fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.set(xlabel=xlabel, ylabel=ylabel, xticks=range(labels.shape[1]), yticks=range(len(labels)))


if __name__ == "__main__":
    cli.run(main)
