"""The emulator: every word of CUDA it knows, against NumPy and a plain reading of the PTX tables."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from kernels.emulator import build
from kernels.emulator.build import EmulatorUnavailable
from kernels.module import KernelError, Module

from .emulated import kernel

KERNELS = Path(__file__).parent.parent.parent / "kernels"


# ---- first examples ----


@pytest.mark.parametrize("n", [1, 127, 128, 1000])
def test_vector_add(n):
    a, b = np.random.default_rng(n).standard_normal((2, n)).astype(np.float32)
    out = np.zeros(n, np.float32)
    vector_add = Module(KERNELS / "vector_add.cu", backend="emulator").kernel("vector_add")
    vector_add(-(-n // 128), 128, [a, b, out, np.int32(n)])
    np.testing.assert_array_equal(out, a + b)


REDUCTIONS = """
template <int threads>
__global__ void tree(const float* x, float* sums, int n) {
    __shared__ float part[threads];
    const int t = threadIdx.x, i = blockIdx.x * threads + t;
    part[t] = i < n ? x[i] : 0;
    for (int half = threads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) part[t] += part[t + half];
    }
    if (t == 0) sums[blockIdx.x] = part[0];
}
__global__ void shuffled(const float* x, float* total, int n) {
    extern __shared__ float part[];
    float sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_down_sync(0xffffffff, sum, lane);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        if (threadIdx.x == 0) atomicAdd(total, sum);
    }
}
"""


def test_reductions(tmp_path):
    x = np.random.default_rng(0).integers(-9, 9, 10_000).astype(np.float32)  # sums are exact
    sums, total = np.zeros(40, np.float32), np.zeros(1, np.float32)
    kernel(tmp_path, REDUCTIONS, "tree<256>")(40, 256, [x, sums, np.int32(x.size)])
    np.testing.assert_array_equal(sums, np.pad(x, (0, 240)).reshape(40, 256).sum(1))
    kernel(tmp_path, REDUCTIONS, "shuffled")(7, 128, [x, total, np.int32(x.size)], shared_bytes=16)
    assert total[0] == x.sum()


def test_every_thread_of_every_block_runs_once_and_knows_its_place(tmp_path):
    text = """
__global__ void test(int* seen, int* places) {
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    atomicAdd(&seen[block * threads + thread], 1);
    int* place = places + (block * threads + thread) * 6;
    place[0] = blockIdx.x, place[1] = blockIdx.y, place[2] = blockIdx.z;
    place[3] = threadIdx.x, place[4] = threadIdx.y, place[5] = threadIdx.z;
}
"""
    grid, block = (3, 4, 5), (7, 2, 3)
    seen, places = np.zeros(60 * 42, np.int32), np.zeros((60 * 42, 6), np.int32)
    kernel(tmp_path, text)(grid, block, [seen, places])
    assert (seen == 1).all()
    order = np.indices((*grid[::-1], *block[::-1])).reshape(6, -1)  # z y x of the block, of the thread
    np.testing.assert_array_equal(places, order[[2, 1, 0, 5, 4, 3]].T)


# ---- intrinsics ----

UNARY = {  # of x in (0.1, 4)
    "__expf(x)": np.exp,
    "expf(x)": np.exp,
    "exp2f(x)": np.exp2,
    "__exp10f(x)": lambda x: 10**x,
    "__logf(x)": np.log,
    "__log2f(x)": np.log2,
    "__log10f(x)": np.log10,
    "rsqrtf(x)": lambda x: 1 / np.sqrt(x),
    "__frsqrt_rn(x)": lambda x: 1 / np.sqrt(x),
    "(float)rsqrt((double)x)": lambda x: 1 / np.sqrt(x),
    "__fsqrt_rn(x)": np.sqrt,
    "__frcp_rn(x)": lambda x: 1 / x,
    "__sinf(x)": np.sin,
    "__cosf(x)": np.cos,
    "__tanf(x)": np.tan,
    "tanhf(x)": np.tanh,
    "__saturatef(x - 1)": lambda x: np.clip(x - 1, 0, 1),
    "__ldg(&x)": lambda x: x,
    "fabsf(-x)": lambda x: x,
    "__int_as_float(__float_as_int(x))": lambda x: x,
    "__uint_as_float(__float_as_uint(x))": lambda x: x,
    "(float)__longlong_as_double(__double_as_longlong(x))": lambda x: x,
    "__float2int_rn(x * 2)": lambda x: np.rint(x * 2),
    "__float2int_rz(-x)": lambda x: np.trunc(-x),
    "__float2int_rd(-x)": lambda x: np.floor(-x),
    "__float2int_ru(-x)": lambda x: np.ceil(-x),
}
BINARY = {  # of x and y in (0.1, 4)
    "__powf(x, y)": np.power,
    "__fdividef(x, y)": np.divide,
    "__fdiv_rn(x, y)": np.divide,
    "__fadd_rn(x, y)": np.add,
    "__fsub_rn(x, y)": np.subtract,
    "__fmul_rn(x, y)": np.multiply,
    "fmaf(x, y, 1.5f)": lambda x, y: x * y + 1.5,
    "__fmaf_rn(x, y, -x)": lambda x, y: x * y - x,
    "fmaxf(x, y)": np.maximum,
    "fminf(x, y)": np.minimum,
    "max(x, y)": np.maximum,
    "min(x, y)": np.minimum,
    "max(NAN, x)": lambda x, y: x,
    "min(x, NAN)": lambda x, y: x,
}


def test_float_intrinsics(tmp_path):
    rows = [*UNARY, *BINARY]
    body = "\n".join(f"    out[{row} * n + i] = {expression};" for row, expression in enumerate(rows))
    text = f"""
__global__ void test(const float* xs, const float* ys, float* out, int n) {{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = xs[i], y = ys[i];
{body}
}}
"""
    x, y = np.random.default_rng(1).uniform(0.1, 4, (2, 1000)).astype(np.float32)
    out = np.zeros((len(rows), x.size), np.float32)
    kernel(tmp_path, text)(8, 128, [x, y, out, np.int32(x.size)])
    a, b = x.astype(np.float64), y.astype(np.float64)
    for expression, found in zip(rows, out):
        expected = UNARY[expression](a) if expression in UNARY else BINARY[expression](a, b)
        # 4 units in the last place; near a zero, where x - y and the like cancel, of a number near 1
        np.testing.assert_allclose(found, expected, rtol=5e-7, atol=5e-7, err_msg=expression)


INTEGERS = {
    "__popc(x)": lambda x, y: x.bit_count(),
    "__popcll((unsigned long long)x << 32 | y)": lambda x, y: x.bit_count() + y.bit_count(),
    "__clz(x)": lambda x, y: 32 - x.bit_length(),
    "__clzll(x)": lambda x, y: 64 - x.bit_length(),
    "__ffs(x)": lambda x, y: (x & -x).bit_length(),
    "__ffsll((long long)x << 20)": lambda x, y: (x & -x).bit_length() + 20 if x else 0,
    "__brev(x)": lambda x, y: int(f"{x:032b}"[::-1], 2),
    "__umulhi(x, y)": lambda x, y: x * y >> 32,
    "__mulhi((int)x, (int)y)": lambda x, y: signed(x) * signed(y) >> 32,
    "__byte_perm(x, y, 0x7531)": lambda x, y: pick(x, y, (1, 3, 5, 7)),
    "__byte_perm(x, y, 0x0462)": lambda x, y: pick(x, y, (2, 6, 4, 0)),
    "min(x, y)": min,
    "max((int)x, (int)y)": lambda x, y: max(signed(x), signed(y)),
    "min(x, 7)": lambda x, y: min(x, 7),
    "max((long long)x, 5ll)": lambda x, y: max(x, 5),
}


def signed(x: int) -> int:
    return x - (x >> 31 << 32)


def pick(x: int, y: int, places: tuple[int, ...]) -> int:
    found = (y << 32 | x).to_bytes(8, "little")
    return int.from_bytes(bytes(found[place] for place in places), "little")


def test_integer_intrinsics(tmp_path):
    body = "\n".join(f"    out[{row} * n + i] = {expression};" for row, expression in enumerate(INTEGERS))
    text = f"""
__global__ void test(const unsigned* xs, const unsigned* ys, unsigned* out, int n) {{
    const int i = threadIdx.x;
    const unsigned x = xs[i], y = ys[i];
{body}
}}
"""
    rng = np.random.default_rng(2)
    x, y = (rng.integers(0, 2**32, 256) >> rng.integers(0, 32, 256)).astype(np.uint32).reshape(2, 128)
    x[0] = y[1] = 0
    out = np.zeros((len(INTEGERS), 128), np.uint32)
    kernel(tmp_path, text)(1, 128, [x, y, out, np.int32(128)])
    for (expression, expected), row in zip(INTEGERS.items(), out):
        wanted = [expected(a, b) & 0xFFFFFFFF for a, b in zip(x.tolist(), y.tolist())]
        assert row.tolist() == wanted, expression


# ---- half and bfloat16 ----

SMALL = """
template <class T>
__global__ void decode(const T* in, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = (float)in[i];
}
template <class T, class Wide>
__global__ void encode(const Wide* in, T* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = T(in[i]);
}
template <class T>
__global__ void arithmetic(const T* x, const T* y, const T* z, T* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const T a = x[i], b = y[i], c = z[i];
    out[i] = __hadd(a, b), out[n + i] = a - b, out[2 * n + i] = __hmul(a, b), out[3 * n + i] = __hdiv(a, b);
    out[4 * n + i] = __hfma(a, b, c), out[5 * n + i] = __hmax(a, b), out[6 * n + i] = __hneg(a);
    out[7 * n + i] = __habs(a), out[8 * n + i] = hsqrt(__habs(a));
    out[9 * n + i] = T(__hlt(a, b) + 2 * __heq(a, b));
}
"""
FORMATS = {"__half": np.float16, "__nv_bfloat16": bfloat16}
EVERY = np.arange(2**16, dtype=np.uint16)


def between_neighbours(dtype) -> np.ndarray:
    """Float32 numbers where rounding is decided: those of the format, the middles between them, the float32
    numbers around both; and any."""
    values = EVERY.view(dtype).astype(np.float32)
    values = np.sort(values[np.isfinite(values)]).astype(np.float64)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)  # one bit more than the format: exact
    ends = np.array([65519.96, 65520, 3.39e38, np.inf, np.nan], np.float32)
    points, up = np.concatenate([values.astype(np.float32), middles, ends]), np.float32(np.inf)
    bits = np.random.default_rng(3).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    return np.concatenate([points, np.nextafter(points, up), np.nextafter(points, -up), bits])


def assert_same_bits(found: np.ndarray, expected: np.ndarray, message: str = "") -> None:
    """Equal bits; any NaN for a NaN."""
    nan = expected != expected
    np.testing.assert_array_equal(found != found, nan, message)
    kind = np.dtype(f"u{found.dtype.itemsize}")
    np.testing.assert_array_equal(found[~nan].view(kind), expected[~nan].view(kind), message)


@pytest.mark.parametrize("name", FORMATS)
def test_small_floats_round_as_numpy_does(tmp_path, name):
    dtype = FORMATS[name]
    decoded = np.zeros(2**16, np.float32)
    kernel(tmp_path, SMALL, f"decode<{name}>")(256, 256, [EVERY.view(dtype), decoded])
    assert_same_bits(decoded, EVERY.view(dtype).astype(np.float32))

    points = between_neighbours(dtype)
    found = np.zeros(points.size, dtype)
    blocks = -(-points.size // 256)
    kernel(tmp_path, SMALL, f"encode<{name}, float>")(blocks, 256, [points, found, np.int32(points.size)])
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(found, points.astype(dtype))

    if name == "__half":  # a double is rounded once, not to float first; ml_dtypes goes through float
        middles = points[np.isfinite(points)].astype(np.float64) * (1 + 2.0**-40)
        found = np.zeros(middles.size, dtype)
        kernel(tmp_path, SMALL, f"encode<{name}, double>")(
            -(-middles.size // 256), 256, [middles, found, np.int32(middles.size)]
        )
        with np.errstate(over="ignore"):
            assert_same_bits(found, middles.astype(dtype))


def rounded(value: Fraction, dtype) -> float:
    """The number of the format that is nearest; of two, the even one."""
    near = np.array(float(value)).astype(dtype)
    choices = [near, np.nextafter(near, dtype(np.inf)), np.nextafter(near, dtype(-np.inf))]
    choices = [c for c in choices if np.isfinite(c.astype(np.float64))]
    return float(min(choices, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.uint16)) & 1)))


@pytest.mark.parametrize("name", FORMATS)
def test_small_float_arithmetic(tmp_path, name):
    dtype, n = FORMATS[name], 2**14
    x, y, z = np.random.default_rng(4).integers(0, 2**16, (3, n), dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        near = (np.arange(n) % 2 == 0) & (np.abs(x.astype(np.float32)) < 1e3)
        z[near] = (-x[near] * y[near]).astype(dtype)  # where a x b + c cancels, its rounding shows
        out = np.zeros((10, n), dtype)
        kernel(tmp_path, SMALL, f"arithmetic<{name}>")(n // 256, 256, [x, y, z, out, np.int32(n)])
        a, b = x.astype(np.float32), y.astype(np.float32)
        comparison = (a < b) + 2 * (a == b).astype(np.float32)
        expected = [
            a + b,
            a - b,
            a * b,
            a / b,
            None,
            np.fmax(a, b),
            -a,
            np.abs(a),
            np.sqrt(np.abs(a)),
            comparison,
        ]
        for row, (found, wanted) in enumerate(zip(out, expected)):
            if wanted is not None:
                assert_same_bits(found, wanted.astype(dtype), f"row {row}")
    largest = float(np.finfo(dtype).max) if name == "__half" else 3e38
    for i in range(0, n, 7):
        a, b, c = (float(v[i]) for v in (x, y, z))
        if np.isfinite([a, b, c]).all() and abs(a * b + c) < largest:
            exact = Fraction(a) * Fraction(b) + Fraction(c)
            assert float(out[4, i]) == rounded(exact, dtype), (a, b, c)


def test_conversions_of_pairs(tmp_path):
    text = """
template <class T, class T2>
__device__ void pairs(float* out, T2 p, T2 q) {
    const T2 sum = __hadd2(p, q), product = __hmul2(p, q), fused = __hfma2(p, q, q);
    out[0] = __low2float(sum), out[1] = __high2float(sum);
    out[2] = __low2float(product), out[3] = __high2float(fused);
    out[4] = __low2float(__hmax2(p, q)), out[5] = __high2float(__hmin2(p, q));
}
__global__ void test(float* out) {
    const __half2 h = __floats2half2_rn(1.5f, -2.25f);
    pairs<__half>(out, h, __halves2half2(__float2half(4.0f), __int2half_rn(3)));
    const float2 back = __half22float2(h);
    out[6] = back.x, out[7] = back.y, out[8] = __half2float(__low2half(__half2half2(__high2half(h))));
    out[9] = __half_as_ushort(__float2half_rn(1.0f)), out[10] = __half2float(__ushort_as_half(0x3e00));
    const __nv_bfloat162 b = __floats2bfloat162_rn(1.5f, -2.25f);
    pairs<__nv_bfloat16>(out + 11, b, __halves2bfloat162(__float2bfloat16(4.0f), __float2bfloat16_rn(3.0f)));
    const float2 wide = __bfloat1622float2(__float22bfloat162_rn(make_float2(0.5f, 8.0f)));
    out[17] = wide.x, out[18] = wide.y;
    out[19] = __bfloat162float(__low2bfloat16(__bfloat162bfloat162(__high2bfloat16(b))));
    out[20] = __bfloat16_as_ushort(__float2bfloat16(1.0f)), out[21] = __half2int_rn(__float2half(2.5f));
    out[22] = sizeof(float4) + alignof(float4) + alignof(int2) + alignof(__half2) + sizeof(uchar4);
    union { unsigned word; __half2 pair; } low = {0x40003c00};  // 1 below, 2 above
    out[23] = __low2float(low.pair), out[24] = __high2float(low.pair);
}
"""
    out = np.zeros(25, np.float32)
    kernel(tmp_path, text)(1, 1, [out])
    pairs = [5.5, 0.75, 6, -3.75, 4, -2.25]
    assert out.tolist() == [
        *pairs, 1.5, -2.25, -2.25, 0x3C00, 1.5, *pairs, 0.5, 8, -2.25, 0x3F80, 2, 16 + 16 + 8 + 4 + 4, 1, 2
    ]  # fmt: skip


# ---- operations of a warp ----


@pytest.mark.parametrize("width", [32, 16, 8, 4])
def test_shuffles(tmp_path, width):
    text = """
__global__ void test(const float* x, const double* wide, float* out, double* wide_out) {
    const int t = threadIdx.x;
    for (int k = 0; k < 8; ++k) {
        out[(0 * 8 + k) * 64 + t] = __shfl_sync(0xffffffff, x[t], k * 5, WIDTH);
        out[(1 * 8 + k) * 64 + t] = __shfl_up_sync(0xffffffff, x[t], k, WIDTH);
        out[(2 * 8 + k) * 64 + t] = __shfl_down_sync(0xffffffff, x[t], k, WIDTH);
        out[(3 * 8 + k) * 64 + t] = __shfl_xor_sync(0xffffffff, x[t], k, WIDTH);
    }
    wide_out[t] = __shfl_xor_sync(0xffffffff, wide[t], 1);
}
"""
    x, wide = np.arange(64, dtype=np.float32), np.arange(64) + 0.125
    out, wide_out = np.zeros((4, 8, 64), np.float32), np.zeros(64)
    kernel(tmp_path, text, defines={"WIDTH": width})(1, 64, [x, wide, out, wide_out])
    np.testing.assert_array_equal(wide_out, (np.arange(64) ^ 1) + 0.125)
    for t in range(64):
        start, place = t - t % width, t % width
        for k in range(8):
            assert out[0, k, t] == start + k * 5 % width
            assert out[1, k, t] == (t - k if place >= k else t)
            assert out[2, k, t] == (t + k if place + k < width else t)
            assert out[3, k, t] == (t ^ k if (t ^ k) < start + width else t)


def test_votes_and_reductions_of_parts_of_a_warp(tmp_path):
    text = """
__global__ void test(const int* x, unsigned* out) {
    const int t = threadIdx.x, v = x[t];
    const unsigned mask = t % 3 ? 0xb6db6db6u : 0x49249249u;  // lanes that 3 divides, and the others
    if (t % 3) {
        out[t] = __ballot_sync(mask, v > 0);
        out[32 + t] = __any_sync(mask, v > 8), out[64 + t] = __all_sync(mask, v > -9);
    } else {
        for (int wait = 0; wait < t; ++wait) __syncwarp(1u << t);  // the halves come in any order
        out[t] = __ballot_sync(mask, v > 0);
        out[32 + t] = __any_sync(mask, v > 8), out[64 + t] = __all_sync(mask, v > -9);
    }
    __syncwarp();
    out[96 + t] = __reduce_add_sync(mask, v), out[128 + t] = __reduce_min_sync(mask, v);
    out[160 + t] = __reduce_max_sync(mask, v), out[192 + t] = __reduce_xor_sync(mask, (unsigned)v);
    out[224 + t] = __match_any_sync(0xffffffffu, v);
}
"""
    x = np.random.default_rng(5).integers(-9, 10, 32).astype(np.int32)
    out = np.zeros((8, 32), np.uint32)
    kernel(tmp_path, text)(1, 32, [x, out])
    lanes = np.arange(32)
    for t in range(32):
        part = (lanes % 3 == 0) == (t % 3 == 0)
        bits = lambda which: int((which * (1 << lanes)).sum())
        wanted = [
            bits(part & (x > 0)),
            (x[part] > 8).any(),
            (x[part] > -9).all(),
            x[part].sum(),
            x[part].min(),
        ]
        wanted += [x[part].max(), np.bitwise_xor.reduce(x[part]), bits(x == x[t])]
        assert out[:, t].tolist() == [int(w) & 0xFFFFFFFF for w in wanted]


def test_votes_of_a_block(tmp_path):
    text = """
__global__ void test(const int* x, int* out) {
    const int v = x[threadIdx.x];
    const int count = __syncthreads_count(v > 0), all = __syncthreads_and(v > 0);
    out[threadIdx.x] = count * 4 + all * 2 + __syncthreads_or(v > 8);
}
"""
    x, out = np.arange(-3, 97).astype(np.int32), np.zeros(100, np.int32)
    kernel(tmp_path, text)(1, 100, [x, out])
    assert (out == 96 * 4 + 1).all()


def test_atomics(tmp_path):
    text = """
using Long = unsigned long long;
__global__ void test(const int* x, int* i, unsigned* u, float* f, double* d, __half* h, Long* l) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x, v = x[t];
    atomicAdd(&i[0], v), atomicSub(&i[1], v), atomicMin(&i[2], v), atomicMax(&i[3], v);
    atomicAnd(&u[0], ~(1u << t % 32)), atomicOr(&u[1], 1u << v % 8), atomicXor(&u[2], 1u << v % 32);
    atomicInc(&u[3], 6), atomicDec(&u[4], 6);
    atomicAdd(f, (float)v), atomicAdd(d, (double)v), atomicAdd(h, __half(1)), atomicAdd(l, 1ull << 33);
    atomicExch(&i[4], 7);
    int old = i[5], seen;
    do { seen = old; old = atomicCAS(&i[5], seen, seen + v); } while (old != seen);  // an addition by hand
}
"""
    x = np.random.default_rng(6).integers(0, 100, 640).astype(np.int32)
    i, u = np.array([0, 0, 99, 0, 0, 0], np.int32), np.array([2**32 - 1, 0, 0, 0, 0], np.uint32)
    f, d, h, l = np.zeros(1, np.float32), np.zeros(1), np.zeros(1, np.float16), np.zeros(1, np.uint64)
    kernel(tmp_path, text)(5, 128, [x, i, u, f, d, h, l])
    assert i.tolist() == [x.sum(), -x.sum(), x.min(), x.max(), 7, x.sum()]
    assert u.tolist() == [0, 255, np.bitwise_xor.reduce(1 << x.astype(np.int64) % 32), 640 % 7, -640 % 7]
    assert (f[0], d[0], h[0], l[0]) == (x.sum(), x.sum(), 640, 640 << 33)


# ---- tensor cores: the tables of the PTX ISA, "Matrix Fragments for mma" and "ldmatrix", read plainly ----


def a_place(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    row = group if i < 2 or 4 <= i < 6 else group + 8
    return row, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def c_place(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


def fragments(matrix: np.ndarray, place, count: int) -> np.ndarray:
    """(32, count): what each lane holds of the matrix."""
    return np.array([[matrix[place(lane, i)] for i in range(count)] for lane in range(32)], matrix.dtype)


MMA = """
template <class T, int depth>
__global__ void multiply(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
    const int lane = threadIdx.x;
    uint32_t ra[depth / 4], rb[depth / 8];
    float rc[4], rd[4];
    for (int i = 0; i < depth / 4; ++i) ra[i] = a[lane * (depth / 4) + i];
    for (int i = 0; i < depth / 8; ++i) rb[i] = b[lane * (depth / 8) + i];
    for (int i = 0; i < 4; ++i) rc[i] = c[lane * 4 + i];
    if constexpr (depth == 16) emulator::mma_m16n8k16<T>(rd, ra, rb, rc);
    else emulator::mma_m16n8k8<T>(rd, ra, rb, rc);
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = rd[i];
}
__global__ void multiply_f16(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
    const int lane = threadIdx.x;
    uint32_t ra[4], rb[2], rc[2], rd[2];
    for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i];
    for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i], rc[i] = c[lane * 2 + i];
    emulator::mma_m16n8k16_f16(rd, ra, rb, rc);
    for (int i = 0; i < 2; ++i) d[lane * 2 + i] = rd[i];
}
"""


@pytest.mark.parametrize("name, depth", [("__half", 16), ("__nv_bfloat16", 16), ("__half", 8)])
def test_mma(tmp_path, name, depth):
    dtype, rng = FORMATS[name], np.random.default_rng(7)
    A, B = (
        rng.integers(-40, 40, shape).astype(dtype) for shape in ((16, depth), (depth, 8))
    )  # sums are exact
    C = rng.standard_normal((16, 8)).astype(np.float32).round(2)
    a, b = fragments(A, a_place, depth // 2), fragments(B, b_place, depth // 4)
    found = np.zeros((32, 4), np.float32)
    args = [a.view(np.uint32), b.view(np.uint32), fragments(C, c_place, 4), found]
    kernel(tmp_path, MMA, f"multiply<{name}, {depth}>")(1, 32, args)
    exact = A.astype(np.float64) @ B.astype(np.float64) + C
    np.testing.assert_allclose(found, fragments(exact, c_place, 4), rtol=1e-6, atol=1e-3)
    if name == "__half" and depth == 16:
        half = np.zeros((32, 4), np.float16)
        c = fragments(C.astype(np.float16), c_place, 4)
        args = [a.view(np.uint32), b.view(np.uint32), c.view(np.uint32), half.view(np.uint32)]
        kernel(tmp_path, MMA, "multiply_f16")(1, 32, args)
        exact = A.astype(np.float64) @ B.astype(np.float64) + C.astype(np.float16)
        np.testing.assert_array_equal(half, fragments(exact.astype(np.float16), c_place, 4))


LDMATRIX = """
template <int count, bool transposed>
__global__ void test(const uint16_t* in, uint32_t* out, uint16_t* back) {
    __shared__ alignas(16) uint16_t tile[32][24];  // rows of 48 bytes
    for (int i = threadIdx.x; i < 32 * 24; i += 32) tile[i / 24][i % 24] = in[i];
    __syncthreads();
    uint32_t registers[count];
    emulator::ldmatrix<count, transposed>(registers, &tile[threadIdx.x][8]);
    for (int i = 0; i < count; ++i) out[threadIdx.x * count + i] = registers[i];
    __syncthreads();
    emulator::stmatrix<count, transposed>(&tile[threadIdx.x][0], registers);
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * 24; i += 32) back[i] = tile[i / 24][i % 24];
}
"""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(tmp_path, count, transposed):
    tile = np.random.default_rng(8).integers(0, 2**16, (32, 24)).astype(np.uint16)
    out, back = np.zeros((32, count, 2), np.uint16), np.zeros((32, 24), np.uint16)
    run = kernel(tmp_path, LDMATRIX, f"test<{count}, {str(transposed).lower()}>")
    run(1, 32, [tile, out.view(np.uint32), back])
    for lane in range(32):
        for m in range(count):
            matrix = tile[8 * m : 8 * m + 8, 8:16]
            matrix = matrix.T if transposed else matrix
            assert out[lane, m].tolist() == matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
    tile[: 8 * count, :8] = tile[: 8 * count, 8:16]  # what was read, stored beside it in the same way
    np.testing.assert_array_equal(back, tile)


def test_cp_async_copies_at_the_wait(tmp_path):
    text = """
__global__ void test(const float4* in, float* early, float4* late) {
    __shared__ float4 tile[3][32];
    const int t = threadIdx.x;
    for (int stage = 0; stage < 3; ++stage) {
        tile[stage][t] = make_float4(-1, -1, -1, -1);
        emulator::cp_async(&tile[stage][t], &in[stage * 32 + t], 16, stage == 2 ? 8 : 16);
        emulator::cp_async_commit();
    }
    early[t] = tile[0][t].x;
    emulator::cp_async_wait(1);
    early[32 + t] = tile[1][t].x, early[64 + t] = tile[2][t].x;
    emulator::cp_async_wait(0);
    for (int stage = 0; stage < 3; ++stage) late[stage * 32 + t] = tile[stage][t];
    emulator::cp_async(&tile[0][t], &in[t + 1], 4, 4);
    emulator::cp_async_wait_all();
    early[96 + t] = tile[0][t].x;
}
"""
    data = np.random.default_rng(9).standard_normal((3, 32, 4)).astype(np.float32)
    early, late = np.zeros((4, 32), np.float32), np.zeros_like(data)
    kernel(tmp_path, text)(1, 32, [data, early, late])
    assert (early[0] == -1).all() and (early[2] == -1).all()
    np.testing.assert_array_equal(early[1], data[1, :, 0])
    np.testing.assert_array_equal(early[3], data.reshape(96, 4)[1:33, 0])
    data[2, :, 2:] = 0  # only 8 of the 16 bytes were read
    np.testing.assert_array_equal(late, data)


# ---- fibres ----

FIBRES = """
__device__ int collatz(int n) {
    int steps = 0;
    for (; n > 1; ++steps) n = n % 2 ? 3 * n + 1 : n / 2;
    return steps;
}
__global__ void test(int* out) {
    __shared__ int steps[1024];
    extern __shared__ int turn[];
    const int t = threadIdx.x, n = blockDim.x;
    for (int round = 0; round < 5; ++round) {  // threads take different times, and wait for each other
        steps[t] = collatz(t + round + 1);
        __syncthreads();
        turn[t] = steps[(t + 1) % n] + steps[(t + n / 2) % n];
        if (t % 32 < 16) {
            for (int i = 0; i < t % 7; ++i) turn[t] += __shfl_xor_sync(1u << t % 32, turn[t], 0) - turn[t];
        }
        __syncwarp();
        out[(blockIdx.x * 5 + round) * n + t] = __shfl_sync(0xffffffff, turn[t], (t + 1) % 32);
        __syncthreads();
    }
}
"""


@pytest.mark.parametrize("compile_with", [None, "-DEMULATOR_UCONTEXT"])
def test_threads_wait_for_each_other(tmp_path, monkeypatch, compile_with):
    if compile_with:  # as on a processor that we wrote no switch of contexts for
        monkeypatch.setenv("CXX", f"{build.compiler()[0]} {compile_with}")
    blocks, threads = 6, 1024
    out = np.zeros((blocks, 5, threads), np.int32)
    kernel(tmp_path, FIBRES)(blocks, threads, [out], shared_bytes=4 * threads)

    def collatz(n: int) -> int:
        steps = 0
        while n > 1:
            n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
        return steps

    t = np.arange(threads)
    for round in range(5):
        steps = np.array([collatz(i + round + 1) for i in t])
        turn = steps[(t + 1) % threads] + steps[(t + threads // 2) % threads]
        wanted = turn.reshape(-1, 32)[:, (np.arange(32) + 1) % 32].ravel()
        assert (out[:, round] == wanted).all()


def test_a_block_that_waits_for_ever_ends_with_one_line(tmp_path):
    text = """
__global__ void test(int* out) {
    if (threadIdx.x == 5)
        __syncwarp();
    else
        __syncthreads();
}
"""
    test = kernel(tmp_path, text)
    with pytest.raises(KernelError) as caught:
        test(1, 96, [np.zeros(96, np.int32)])
    assert str(caught.value) == (
        "test.cu:6: waits for ever in __syncthreads(): thread 5 is in __syncwarp() (there: test.cu:4); "
        "thread (0, 0, 0) of block (0, 0, 0)"
    )
    out = np.zeros(32, np.int32)  # and the next launch finds a clean table
    assert (
        kernel(tmp_path, "__global__ void test(int* out) { __syncthreads(); out[threadIdx.x] = 5; }")(
            1, 32, [out]
        )
        is None
    )
    assert (out == 5).all()


def test_an_assert_that_fails_ends_the_launch(tmp_path):
    test = kernel(tmp_path, "__global__ void test(int n) {\n    assert(n < 3);\n}")
    test(1, 1, [np.int32(2)])
    with pytest.raises(
        KernelError, match=r"test.cu:2: assert\(n < 3\); thread \(0, 0, 0\) of block \(0, 0, 0\)"
    ):
        test(1, 1, [np.int32(3)])


# ---- arguments ----

ARGUMENTS = """
struct Problem { int n; long long stride; float scale; };
__global__ void test(const float* x, float* y, const int* maybe, bool flag, Problem p, double d) {
    const double more = (maybe ? maybe[0] : 0) + flag + d;
    for (int i = 0; i < p.n; ++i) y[i * p.stride] = x[i * p.stride] * p.scale + more;
}
"""
PROBLEM = np.dtype([("n", "i4"), ("stride", "i8"), ("scale", "f4")], align=True)


def problem(n: int, stride: int) -> np.void:
    return np.array((n, stride, 2), PROBLEM)[()]


def test_arguments_of_all_kinds(tmp_path):
    test = kernel(tmp_path, ARGUMENTS)
    x, y = np.arange(5, dtype=np.float32), np.zeros(5, np.float32)
    test(1, 1, [x, y, None, np.bool_(True), problem(5, 1), np.float64(0.5)])
    np.testing.assert_array_equal(y, 2 * x + 1.5)
    test(1, 1, [x, y, np.array([7], np.int32), np.bool_(False), problem(5, 1), np.float64(0)])
    np.testing.assert_array_equal(y, 2 * x + 7)
    test(1, 1, [x, x, None, np.bool_(False), problem(5, 1), np.float64(0)])  # in and out the same
    assert x.tolist() == [0, 2, 4, 6, 8]
    test(1, 1, [np.zeros(0, np.float32), y, None, np.bool_(False), problem(0, 1), np.float64(0)])


def test_views_are_used_where_they_lie(tmp_path):
    test = kernel(tmp_path, ARGUMENTS)
    whole = np.arange(40, dtype=np.float32).reshape(4, 10)
    before, x, y = whole.copy(), whole[1:, 2], whole[1:, 7]  # interleaved columns of one array
    test(1, 1, [x, y, None, np.bool_(False), problem(3, 10), np.float64(0)])
    before[1:, 7] = before[1:, 2] * 2
    np.testing.assert_array_equal(whole, before)
    backwards = np.arange(5, dtype=np.float32)[
        ::-1
    ]  # its pointer is that of its first item, the last in memory
    out = np.zeros(5, np.float32)[::-1]
    test(1, 1, [backwards, out, None, np.bool_(False), problem(5, -1), np.float64(0)])
    assert out.tolist() == [8, 6, 4, 2, 0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: np.zeros(3)}, "argument 0: an array of float64, where the kernel takes floats of 4 bytes"),
        ({0: np.int32(1)}, "argument 0: int32, where the kernel takes a pointer"),
        (
            {0: np.zeros(3, np.int32)},
            "argument 0: an array of int32, where the kernel takes floats of 4 bytes",
        ),
        ({3: 1}, "argument 3: int; pass a NumPy scalar"),
        ({3: np.int32(1)}, "argument 3: int32, where the kernel takes bool of 1 bytes"),
        (
            {4: np.zeros((), "i4,i8")[()]},
            "argument 4: a struct of 12 bytes, where the kernel takes a struct of 24",
        ),
        ({5: np.float32(1)}, "argument 5: float32, where the kernel takes floats of 8 bytes"),
        ({5: np.zeros(1)}, "argument 5: an array or None, where the kernel takes 8 bytes by value"),
        ({1: np.broadcast_to(np.float32(0), 3)}, "argument 1: the array is read-only"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, change, message):
    test = kernel(tmp_path, ARGUMENTS)
    x, y = np.zeros(3, np.float32), np.zeros(3, np.float32)
    args = [x, y, None, np.bool_(False), problem(3, 1), np.float64(0)]
    for place, value in change.items():
        args[place] = value
    with pytest.raises(TypeError, match=message.replace("(", r"\(")):
        test(1, 1, args)
    with pytest.raises(TypeError, match="takes 6 arguments, not 2"):
        test(1, 1, [x, y])


def test_wrong_sizes_are_refused(tmp_path):
    text = "__global__ void test() { __shared__ float x[20000]; x[threadIdx.x] = 1; atomicAdd(x, 1.0f); }"
    test = kernel(tmp_path, text)
    with pytest.raises(ValueError, match="1024"):
        test(1, 1025, [])
    with pytest.raises(ValueError, match="grid"):
        test((1, 65536), 1, [])
    with pytest.raises(ValueError, match="at least 1"):
        test(0, 1, [])
    with pytest.raises(ValueError, match="without extern __shared__"):
        test(1, 1, [], shared_bytes=16)
    test(1, 1, [])
    with pytest.raises(KernelError, match="80,000 bytes of shared memory a block, 80,000 static"):
        kernel(tmp_path, text, shared_limit=64 * 1024)(1, 1, [])
    with pytest.raises(ValueError, match="unknown backend"):
        Module(KERNELS / "vector_add.cu", backend="gpu")
    with pytest.raises(ValueError, match="the checks are the emulator's"):
        Module(KERNELS / "vector_add.cu", backend="cuda", checked=True)


# ---- building ----


def test_includes_are_put_in_their_place_once(tmp_path):
    (tmp_path / "part.cuh").write_text("#pragma once\n__device__ int three() { return 3; }\n")
    text = (
        '#include "part.cuh"\n' * 2 + "__global__ void test(int* out) {\n    out[0] = three() + __LINE__;\n}"
    )
    out = np.zeros(1, np.int32)
    kernel(tmp_path, text)(1, 1, [out])
    assert out[0] == 3 + 4
    (tmp_path / "part.cuh").write_text("#pragma once\n__device__ int three() { return 30; }\n")
    kernel(tmp_path, text)(1, 1, [out])  # a changed header is seen
    assert out[0] == 30 + 4


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    module = Module(KERNELS / "vector_add.cu", backend="emulator")
    with pytest.raises(
        EmulatorUnavailable, match="^no C.. compiler found .*: install g.., or set CXX to one$"
    ):
        module.kernel("vector_add")
    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    with pytest.raises(EmulatorUnavailable, match="no-such-compiler"):
        module.kernel("vector_add")


def test_the_checks_need_gcc(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_target", lambda command: ((), "#define __clang__ 1"))
    with pytest.raises(EmulatorUnavailable, match="checks need GCC"):
        kernel(tmp_path, "__global__ void test() {}", checked=True)


def test_a_stray_access_or_a_full_stack_does_not_end_python(tmp_path):
    text = """
__global__ void wild(int* out) {
    out[(long long)threadIdx.x * 1000000000] = 5;  // line 3
}
__device__ int deep(volatile int* x, int n) {
    volatile int y[1000]; y[n % 1000] = x[0] + n;  // line 6
    return n ? deep(y, n - 1) + y[3] : 0;
}
__global__ void recursive(int* out) { out[0] = deep(out, 1000); }
"""
    with pytest.raises(KernelError, match="test.cu:3: touches memory that it must not touch"):
        kernel(tmp_path, text, "wild")(20, 96, [np.zeros(96, np.int32)])
    with pytest.raises(KernelError, match="test.cu:6: needs more than 128 kB for its local variables"):
        kernel(tmp_path, text, "recursive")(20, 96, [np.zeros(96, np.int32)])


def test_an_error_of_the_compiler_names_the_line(tmp_path):
    with pytest.raises(
        EmulatorUnavailable, match=r"^the C.. compiler refuses test: test.cu:2:.*error.*nonsense"
    ) as caught:
        kernel(tmp_path, "__global__ void test() {\n    nonsense = 1;\n}")
    assert "\n" not in str(caught.value)
    with pytest.raises(EmulatorUnavailable, match="other"):
        kernel(tmp_path, "__global__ void test() {}", "other")


@pytest.mark.slow
def test_many_processes_build_the_same_kernel(tmp_path):
    program = """
import numpy as np
from kernels.module import Module
out = np.zeros(1, np.int32)
Module("test.cu", backend="emulator").kernel("test")(1, 1, [out])
print(out[0])
"""
    (tmp_path / "test.cu").write_text("__global__ void test(int* out) { out[0] = 42; }")
    environment = {
        **build.os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(KERNELS.parent),
    }
    line = [sys.executable, "-c", program]
    running = [
        subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["42"] * 3
    left = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache/tinyllm-emulator").iterdir())
    assert left == ["runtime", "test"]  # nothing half-made stays


def test_a_cache_that_cannot_be_written_is_not_needed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.cache_folder().is_dir()
    assert build.cache_folder() == build.cache_folder()
