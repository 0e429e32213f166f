"""The checked build: each kind of mistake is found at its line, right kernels pass, counts are exact."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kernels
from kernels.module import KernelError, Module

from . import emulated
from .emulated import kernel
from .test_emulator import FIBRES, KERNELS, REDUCTIONS

emulated.checks()


def floats(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@dataclass
class Wrong:
    """A wrong kernel: the message, and in its text the line `// here`, the other thread's `// there`."""

    message: str
    text: str
    args: list[Any] = field(default_factory=lambda: [floats(64), floats(64)])
    grid: int = 1
    block: int = 64
    shared_bytes: int = 0


WRONG = {
    "reads beyond an array": Wrong(
        r"out of bounds: reads 4 bytes at byte 256 of argument 0, which has 256; thread \(64, 0, 0\)",
        """
__global__ void test(const float* x, float* y) {
    const int i = threadIdx.x;
    y[i] = x[i];  // here
}""",
        args=[floats(64), floats(65)],
        block=65,
    ),
    "writes before an array": Wrong(
        r"out of bounds: writes 4 bytes at byte -4 of argument 1, which has 256; thread \(0, 0, 0\)",
        """
__global__ void test(const float* x, float* y) {
    y[(int)threadIdx.x - 1] = x[threadIdx.x];  // here
}""",
    ),
    "reads at a null pointer": Wrong(
        "out of bounds: reads 4 bytes at address 0x8",
        """
__global__ void test(const float* x, float* y) {
    y[0] = x[2];  // here
}""",
        args=[None, floats(64)],
        block=1,
    ),
    "half of a vector is outside": Wrong(
        "out of bounds: reads 16 bytes at byte 240 of argument 0, which has 248",
        """
__global__ void test(const float* x, float* y) {
    *(float4*)y = *(const float4*)(x + 60);  // here
}""",
        args=[floats(62), floats(64)],
        block=1,
    ),
    "a struct reaches over the end": Wrong(
        "out of bounds: reads 16 bytes at byte 256 of argument 0, which has 256",
        """
struct Row { float x[12]; };
__global__ void test(const float* x, float* y) {
    *(Row*)y = *(const Row*)(x + 56);  // here
}""",
        block=1,
    ),
    "memcpy reaches over the end": Wrong(
        "out of bounds: reads 1 bytes at byte 256 of argument 0, which has 256",
        """
__global__ void test(const float* x, float* y) {
    memcpy(y, x + 56, 36);  // here
}""",
        block=1,
    ),
    "writes what it takes as const": Wrong(
        "writes argument 0, which the kernel takes as const",
        """
__global__ void test(const float* x, float* y) {
    ((float*)x)[0] = y[0];  // here
}""",
        block=1,
    ),
    "beyond extern shared memory": Wrong(
        "out of bounds: writes 4 bytes at byte 256 of the extern __shared__ memory, which has 256",
        """
extern __shared__ float tile[];
__global__ void test(const float* x, float* y) {
    tile[threadIdx.x + 1] = x[threadIdx.x];  // here
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}""",
        shared_bytes=256,
    ),
    "beyond a static shared array": Wrong(
        "out of bounds: writes 4 bytes beyond a __shared__ variable",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float tile[63];
    tile[threadIdx.x] = x[threadIdx.x];  // here
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x % 63];
}""",
    ),
    "a vector at an odd address": Wrong(
        "misaligned: reads 16 bytes at an address that is no multiple of 16",
        """
__global__ void test(const float* x, float* y) {
    ((float4*)y)[0] = *(const float4*)(x + 1);  // here
}""",
        block=1,
    ),
    "a view that starts at an odd address": Wrong(
        "misaligned: reads 8 bytes at an address that is no multiple of 8",
        """
__global__ void test(const float* x, float* y) {
    ((float2*)y)[0] = *(const float2*)x;  // here
}""",
        args=[floats(64)[3:], floats(64)],
        block=1,
    ),
    "no barrier between writing and reading": Wrong(
        r"race: reads shared memory that thread \d+ has written, with no barrier between",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];  // there
    if (threadIdx.x < 32) __syncwarp();
    y[threadIdx.x] = tile[63 - threadIdx.x];  // here
    __syncthreads();
}""",
    ),
    "no barrier before the next round writes": Wrong(
        r"race: writes shared memory that thread \d+ has read, with no barrier between",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float tile[64];
    for (int i = 0; i < 3; ++i) {
        tile[threadIdx.x] = x[threadIdx.x] + i;  // here
        __syncthreads();
        y[threadIdx.x] = tile[63 - threadIdx.x];  // there
    }
}""",
    ),
    "two threads write one word": Wrong(
        "race: writes shared memory that thread 0 has written, with no barrier between",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float tile[32];
    tile[threadIdx.x % 32] = x[threadIdx.x];  // here, there
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x % 32];
}""",
    ),
    "no __syncwarp": Wrong(
        r"race: reads shared memory that thread \d+ has written, with no barrier or __syncwarp\(\) between",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float tile[32];
    tile[threadIdx.x] = x[threadIdx.x];  // there
    const float sum = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 1);  // which orders no memory
    y[threadIdx.x] = sum + tile[31 - threadIdx.x];  // here
}""",
        block=32,
    ),
    "a __syncwarp of half the warp": Wrong(
        r"race: reads shared memory that thread 15 has written, with no barrier or __syncwarp\(\) between",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float tile[32];
    const int t = threadIdx.x;
    tile[t] = x[t];  // there
    __syncwarp(t < 16 ? 0xffff : 0xffff0000);
    y[t] = tile[t ^ 1];
    if (t == 16) y[t] = tile[15];  // here
    __syncwarp();
}""",
        block=32,
    ),
    "nobody has written": Wrong(
        "reads shared memory that nobody has written",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float tile[65];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x + 1];  // here
}""",
    ),
    "written by the block before": Wrong(
        r"reads shared memory that nobody has written; thread \(0, 0, 0\) of block",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float tile[1];
    if (blockIdx.x == 0) tile[0] = x[0];
    __syncthreads();
    y[blockIdx.x] = tile[0];  // here
}""",
        grid=64,
        block=1,
    ),
    "half of a word was written": Wrong(
        "reads shared memory that nobody has written",
        """
__global__ void test(const float* x, float* y) {
    __shared__ alignas(4) __half tile[2];
    tile[1] = __float2half(x[0]);
    y[0] = __low2float(*(__half2*)tile);  // here
}""",
        block=1,
    ),
    "cp.async without a wait": Wrong(
        r"reads shared memory that a cp.async of thread \d+ is still filling",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float4 tile[16];
    emulator::cp_async(&tile[threadIdx.x], x + 4 * threadIdx.x, 16, 16);  // there
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x].y;  // here
}""",
        block=16,
    ),
    "cp.async with a wait for the group before": Wrong(
        r"reads shared memory that a cp.async of thread \d+ is still filling",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float4 tile[2][8];
    for (int stage = 0; stage < 2; ++stage) {
        emulator::cp_async(&tile[stage][threadIdx.x], x + 32 * stage + 4 * threadIdx.x, 16, 16);  // there
        emulator::cp_async_commit();
    }
    emulator::cp_async_wait(1);
    __syncthreads();
    y[threadIdx.x] = tile[0][threadIdx.x].y +
                     tile[1][threadIdx.x].y;  // here
}""",
        block=8,
    ),
    "cp.async without a barrier after the wait": Wrong(
        r"race: reads shared memory that thread \d+ has written, with no barrier or __syncwarp\(\) between",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float4 tile[16];
    emulator::cp_async(&tile[threadIdx.x], x + 4 * threadIdx.x, 16, 16);  // there
    emulator::cp_async_wait_all();
    y[threadIdx.x] = tile[15 - threadIdx.x].y;  // here
}""",
        block=16,
    ),
    "cp.async into what others still read": Wrong(
        r"race: cp.async writes shared memory that thread \d+ has read, with no barrier between",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float4 tile[64];
    tile[threadIdx.x] = make_float4(1, 2, 3, 4);
    __syncthreads();
    y[threadIdx.x] = tile[63 - threadIdx.x].y;  // there
    emulator::cp_async(&tile[threadIdx.x], x, 16, 16);  // here
    emulator::cp_async_wait_all();
}""",
    ),
    "cp.async beyond an array": Wrong(
        "out of bounds: cp.async reads 16 bytes at byte 256 of argument 0, which has 256",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float4 tile[17];
    emulator::cp_async(&tile[threadIdx.x], x + 4 * threadIdx.x, 16, 16);  // here
    emulator::cp_async_wait_all();
}""",
        block=17,
    ),
    "different barriers": Wrong(
        r"barrier divergence: waits in __syncthreads\(\), and thread 32 in another",
        """
__global__ void test(const float* x, float* y) {
    if (threadIdx.x < 32) __syncthreads();  // here
    else
        __syncthreads();  // there
}""",
    ),
    "a barrier that some never reach": Wrong(
        r"barrier divergence: waits in __syncthreads\(\), and thread 60 has left the kernel",
        """
__global__ void test(const float* x, float* y) {
    if (threadIdx.x >= 60) return;
    __syncthreads();  // here
    y[threadIdx.x] = x[threadIdx.x];
}""",
    ),
    "two blocks write one word": Wrong(
        r"race: writes global memory that block \d has written",
        """
__global__ void test(const float* x, float* y) {
    y[blockIdx.x * 48 + threadIdx.x] = x[threadIdx.x];  // here, there
}""",
        args=[floats(64), floats(200)],
        grid=3,
    ),
    "a block reads what another writes": Wrong(
        r"race: (reads global memory that block \d+ writes|writes global memory that another block reads)",
        """
__global__ void test(const float* x, float* y) {
    y[(blockIdx.x * 64 + threadIdx.x)] = y[(blockIdx.x * 64 + threadIdx.x + 1) % 6400];  // here, there
}""",
        args=[floats(64), floats(6400)],
        grid=100,
    ),
    "threads of a block meet in global memory": Wrong(
        r"race: reads global memory that thread \d+ has written, with no barrier between",
        """
__global__ void test(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x];  // there
    if (threadIdx.x < 32) __syncwarp();
    if (y[63 - threadIdx.x] < 0)  // here
        y[threadIdx.x] = 0;
}""",
    ),
    "an atomic and a plain write": Wrong(
        "race: atomically changes shared memory that thread 0 has written, with no barrier between",
        """
__global__ void test(const float* x, float* y) {
    __shared__ float sum;
    if (threadIdx.x == 0) sum = 0;  // there
    if (threadIdx.x >= 32) atomicAdd(&sum, x[threadIdx.x]);  // here
    __syncthreads();
    y[threadIdx.x] = sum;
}""",
    ),
    "another thread's variable": Wrong(
        "out of bounds: reads 4 bytes of another thread's local memory",
        """
__global__ void test(const float* x, float* y) {
    __shared__ const volatile float* pointer;
    volatile float mine = x[threadIdx.x];
    if (threadIdx.x == 0) pointer = &mine;
    __syncthreads();
    y[threadIdx.x] = *pointer;  // here
}""",
    ),
    "ldmatrix without a __syncwarp": Wrong(
        r"race: ldmatrix reads shared memory that thread \d+ has written, with no barrier or __syncwarp\(\)",
        """
__global__ void test(const float* x, float* y) {
    __shared__ alignas(16) uint32_t tile[32][4];
    for (int i = 0; i < 4; ++i) tile[threadIdx.x][i] = i;  // there
    uint32_t registers[4];
    emulator::ldmatrix<4>(registers, tile[threadIdx.x]);  // here
    y[threadIdx.x] = registers[0];
}""",
        block=32,
    ),
    "ldmatrix of a row that is not there": Wrong(
        "out of bounds: ldmatrix reads 16 bytes at byte 512 of the extern __shared__ memory, which has 512",
        """
extern __shared__ uint4 tile[];
__global__ void test(const float* x, float* y) {
    tile[threadIdx.x] = make_uint4(1, 2, 3, 4);
    __syncthreads();
    uint32_t registers[4];
    emulator::ldmatrix<4>(registers, &tile[threadIdx.x + 1]);  // here
    y[threadIdx.x] = registers[0];
}""",
        block=32,
        shared_bytes=512,
    ),
    "ldmatrix of a row at an odd address": Wrong(
        "misaligned: ldmatrix at a row that does not start at a multiple of 16 bytes",
        """
__global__ void test(const float* x, float* y) {
    __shared__ alignas(16) uint32_t tile[32 * 4 + 2];
    for (int i = threadIdx.x; i < 32 * 4 + 2; i += 32) tile[i] = i;
    __syncthreads();
    uint32_t registers[4];
    emulator::ldmatrix<4>(registers, &tile[threadIdx.x * 4 + 2]);  // here
    y[threadIdx.x] = registers[0];
}""",
        block=32,
    ),
    "mma of half a warp": Wrong(
        "mma needs all 32 lanes of the warp, and only 16 came",
        """
__global__ void test(const float* x, float* y) {
    if (threadIdx.x >= 16) return;
    const uint32_t a[4] = {}, b[2] = {};
    const float c[4] = {};
    float d[4];
    emulator::mma_m16n8k16<__half>(d, a, b, c);  // here
    y[threadIdx.x] = d[0];
}""",
        block=32,
    ),
    "a shuffle from a lane that takes no part": Wrong(
        "a shuffle reads lane 16, which takes no part",
        """
__global__ void test(const float* x, float* y) {
    if (threadIdx.x < 16)
        y[threadIdx.x] = __shfl_down_sync(0xffff, x[threadIdx.x], 1);  // here
}""",
        block=32,
    ),
    "lanes in different operations": Wrong(
        r"a warp is divided: thread 31 is in __syncwarp\(\) with mask ffffffff, thread 0 in a vote",
        """
__global__ void test(const float* x, float* y) {
    if (threadIdx.x < 16) y[threadIdx.x] = __any_sync(0xffffffff, 1);
    else
        __syncwarp();  // here
}""",
        block=32,
    ),
}


def marked(text: str, mark: str) -> str:
    comments = [re.findall(r"\w+", line.partition("//")[2]) for line in text.splitlines()]
    return next((f"test.cu:{i}" for i, words in enumerate(comments, 1) if mark in words), "")


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_found_at_their_line(tmp_path, name):
    wrong = WRONG[name]
    test = kernel(tmp_path, wrong.text, checked=True)
    with pytest.raises(KernelError, match=wrong.message) as caught:
        test(wrong.grid, wrong.block, wrong.args, shared_bytes=wrong.shared_bytes)
    # A race is found from both sides, where threads come in both orders.
    here, there = marked(wrong.text, "here"), marked(wrong.text, "there")
    places = [(report.place, report.other_place) for report in caught.value.reports]
    assert (here, there) in places, str(caught.value)
    assert set(places) <= {(here, there), (there, here)}, str(caught.value)
    assert len(str(caught.value).splitlines()) == len(caught.value.reports)


def test_arrays_stay_as_they_were_when_a_kernel_is_wrong(tmp_path):
    wrong = WRONG["reads beyond an array"]
    y = floats(64)
    with pytest.raises(KernelError):
        kernel(tmp_path, wrong.text, checked=True)(1, 65, [floats(64) + 1, y])
    np.testing.assert_array_equal(y, floats(64))


def test_the_place_in_an_included_file_is_that_of_the_call(tmp_path):
    (tmp_path / "part.cuh").write_text("__device__ inline float load(const float* x) {\n    return *x;\n}\n")
    text = (
        '#include "part.cuh"\n__global__ void test(const float* x, float* y) {\n\n    *y = load(x + 70);\n}\n'
    )
    with pytest.raises(KernelError, match="^test.cu:4: out of bounds: reads 4 bytes at byte 280"):
        kernel(tmp_path, text, checked=True)(1, 1, [floats(64), floats(1)])


def test_more_shared_memory_than_the_card_has(tmp_path):
    text = "extern __shared__ float tile[];\n__global__ void test() { tile[threadIdx.x] = 0; }"
    test = kernel(tmp_path, text, checked=True)
    test(1, 32, [], shared_bytes=99 * 1024)
    with pytest.raises(
        KernelError, match="101,380 bytes of shared memory a block.*the target card has 101,376"
    ):
        test(1, 32, [], shared_bytes=99 * 1024 + 4)


# ---- right kernels ----


def test_right_kernels_are_left_alone(tmp_path):
    x, n = floats(1000), np.int32(1000)
    vector_add = Module(KERNELS / "vector_add.cu", backend="emulator", checked=True).kernel("vector_add")
    out = np.zeros(1000, np.float32)
    vector_add(8, 128, [x, x, out, n])
    np.testing.assert_array_equal(out, 2 * x)
    sums, total = np.zeros(4, np.float32), np.zeros(1, np.float32)
    kernel(tmp_path, REDUCTIONS, "tree<256>", checked=True)(4, 256, [x, sums, n])
    kernel(tmp_path, REDUCTIONS, "shuffled", checked=True)(3, 128, [x, total, n], shared_bytes=16)
    assert sums.sum() == total[0] == x.sum()
    fibres = kernel(tmp_path, FIBRES, checked=True)
    fibres(3, 1024, [np.zeros((3, 5, 1024), np.int32)], shared_bytes=4096)


RIGHT = """
__constant__ float table[4] = {1, 2, 3, 4};
__global__ void test(const float4* in, float* out, __half* halves, int* counts, float* in_place) {
    __shared__ float4 tile[2][64];
    __shared__ __half pairs[128];
    __shared__ int total, bins[8];
    const int t = threadIdx.x;

    // two buffers, one filled while the other is read; everyone waits once a round
    emulator::cp_async(&tile[0][t], &in[t], 16, 16);
    float sum = 0;
    for (int i = 0; i < 4; ++i) {
        emulator::cp_async_wait_all();
        __syncthreads();
        if (i < 3) emulator::cp_async(&tile[(i + 1) % 2][t], &in[(i + 1) * 64 + t], 16, i == 1 ? 8 : 16);
        sum += tile[i % 2][63 - t].x + tile[i % 2][t ^ 5].w * table[i];
    }

    // neighbours write one word; they read it after a __syncwarp
    pairs[t] = __float2half(sum), pairs[64 + t] = __float2half(-sum);
    __syncwarp();
    sum += __half2float(pairs[t ^ 1]) + __low2float(*(__half2*)&pairs[64 + (t & ~1)]);
    halves[blockIdx.x * 65 + t] = pairs[t];  // blocks share words, no halves
    if (t == 0) halves[blockIdx.x * 65 + 64] = __half(1);

    // half a warp after the other, and what both know when all have met
    __shared__ float chain[64];
    const unsigned half = 0xffffu << (t % 32 / 16 * 16);
    chain[t] = sum;
    __syncwarp(half);
    sum += chain[t ^ 1];
    __syncwarp();
    sum += chain[t ^ 16];

    if (t == 0) total = 0;
    if (t < 8) bins[t] = 0;
    __syncthreads();
    atomicAdd(&total, 1), atomicAdd(&bins[t % 8], 1), atomicAdd(&counts[t % 3], 1);
    __syncthreads();
    out[blockIdx.x * 64 + t] = sum + total + bins[t % 8];
    in_place[blockIdx.x * 64 + t] += 1;
    float copy[8];
    memcpy(copy, in, sizeof copy);
    if (copy[t % 8] < 0) out[0] = 0;
}
"""


def test_a_right_kernel_with_everything_in_it(tmp_path):
    test = kernel(tmp_path, RIGHT, checked=True)
    counts, halves, in_place = np.zeros(3, np.int32), np.zeros(6 * 65, np.float16), floats(6 * 64)
    for _ in range(3):
        test(6, 64, [floats(4, 64, 4), np.zeros(6 * 64, np.float32), halves, counts, in_place])
    assert counts.sum() == 3 * 6 * 64
    np.testing.assert_array_equal(in_place, floats(6 * 64) + 3)


# ---- counts ----


def counted(folder: Path, body: str, args: list[Any], grid: int = 1, block: int = 32, shared_bytes: int = 0):
    text = f"extern __shared__ float4 shared[];\n__global__ void test(float* x, float* y) {{\n{body}\n}}"
    test = kernel(folder, text, checked=True)
    test(grid, block, args, shared_bytes=shared_bytes)
    return test.counts


def test_counts_of_vector_add():
    n = 1000
    x, out = floats(n), np.zeros(n, np.float32)
    vector_add = Module(KERNELS / "vector_add.cu", backend="emulator", checked=True).kernel("vector_add")
    vector_add(8, 128, [x, x, out, np.int32(n)])
    counts = vector_add.counts
    assert (counts.global_read_bytes, counts.global_written_bytes) == (8 * n, 4 * n)
    assert (counts.global_read_requests, counts.global_written_requests) == (64, 32)
    assert (counts.global_read_sectors, counts.global_written_sectors) == (2 * n * 4 // 32, n * 4 // 32)
    assert counts.shared_read_requests == counts.shared_written_requests == 0
    with pytest.raises(AttributeError, match="checked=True"):
        _ = Module(KERNELS / "vector_add.cu", backend="emulator").kernel("vector_add").counts


@pytest.mark.parametrize(
    "index, sectors",
    [("t", 4), ("t * 2", 8), ("t * 8", 32), ("0", 1), ("t + 1", 5), ("31 - t", 4), ("t / 4 * 8 + t % 4", 8)],
)
def test_sectors(tmp_path, index, sectors):
    body = (
        f"const int t = threadIdx.x; y[{index}] = x[{index}];"
        if index != "0"
        else "if (x[0] < 0) y[threadIdx.x] = 0;"
    )
    counts = counted(tmp_path, body, [floats(256), floats(256)])
    assert (counts.global_read_requests, counts.global_read_sectors) == (1, sectors)
    if index != "0":
        assert (counts.global_written_bytes, counts.global_written_sectors) == (128, sectors)


@pytest.mark.parametrize(
    "index, conflicts",
    [
        ("t", 0),
        ("t * 2", 1),
        ("t * 32", 31),
        ("t * 33", 0),
        ("0", 0),
        ("t * 4", 3),
        ("t / 2", 0),
        ("t ^ 21", 0),
    ],
)
def test_bank_conflicts_of_words(tmp_path, index, conflicts):
    body = f"""
    const int t = threadIdx.x;
    float* tile = (float*)shared;
    for (int i = t; i < 1056; i += 32) tile[i] = 0;  // 33 requests without a conflict
    __syncthreads();
    y[t] = tile[{index}];
"""
    counts = counted(tmp_path, body, [floats(32), floats(32)], shared_bytes=4224)
    assert (counts.shared_written_requests, counts.shared_written_conflicts) == (33, 0)
    assert (counts.shared_read_requests, counts.shared_read_conflicts) == (1, conflicts)


@pytest.mark.parametrize(
    "index, conflicts", [("t", 0), ("t * 2", 4), ("t * 8", 28), ("t / 8", 0), ("t ^ t / 8", 0)]
)
def test_bank_conflicts_of_vectors(tmp_path, index, conflicts):
    """A quarter of a warp reads 8 times 16 bytes at once: 4 passes are what the width needs."""
    body = f"""
    const int t = threadIdx.x;
    for (int i = t; i < 256; i += 32) shared[i] = make_float4(0, 0, 0, 0);
    __syncthreads();
    ((float4*)y)[t] = shared[{index}];
"""
    counts = counted(tmp_path, body, [floats(32), floats(128)], shared_bytes=4096)
    assert (counts.shared_read_requests, counts.shared_read_conflicts) == (1, conflicts)
    assert (counts.global_written_bytes, counts.global_written_sectors) == (512, 16)


@pytest.mark.parametrize("width, conflicts", [(8, 0), (16, 4), (32, 12), (40, 0), (64, 28)])
def test_bank_conflicts_of_ldmatrix(tmp_path, width, conflicts):
    """Rows of `width` halves: 8 rows are read at once, and those 128 bytes apart fight for the same banks."""
    body = f"""
    const int t = threadIdx.x;
    for (int i = t; i < 32 * {width} / 8; i += 32) shared[i] = make_float4(0, 0, 0, 0);
    __syncthreads();
    uint32_t registers[4];
    emulator::ldmatrix<4>(registers, (__half*)shared + t * {width});
    y[t] = registers[0];
"""
    counts = counted(tmp_path, body, [floats(32), floats(32)], shared_bytes=64 * width)
    assert (counts.shared_read_requests, counts.shared_read_conflicts) == (1, conflicts)


def test_counts_of_many_blocks_cp_async_and_atomics(tmp_path):
    body = """
    const int t = threadIdx.x;
    for (int i = 0; i < 300; ++i) {  // longer than the log of a lane
        emulator::cp_async(&shared[t], x + 4 * t, 16, t < 16 ? 16 : 4);
        emulator::cp_async_wait_all();
    }
    if (t < 10) atomicAdd(&y[t], shared[t].x);
"""
    counts = counted(tmp_path, body, [floats(128), floats(32)], grid=5, shared_bytes=512)
    assert counts.global_read_bytes == 5 * (300 * (16 * 16 + 16 * 4) + 40)
    assert counts.global_written_bytes == 5 * 40
    assert counts.shared_written_requests == 5 * 300
    assert counts.shared_read_requests == 5


@pytest.mark.slow
def test_flash_attention_is_checked_in_a_tenth_of_a_second():
    """heads x batch = 2, d = 64, N = 256, causal, on two cores; in their time, as the machine may be busy."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 256, 64)).astype(np.float32)
    module = Module(KERNELS / "flash_attention.cu", backend="emulator", checked=True)
    took = []
    for _ in range(6):
        start = time.process_time()
        kernels.flash_attention(q, k, v, causal=True, backend=module)
        took.append(time.process_time() - start)
    assert min(took) < 2 * 0.1
