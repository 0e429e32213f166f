"""Planted bugs: copies of flash_attention.cu with one thing wrong each; the checked emulator names the line.

Each is a mistake that people make, and some change no number in the run made here: only the checks see them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import kernels
from kernels.module import KernelError, Module

from . import emulated
from .attention import DTYPES

emulated.checks()

pytestmark = pytest.mark.slow

flash = importlib.import_module("kernels.flash_attention")  # `kernels` gives that name to the function
SOURCE = Path(kernels.__file__).parent / "flash_attention.cu"
CLEAN = Module(SOURCE, backend="emulator", checked=True)

# Lines of the source, by words that stand in no other
COPY = "copy_async<16>("
LOADS = (
    "const float4 a0 =",
    "const float4 a1 =",
    "const float4 b =",
    "const float2 b =",
    "load_matrices(a,",
    "load_matrices(b,",
)
LOADS += ("load_matrices_transposed(b,",)
STORES = ("store_pair(tile.at(row + lane_row(), ", "store_pair(tile.at(row + lane_row() + 8")
OUT = "*(uint4*)(target"
STATISTICS = ("- Li(step)[i])", "- Li(step)[Br + 8 * n")
SHARED = (COPY, "copy_async<4>(", *LOADS, *STATISTICS, *STORES, OUT)  # all that touch shared memory


@dataclass
class Mutation:
    """old -> new, at the `which`-th place of old; the kernel; a report's message; the lines where all are."""

    kernel: str
    old: str
    new: str
    message: str
    lines: tuple[str, ...]
    which: int = 0
    dtype: str = "float32"


BARRIERS = {"forward": 0, "backward_keys": 1, "backward_queries": 2}  # which of the three loops
FILLING = "reads shared memory that a cp.async of thread .* is still filling"
RACE = "race: .* shared memory that thread .* has (written|read)"
OUTSIDE = "out of bounds: .* of argument {}, which has"

MUTATIONS = {
    **{
        f"{kernel} {dtype}: no wait for the copies": Mutation(
            kernel, "wait_for_copies();", "", FILLING, SHARED, which, dtype
        )
        for kernel, which in BARRIERS.items()
        for dtype in ("float32", "float16")
    },
    **{
        f"{kernel} {dtype}: no barrier": Mutation(kernel, "__syncthreads();", "", RACE, SHARED, which, dtype)
        for kernel, which in BARRIERS.items()
        for dtype in ("float32", "float16")
    },
    **{
        f"{kernel}: waits after the barrier": Mutation(
            kernel,
            "wait_for_copies();\n        __syncthreads();",
            "__syncthreads();\n        wait_for_copies();",
            RACE + "|" + FILLING,
            SHARED,
            which,
        )
        for kernel, which in BARRIERS.items()
    },
    "store float16: overwrites the tile while the warp reads it": Mutation(
        "forward",
        "__syncwarp();  // the whole warp has read",
        "// the whole warp has read",
        RACE,
        (*LOADS, *STORES),
        0,
        "float16",
    ),
    "store float32: overwrites the tile while the warp reads it": Mutation(
        "forward",
        "__syncwarp();  // the whole warp has read",
        "// the whole warp has read",
        RACE,
        (*LOADS, *STORES),
    ),
    "store: reads what other lanes have just written": Mutation(
        "forward", "    __syncwarp();\n    constexpr", "    constexpr", RACE, (OUT, *STORES)
    ),
    "loads one row too many": Mutation(
        "forward", "row < count", "row <= count", OUTSIDE.format("[012]"), (COPY,)
    ),
    "forward: loads the next tile's keys": Mutation(
        "forward", "K + j * Bc * p.K.row", "K + (j + 1) * Bc * p.K.row", OUTSIDE.format(1), (COPY,)
    ),
    "backward_queries: loads the next tile's values": Mutation(
        "backward_queries",
        "V + j * Bc * p.V.row",
        "V + (j + 1) * Bc * p.V.row",
        OUTSIDE.format(3),
        (COPY,),
        1,
    ),
    "stores one row too many": Mutation(
        "forward",
        "if (r < count)",
        "if (r <= count)",
        "global memory that block|another block|" + OUTSIDE.format(3),
        (OUT,),
    ),
    "forward: one L too many": Mutation(
        "forward",
        "if (i < count &&",
        "if (i <= count &&",
        "global memory that block|" + OUTSIDE.format(4),
        ("L[i] = m[r]",),
    ),
    "row_dots: one row too many": Mutation(
        "row_dots",
        "if (row >= rows)",
        "if (row > rows)",
        "out of bounds: ",
        ("sum += float(dO[c])", "D[row] = sum"),
    ),
    "row_dots: one column too many": Mutation(
        "row_dots", "c < d; c += WARP", "c <= d; c += WARP", OUTSIDE.format("[01]"), ("sum += float(dO[c])",)
    ),
    "backward_keys: one L too many": Mutation(
        "backward_keys",
        "copy_async<4>(Li(step) + i, L + row + (i < rows ? i : 0), i < rows)",
        "copy_async<4>(Li(step) + i, L + row + i, i <= rows)",
        OUTSIDE.format(4),
        ("copy_async<4>(Li(step) + i",),
    ),
    "backward_keys: one D too many": Mutation(
        "backward_keys",
        "D + row + (i < rows ? i : 0), i < rows)",
        "D + row + i, i <= rows)",
        OUTSIDE.format(5),
        ("copy_async<4>(Li(step) + Br",),
    ),
    "backward_keys: L and D in one place": Mutation(
        "backward_keys",
        "copy_async<4>(Li(step) + Br + i,",
        "copy_async<4>(Li(step) + i,",
        "writes shared memory that a cp.async of thread .* is still filling",
        ("copy_async<4>(Li(step)", *STATISTICS),
    ),
    "backward_queries: one L too many": Mutation(
        "backward_queries", "i < count ? L[i]", "i <= count ? L[i]", OUTSIDE.format(4), ("l[r] = i",)
    ),
    "backward_queries: one D too many": Mutation(
        "backward_queries", "i < count ? D[i]", "i <= count ? D[i]", OUTSIDE.format(5), ("delta[r] = i",)
    ),
    "backward_keys: one dV too many": Mutation(
        "backward_keys",
        "store(dV_out, p.dV.row, count",
        "store(dV_out, p.dV.row, count + 1",
        "global memory that block|another block|" + OUTSIDE.format(7),
        (OUT,),
    ),
    "backward_queries: one dQ too many": Mutation(
        "backward_queries",
        "store(dQ_out, p.dQ.row, count",
        "store(dQ_out, p.dQ.row, count + 1",
        "global memory that block|another block|" + OUTSIDE.format(6),
        (OUT,),
    ),
    "the length of a sequence that is not there": Mutation(
        "forward", "lengths[batch]", "lengths[batch + 1]", OUTSIDE.format(5), ("length = max(0, min(lengths",)
    ),
    "the last row of a tile is not loaded": Mutation(
        "forward",
        "i < rows * chunks",
        "i < (rows - 1) * chunks",
        "reads shared memory that nobody has written",
        LOADS,
    ),
    "one buffer instead of two": Mutation(
        "forward", "(Br + j % 2 * 2 * Bc)", "(Br + 0 * j)", RACE + "|" + FILLING, (COPY, *LOADS)
    ),
    "warps share rows": Mutation(
        "forward",
        "threadIdx.x / WARP * WARP_ROWS;  // this",
        "threadIdx.x / WARP * (WARP_ROWS - 4);  // this",
        RACE,
        (COPY, *LOADS, *STORES, OUT, "L[i] = m[r]"),
    ),
    "a tile that starts in the middle of 16 bytes": Mutation(
        "forward", "Qi{(T*)shared}", "Qi{(T*)shared + 1}", "misaligned: cp.async of 16 bytes", (COPY,)
    ),
    "all blocks write the first tile": Mutation(
        "forward",
        "p.O.head + i0 * p.O.row",
        "p.O.head + 0 * p.O.row",
        "race: writes global memory that block . has written",
        (OUT,),
    ),
    "a warp without rows goes home": Mutation(
        "forward",
        "    clear(O);\n\n    if",
        "    clear(O);\n    if (warp_row >= count) return;\n    if",
        r"barrier divergence: waits in __syncthreads\(\), and thread .* has left the kernel",
        ("__syncthreads();  // tile j",),
    ),
    "a shuffle without its own lane": Mutation(
        "forward",
        "fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1))",
        "fmaxf(x, __shfl_xor_sync(0x7fffffff, x, 1))",
        "a shuffle (with mask 7fffffff, which leaves out its own lane 31|reads lane 31, which takes no part)",
        ("x = fmaxf(x, __shfl_xor_sync(0x7fffffff",),
    ),
}


class Mixed:
    """The mutated source for one kernel, the clean one for the others: as little to compile as can be."""

    def __init__(self, mutant: Module, kernel: str) -> None:
        self.mutant, self.name = mutant, kernel

    def kernel(self, name: str):
        return (self.mutant if name.startswith(self.name + "<") else CLEAN).kernel(name)


def run(module, dtype: str, backward: bool) -> None:
    """99 queries and keys: a whole tile and a part of one, of two heads that share their keys."""
    rng, dtype = np.random.default_rng(0), DTYPES[dtype]
    q, k, v, g = (rng.standard_normal((1, heads, 99, 32)).astype(dtype) for heads in (2, 1, 1, 2))
    lengths = np.array([98], np.int32)
    # Heads side by side in memory, as the launcher makes its own: what is beyond a row is another head's.
    first = CLEAN if backward else module
    out, logsumexp = kernels.flash_attention(q, k, v, key_lengths=lengths, backend=first)
    if backward:
        keywords = {"key_lengths": lengths, "backend": module}
        kernels.flash_attention_backward(g, q, k, v, out, logsumexp, **keywords)


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bugs_are_found_at_their_line(tmp_path, name):
    mutation = MUTATIONS[name]
    parts = SOURCE.read_text(encoding="utf-8").split(mutation.old)
    assert len(parts) > mutation.which + 1, "the source has changed: mend this mutation"
    text = (
        mutation.old.join(parts[: mutation.which + 1])
        + mutation.new
        + mutation.old.join(parts[mutation.which + 1 :])
    )
    (tmp_path / SOURCE.name).write_text(text, encoding="utf-8")
    (tmp_path / "ptx.cuh").write_text(
        (SOURCE.parent / "ptx.cuh").read_text(encoding="utf-8"), encoding="utf-8"
    )
    mutant = Module(tmp_path / SOURCE.name, backend="emulator", checked=True)
    with pytest.raises(KernelError, match=mutation.message) as caught:
        run(Mixed(mutant, mutation.kernel), mutation.dtype, mutation.kernel != "forward")
    lines = text.splitlines()
    for report in caught.value.reports:
        for place in filter(None, (report.place, report.other_place)):
            line = lines[int(place.removeprefix("flash_attention.cu:")) - 1]
            assert any(words in line for words in mutation.lines), f"{line}\n{caught.value}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_source_as_it_is_has_no_report(dtype):
    run(CLEAN, dtype, backward=True)


@pytest.mark.parametrize("kernel", ["forward", "backward_keys", "backward_queries"])
def test_too_little_and_too_much_shared_memory(monkeypatch, kernel):
    right = flash.block_shape

    def change(bytes: int) -> None:
        def block_shape(name, dtype, d):
            threads, shared_bytes = right(name, dtype, d)
            return threads, shared_bytes + bytes * (name == kernel)

        monkeypatch.setattr(flash, "block_shape", block_shape)

    change(-4)
    with pytest.raises(
        KernelError, match=r"flash_attention.cu:\d+: out of bounds: .* extern __shared__ memory"
    ):
        run(CLEAN, "float32", kernel != "forward")
    change(99 * 1024)
    with pytest.raises(KernelError, match="bytes of shared memory a block.* the target card has 101,376"):
        run(CLEAN, "float32", kernel != "forward")
