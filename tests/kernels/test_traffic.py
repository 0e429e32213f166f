"""The bytes that the emulator counts in global memory are those of the closed forms."""

from __future__ import annotations

import numpy as np
import pytest

import kernels
from kernels.flash_attention import SOURCE, kernel_name
from kernels.module import Module
from kernels.traffic import (
    NAIVE,
    flash_backward_bytes,
    flash_forward_bytes,
    naive_attention,
    naive_forward_bytes,
)

from . import emulated  # noqa: F401  (skips where there is no compiler)
from .attention import attention, case

FLASH = Module(SOURCE, backend="emulator", checked=True)
THREE = Module(SOURCE.with_name(NAIVE), backend="emulator", checked=True)


def counted(module: Module, names: list[str]) -> tuple[int, int]:
    counts = [module.kernel(name).counts for name in names]
    return sum(c.global_read_bytes for c in counts), sum(c.global_written_bytes for c in counts)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 64, 200, 256])
@pytest.mark.parametrize("dtype, d", [("float32", 64), ("float16", 64), ("float32", 128), ("bfloat16", 32)])
def test_flash_attention(dtype, d, n, causal):
    c = case(dtype, 1, 2, 2, n, n, d)
    itemsize = c.q.dtype.itemsize
    out, logsumexp = kernels.flash_attention(c.q, c.k, c.v, causal=causal, backend=FLASH)
    expected = flash_forward_bytes(2, n, d, itemsize, causal)
    assert counted(FLASH, [kernel_name("forward", dtype, d)]) == expected
    kernels.flash_attention_backward(c.g, c.q, c.k, c.v, out, logsumexp, causal=causal, backend=FLASH)
    names = [kernel_name(kernel, dtype, d) for kernel in ("row_dots", "backward_keys", "backward_queries")]
    assert counted(FLASH, names) == flash_backward_bytes(2, n, d, itemsize, causal)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_reads_of_shared_memory_do_not_meet_in_a_bank(dtype):
    """Without swizzling each read of a column of a tile would take 8 passes, 7 of them conflicts.

    Not exactly none: the emulator finds what a warp did at once by the order of the code, and in the last
    loop of `store` it may split or mix a few accesses.
    """
    for d in (32, 64, 96, 128):
        c = case(dtype, 1, 1, 1, 128, 128, d)
        out, logsumexp = kernels.flash_attention(c.q, c.k, c.v, backend=FLASH)
        kernels.flash_attention_backward(c.g, c.q, c.k, c.v, out, logsumexp, backend=FLASH)
        for kernel in ("forward", "backward_keys", "backward_queries"):
            counts = FLASH.kernel(kernel_name(kernel, dtype, d)).counts
            assert counts.shared_read_conflicts <= 0.05 * counts.shared_read_requests, (kernel, d)


def test_tiles_that_a_mask_empties_are_not_read():
    """A window of 64 keys at any length: each tile of 64 queries reads up to four tiles of 32 keys."""
    n, row = 1024, 64 * 4
    c = case("float32", 1, 1, 1, n, n, 64)
    kernels.flash_attention(c.q, c.k, c.v, causal=True, window=64, backend=FLASH)
    read, _ = counted(FLASH, [kernel_name("forward", "float32", 64)])
    assert read == row * (n + 2 * (64 + 15 * 128))
    lengths = np.array([100], np.int32)  # and of 100 keys in 1024, four tiles; each thread reads the length
    kernels.flash_attention(c.q, c.k, c.v, key_lengths=lengths, backend=FLASH)
    read, _ = counted(FLASH, [kernel_name("forward", "float32", 64)])
    assert read == row * (n + 2 * 128 * n // 64) + n // 64 * 128 * 4


def test_the_naive_way():
    c = case("float32", 1, 2, 2, 96, 96, 64)
    found = naive_attention(c.q[0], c.k[0], c.v[0], THREE)
    np.testing.assert_allclose(found, attention(c, np.float64)[0][0], rtol=0, atol=1e-6)
    assert counted(THREE, ["scores", "softmax", "output"]) == naive_forward_bytes(2, 96, 64)


def test_the_naive_way_at_any_length():
    c = case("float32", 1, 1, 1, 45, 77, 40)
    found = naive_attention(c.q[0], c.k[0], c.v[0], THREE)
    np.testing.assert_allclose(found, attention(c, np.float64)[0][0], rtol=0, atol=1e-6)
