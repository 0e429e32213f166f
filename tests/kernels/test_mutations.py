"""Planted bugs: copies of flash_attention.cu with one thing wrong each; the checked emulator names the line.

Each is a mistake that people make, and some change no number in the run made here: only the checks see them.
"""

from __future__ import annotations

import importlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
COPY, COPY_L, COPY_D, COPY_R = "copy_async<16>(", *(f"copy_async<4>({name}i(step)" for name in "LDR")
PRODUCTS = {  # what reads the tiles: of A, of B, and of B in the product with P
    "float32": ("const float4 a0 =", "const float4 a1 =", "const float4 b =", "const float2 b ="),
    "float16": ("load_matrices(a,", "load_matrices(b,", "load_matrices_transposed(b,"),
}
PAIRS = ("store_pair(tile.at(row + lane_row(), ", "store_pair(tile.at(row + lane_row() + 8")
OUT = "*(uint4*)(target"
READS_L, READS_D, READS_R = ("- Li(step)[i])", "- Di(step)[8 * n", "x *= Ri(step)[i]")


@dataclass
class Mutation:
    """In one kernel, of a type and a head dimension: old -> new, at the first place after the kernel's name;
    in a function that all kernels share, at the first of all.

    message: what each report says. lines: those that the reports name, all of these and no others.
    """

    kernel: str
    old: str
    new: str
    message: str
    lines: tuple[str, ...]
    dtype: str = "float32"
    d: int = 32

    def planted(self) -> str:
        text = SOURCE.read_text(encoding="utf-8")
        place = text.find(self.old, text.index(f"{self.kernel}(const T*"))
        place = text.find(self.old) if place < 0 else place
        assert place >= 0, "the source has changed: mend this mutation"
        return text[:place] + self.new + text[place + len(self.old) :]


FILLING = "(reads|writes) shared memory that a cp.async of thread .* is still filling"
RACE = "race: .* that thread .* has (written|read), with no barrier"
BEYOND = "out of bounds: .* of the extern __shared__ memory, which has"
OTHERS = f"{RACE}|{FILLING}|{BEYOND}"  # what belongs to another tile, or to nothing
OUTSIDE = "out of bounds: .* of argument {}, which has"
OTHER_BLOCK = "race: writes global memory that block .* has written|"

MUTATIONS: dict[str, Mutation] = {}


def plant(name: str, *mutation: Any, **options: Any) -> None:
    assert name not in MUTATIONS
    MUTATIONS[name] = Mutation(*mutation, **options)


# Each barrier and each wait removed, in each kernel, for each way to compute products. The last tile is then
# still read, or filled, while `store` writes over it.
for kernel in ("forward", "backward_queries", "backward_keys"):
    for dtype, d in (("float32", 32), ("float16", 64)):
        tiles = (COPY, *PRODUCTS[dtype])
        if kernel == "backward_keys":
            tiles += (COPY_L, COPY_D, READS_L, READS_D)
            tiles += (COPY_R, READS_R) if dtype == "float32" else ()
        plant(
            f"{kernel} {dtype}: no wait for copies",
            *(kernel, "wait_for_copies();", "", FILLING, (*tiles, *PAIRS)),
            **{"dtype": dtype, "d": d},
        )
        stored = (*PAIRS, OUT)
        if kernel == "backward_keys":
            stored = () if dtype == "float32" else (PAIRS[0], OUT)
        plant(
            f"{kernel} {dtype}: no barrier",
            *(kernel, "__syncthreads();", "", RACE + "|reads .* nobody has written", (*tiles, *stored)),
            **{"dtype": dtype, "d": d},
        )
    statistics = (COPY_L, COPY_D, COPY_R, READS_L, READS_D, READS_R) if kernel == "backward_keys" else ()
    plant(
        f"{kernel}: waits after the barrier",
        kernel,
        "wait_for_copies();\n        __syncthreads();",
        "__syncthreads();\n        wait_for_copies();",
        OTHERS,
        (COPY, *PRODUCTS["float32"], *statistics),
    )
for dtype in ("float32", "float16"):  # the tile is that of Q, the left factor
    plant(
        f"store {dtype}: overwrites the tile while the warp reads it",
        *("forward", "__syncwarp();  // the whole warp has read", "// the whole warp has read", RACE),
        (*PRODUCTS[dtype][:-2], *PAIRS),
        dtype=dtype,
    )
    plant(
        f"store {dtype}: reads what other lanes have just written",
        *("forward", "    __syncwarp();\n    constexpr", "    constexpr", RACE, (OUT, *PAIRS)),
        dtype=dtype,
    )

# One row too many in each call that loads a tile: the argument whose end is overrun tells which.
LOADS = {
    "forward": {0: "Q, p.Q.row, count", 1: "p.K.row, p.keys - j * Bc", 2: "p.V.row, p.keys - j * Bc"},
    "backward_queries": {
        0: "dO, p.dO.row, count",
        1: "Q, p.Q.row, count",
        2: "p.K.row, p.keys - j * Bc",
        3: "p.V.row, p.keys - j * Bc",
    },
    "backward_keys": {
        0: "p.dO.row, rows",
        1: "p.Q.row, rows",
        2: "K, p.K.row, count",
        3: "V, p.V.row, count",
    },
}
for kernel, d in (("forward", 64), ("backward_queries", 32), ("backward_keys", 32)):
    for argument, old in LOADS[kernel].items():
        name = f"{kernel}: one row of {old.partition('.row')[0].rpartition('.')[2]} too many"
        plant(name, kernel, old, old + " + 1", OUTSIDE.format(argument), (COPY,), d=d)
# One number of L, D or R too many, and one row too many in each call that stores a tile.
for number, name in ((4, "L"), (5, "D"), (6, "R")):
    old = f"{name} + row + (i < rows ? i : 0), i < rows"
    new = f"{name} + row + (i <= rows ? i : 0), i <= rows"
    line = f"copy_async<4>({name}i(step)"
    plant(f"backward_keys: one {name} too many", "backward_keys", old, new, OUTSIDE.format(number), (line,))
for number, name, line in ((4, "L", "l[r] = i"), (5, "D", "delta[r] = i")):
    old, new = f"i < count ? {name}[i]", f"i <= count ? {name}[i]"
    plant(
        f"backward_queries: one {name} too many",
        "backward_queries",
        old,
        new,
        OUTSIDE.format(number),
        (line,),
    )
for kernel, number, name, d in (
    ("forward", 3, "O", 128),
    ("backward_queries", 6, "dQ", 32),
    ("backward_keys", 7, "dK", 32),
    ("backward_keys", 8, "dV", 64),
):
    old = f", p.{name}.row, count, "
    message = OTHER_BLOCK + OUTSIDE.format(number)
    plant(
        f"{kernel}: stores one row of {name} too many", kernel, old, old[:-2] + " + 1, ", message, (OUT,), d=d
    )
for kernel, number, name, line in (
    ("forward", 4, "L", "L[i] = m[r]"),
    ("backward_queries", 7, "R", "R[i] = inv"),
):
    message = OTHER_BLOCK + OUTSIDE.format(number)
    new = "if (i <= count && lane_column() == 0)"
    plant(f"{kernel}: stores one {name} too many", kernel, new.replace("<=", "<"), new, message, (line,))

# Off by one in the functions and the kernel that are left.
MUTATIONS |= {
    "start_loading: one row too many": Mutation(
        "forward", "row < count", "row <= count", OUTSIDE.format("[012]"), (COPY,)
    ),
    "start_loading: one chunk too many": Mutation(
        "forward",
        "i < rows * chunks",
        "i <= rows * chunks",
        OTHERS,
        (COPY,),
    ),
    "start_loading: one row too few": Mutation(
        "forward",
        "i < rows * chunks",
        "i < (rows - 1) * chunks",
        "reads shared memory that nobody has written",
        PRODUCTS["float32"][1:],
    ),
    "store: one row too many": Mutation(
        "forward", "if (r < count)", "if (r <= count)", OTHER_BLOCK + OUTSIDE.format(3), (OUT,)
    ),
    "store: one chunk too many": Mutation(
        "forward", "i < WARP_ROWS * chunks", "i <= WARP_ROWS * chunks", RACE, (OUT, PAIRS[0])
    ),
    "backward_keys: one number of a tile of L, D and R too many": Mutation(
        "backward_keys",
        "i < Br; i += blockDim.x",
        "i <= Br; i += blockDim.x",
        OTHERS,
        (COPY_L, COPY_D, COPY_R),
    ),
    "row_dots: one row too many": Mutation(
        "row_dots", "if (row >= rows)", "if (row > rows)", OUTSIDE.format("[01]"), ("sum += float(dO[c])",)
    ),
    "row_dots: one column too many": Mutation(
        "row_dots", "c < d; c += WARP", "c <= d; c += WARP", OUTSIDE.format("[01]"), ("sum += float(dO[c])",)
    ),
    "float32 A B^T: one column too many": Mutation(
        "backward_queries",
        "c < d; c += 4",
        "c <= d; c += 4",
        OTHERS,
        (COPY, "const float4 b ="),
    ),
    "float16 A B^T: one column too many": Mutation(
        "backward_queries",
        "c < d; c += 16",
        "c <= d; c += 16",
        OTHERS,
        (COPY, "load_matrices(b,"),
        "float16",
    ),
    "float32 P B: one row of B too many": Mutation(
        "forward",
        "t < 4; ++t",
        "t <= 4; ++t",
        OTHERS,
        (COPY, "const float2 b ="),
    ),
    "the length of a sequence that is not there": Mutation(
        "forward", "lengths[batch]", "lengths[batch + 1]", OUTSIDE.format(5), ("length = max(0, min(lengths",)
    ),
    "forward: loads the next tile's keys": Mutation(
        "forward", "K + j * Bc * p.K.row", "K + (j + 1) * Bc * p.K.row", OUTSIDE.format(1), (COPY,), d=128
    ),
    "backward_queries: loads the next tile's values": Mutation(
        "backward_queries",
        "V + j * Bc * p.V.row",
        "V + (j + 1) * Bc * p.V.row",
        OUTSIDE.format(3),
        (COPY,),
        "bfloat16",
        64,
    ),
}

# Other mistakes that people make.
MUTATIONS |= {
    "backward_keys: L and D in one place": Mutation(
        "backward_keys",
        "copy_async<4>(Di(step) + i,",
        "copy_async<4>(Li(step) + i,",
        FILLING + "|reads .* nobody has written",
        ("copy_async<4>(Li(step)", READS_D),
    ),
    "one buffer instead of two": Mutation(
        "forward",
        "(Br + j % 2 * 2 * Bc)",
        "(Br + 0 * j)",
        OTHERS,
        (COPY, *PRODUCTS["float32"][2:]),
    ),
    "warps share rows": Mutation(
        "forward",
        "threadIdx.x / WARP * WARP_ROWS;  // this",
        "threadIdx.x / WARP * (WARP_ROWS - 4);  // this",
        RACE,
        (*PRODUCTS["float32"][:2], *PAIRS, OUT, "L[i] = m[r]"),
    ),
    "a tile that starts in the middle of 16 bytes": Mutation(
        "forward", "Qi{(T*)shared}", "Qi{(T*)shared + 1}", "misaligned: cp.async of 16 bytes", (COPY,)
    ),
    "all blocks write the first tile": Mutation(
        "forward", "p.O.head + i0 * p.O.row", "p.O.head + 0 * p.O.row", OTHER_BLOCK[:-1], (OUT,)
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


def run(module, dtype: str, d: int, backward: bool) -> None:
    """99 queries and keys: a whole tile and a part of one, of two heads that share their keys."""
    rng, dtype = np.random.default_rng(0), DTYPES[dtype]
    q, k, v, g = (rng.standard_normal((1, heads, 99, d)).astype(dtype) for heads in (2, 1, 1, 2))
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
    text = mutation.planted()
    (tmp_path / SOURCE.name).write_text(text, encoding="utf-8")
    shutil.copy(SOURCE.with_name("ptx.cuh"), tmp_path)
    mutant = Module(tmp_path / SOURCE.name, backend="emulator", checked=True)
    with pytest.raises(KernelError) as caught:
        run(Mixed(mutant, mutation.kernel), mutation.dtype, mutation.d, mutation.kernel != "forward")
    lines, found = text.splitlines(), set()
    for report in caught.value.reports:
        assert re.search(mutation.message, report.text), caught.value
        for place in filter(None, (report.place, report.other_place)):
            line = lines[int(place.removeprefix("flash_attention.cu:")) - 1]
            found.add(next((words for words in mutation.lines if words in line), line.strip()))
    assert found == set(mutation.lines), caught.value


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_source_as_it_is_has_no_report(dtype):
    run(CLEAN, dtype, 32, backward=True)


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
        run(CLEAN, "float32", 32, kernel != "forward")
    change(99 * 1024)
    with pytest.raises(KernelError, match="bytes of shared memory a block.* the target card has 101,376"):
        run(CLEAN, "float32", 32, kernel != "forward")
