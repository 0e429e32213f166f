"""flash_attention.cu as the compiler for cards sees it, without a card: all variants, and no spills.

pytest tests/kernels/test_compile.py -s        prints the table from which the tile sizes were chosen
"""

from __future__ import annotations

import inspect
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernels.flash_attention import HEAD_DIMS, SOURCE, TILES, block_shape, kernel_name
from kernels.module import header_folders, inlined, nvrtc_options

try:
    from cupy.cuda import compiler as CUPY
    from cupy.cuda import nvrtc as NVRTC
except Exception as error:
    pytest.skip(f"needs CuPy, which brings the way to NVRTC: {error}", allow_module_level=True)

KERNELS = ("forward", "row_dots", "backward_keys", "backward_queries")
TYPES = ("float32", "float16", "bfloat16")
SHARED_OF_A_BLOCK, SHARED_OF_AN_SM, KEPT_BY_THE_SYSTEM = 99 * 1024, 100 * 1024, 1024  # bytes, on sm_86
REGISTERS_OF_AN_SM, WARPS_OF_AN_SM = 65536, 48
OF_CUPY = ("--device-as-default-execution-space", "-ftz=true")  # what RawModule adds to our options


def nvrtc() -> None:
    """Skip where NVRTC or CUDA's headers are missing."""
    try:
        NVRTC.getVersion()
    except Exception as error:  # no libnvrtc to load
        pytest.skip(f"needs NVRTC, pip install nvidia-cuda-nvrtc-cu12: {error}")
    if not header_folders():
        pytest.skip("needs CUDA's headers, pip install nvidia-cuda-runtime-cu12")


def compile_for(arch: str, names: list[str]) -> dict[str, tuple[int, int]]:
    """The registers and the bytes spilled of each kernel, by its name."""
    program = NVRTC.createProgram(inlined(SOURCE), "flash_attention.cu", [], [])
    for name in names:
        NVRTC.addNameExpression(program, name)
    options = (*nvrtc_options({}), *OF_CUPY, f"-arch={arch}", "--ptxas-options=-v")
    try:
        NVRTC.compileProgram(program, options)
    except NVRTC.NVRTCError:
        pytest.fail(NVRTC.getProgramLog(program))
    log, lowered = NVRTC.getProgramLog(program), {NVRTC.getLoweredName(program, name): name for name in names}
    NVRTC.destroyProgram(program)
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+)"
    found = re.findall(pattern, log, re.DOTALL)
    return {lowered[symbol]: (int(used), int(stored) + int(loaded)) for symbol, stored, loaded, used in found}


def compile_all(arch: str) -> dict[tuple[str, str, int], tuple[int, int]]:
    nvrtc()
    keys = [(kernel, dtype, d) for kernel in KERNELS for dtype in TYPES for d in HEAD_DIMS]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda key: compile_for(arch, [kernel_name(*key)]), keys)
        return {key: result[kernel_name(*key)] for key, result in zip(keys, results)}


def blocks_of_an_sm(threads: int, shared: int, registers: int) -> int:
    """How many blocks fit at once on an SM of sm_86. Registers are given out to warps in units of 256."""
    warps = threads // 32
    by_registers = REGISTERS_OF_AN_SM // (warps * -(-registers * 32 // 256) * 256)
    return min(by_registers, SHARED_OF_AN_SM // (shared + KEPT_BY_THE_SYSTEM), WARPS_OF_AN_SM // warps)


def fits(kernel: str, dtype: str, d: int, registers: int, spilled: int) -> str:
    """The kernel's row of the table, once it is seen that no register is spilled and that it fits an SM."""
    threads, shared = block_shape(kernel, dtype, d)
    blocks = blocks_of_an_sm(threads, shared, registers)
    assert spilled == 0, f"{kernel_name(kernel, dtype, d)} spills {spilled} bytes"
    assert shared <= SHARED_OF_A_BLOCK
    assert blocks >= 1
    Br, Bc = TILES[kernel][4 if dtype == "float32" else 2][d] if kernel in TILES else ("", "")
    return (
        f"{kernel:17} {dtype:9} {d:3}  {Br:3}  {Bc:3}  {threads:7}  {registers:9}  {shared / 1024:9.2f}  "
        f"{blocks:6}  {blocks * threads // 32:14}"
    )


def test_the_options_are_those_of_cupy():
    source = inspect.getsource(CUPY)
    assert all(f"'{option}'" in source for option in OF_CUPY)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_spills_on_the_target_card(kernel):
    nvrtc()
    for dtype in ("float32", "float16"):
        name = kernel_name(kernel, dtype, 64)
        fits(kernel, dtype, 64, *compile_for("sm_86", [name])[name])


@pytest.mark.slow
def test_no_variant_spills_on_the_target_card():
    print("\nkernel            type       d   Br   Bc  threads  registers  shared KB  blocks  warps of an SM")
    for key, (registers, spilled) in compile_all("sm_86").items():
        print(fits(*key, registers, spilled))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_other_cards_take_all_variants(arch):
    assert len(compile_all(arch)) == len(KERNELS) * len(TYPES) * len(HEAD_DIMS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_older_cards_take_float32(kernel):
    """Below sm_80 there are no asynchronous copies; tiles then pass through registers."""
    nvrtc()
    name = kernel_name(kernel, "float32", 64)
    assert name in compile_for("sm_75", [name])
