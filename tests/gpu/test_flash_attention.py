"""FlashAttention on a real GPU: what tests/kernels/test_flash_attention.py asks of the emulator, and more.

More: long sequences and many blocks at once, streams other than the default, and memory that stays linear.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings

import autograd.functional as F
import kernels
from autograd import Tensor, backend, grad
from autograd.attention import attention_composed
from kernels.flash_attention import HEAD_DIMS

from ..kernels.attention import DTYPES, Case, case, check
from ..kernels.draws import MASKS, cases

try:
    cupy = backend.device_module("cuda")
except backend.DeviceError as error:
    pytest.skip(str(error), allow_module_level=True)

NEW = int(cupy.cuda.Device().compute_capability) >= 80


def on_card(x: np.ndarray):
    """The array on the GPU; bfloat16 passes as its bits, for CuPy may not know the type when it copies."""
    return cupy.asarray(x.view(np.uint16)).view(x.dtype) if x.dtype.name == "bfloat16" else cupy.asarray(x)


def to_host(x) -> np.ndarray:
    x = cupy.ascontiguousarray(x)
    return cupy.asnumpy(x.view(np.uint16)).view(x.dtype) if x.dtype.name == "bfloat16" else cupy.asnumpy(x)


@functools.cache
def missing(dtype: str) -> str | None:
    """Why this card or this CuPy does not take the type; None if they do."""
    if dtype != "float32" and not NEW:
        return f"{dtype} needs a card of compute capability 8.0 or later"
    try:
        x = on_card(np.ones((2, 2), DTYPES[dtype]))
        cupy.zeros_like(x)[:, :1] = x[:, 1:]
        to_host(x.T)
    except (TypeError, ValueError, KeyError) as error:
        return f"this CuPy has no {dtype}: {error}"
    return None


TYPES = [pytest.param(x, marks=pytest.mark.skipif(bool(missing(x)), reason=str(missing(x)))) for x in DTYPES]
FOUND = tuple(x for x in DTYPES if not missing(x))


def arguments(c: Case) -> tuple[list, dict]:
    """q, k, v, g on the card, and the keywords."""
    keywords = dict(c.keywords)
    if "key_lengths" in keywords:
        keywords["key_lengths"] = cupy.asarray(keywords["key_lengths"])
    return [on_card(x) for x in (c.q, c.k, c.v, c.g)], keywords


def launch(q, k, v, g, **keywords) -> tuple:
    out, logsumexp = kernels.flash_attention(q, k, v, **keywords)
    return out, logsumexp, *kernels.flash_attention_backward(g, q, k, v, out, logsumexp, **keywords)


def run(c: Case) -> tuple[np.ndarray, ...]:
    arrays, keywords = arguments(c)
    return tuple(map(to_host, launch(*arrays, **keywords)))


def assert_same_bits(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.tobytes() == y.tobytes()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", TYPES)
def test_lengths_around_the_tiles(dtype, mask):
    for length in (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 500):
        c = case(dtype, 2, 4, 2, length, length, 64, **MASKS[mask])
        check(c, run(c))


@pytest.mark.parametrize("d", [*HEAD_DIMS, 1, 40, 80, 127])
@pytest.mark.parametrize("dtype", TYPES)
def test_head_dimensions(dtype, d):
    c = case(dtype, 2, 4, 2, 300, 333, d, causal=True)
    check(c, run(c))


@given(cases(FOUND))
@settings(max_examples=150)
def test_against_float64(drawn):
    arguments, keywords = drawn
    c = case(*arguments, **keywords)
    check(c, run(c))


@pytest.mark.parametrize("values", ["large", "tailed"])
@pytest.mark.parametrize("dtype", TYPES)
def test_values_at_the_edge(dtype, values):
    for seed in range(5):
        c = case(dtype, 1, 2, 1, 300, 330, 64, values, seed)
        check(c, run(c))


@pytest.mark.parametrize("dtype", TYPES)
def test_one_query_against_a_long_cache(dtype):
    c = case(dtype, 2, 4, 2, 1, 5000, 128, causal=True, key_lengths=np.array([5000, 4321]))
    check(c, run(c))


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_seen_by_nobody_is_zero(dtype):
    c = case(dtype, 2, 2, 2, 90, 40, 32, causal=True, key_lengths=np.array([40, 0]))
    out, logsumexp, dq, dk, dv = run(c)
    assert np.isneginf(logsumexp[1]).all() and np.isneginf(logsumexp[0, :, :50]).all()
    assert np.isfinite(logsumexp[0, :, 50:]).all()
    for x in (out[1], out[0, :, :50], dq[1], dq[0, :, :50], dk[1], dv[1]):
        assert not x.any()
    check(c, (out, logsumexp, dq, dk, dv))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (1, 0, 5, 7), (1, 2, 0, 7), (1, 2, 5, 0)])
def test_empty(shape):
    B, H, n, m = shape
    out, logsumexp, dq, dk, dv = run(case("float32", B, H, H, n, m, 64))
    assert out.shape == dq.shape == (B, H, n, 64) and dk.shape == dv.shape == (B, H, m, 64)
    assert np.isneginf(logsumexp).all() and not any(x.any() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("dtype", TYPES)
def test_many_blocks_and_every_run_the_same_bits(dtype):
    c = case(dtype, 16, 8, 4, 512, 512, 64, causal=True)
    arrays, keywords = arguments(c)
    first = [to_host(x) for x in launch(*arrays, **keywords)]
    for _ in range(5):
        assert_same_bits([to_host(x) for x in launch(*arrays, **keywords)], first)


@pytest.mark.parametrize("dtype", TYPES)
def test_long_sequences(dtype):
    """A window keeps plain attention small: the last 200 of 4000 queries see the last 400 keys, no others."""
    c = case(dtype, 1, 2, 1, 4000, 4000, 64, causal=True, window=200)
    out, logsumexp, dq, *_ = run(c)
    tail = Case(c.q[:, :, -200:], c.k[:, :, -400:], c.v[:, :, -400:], c.g[:, :, -200:], c.keywords)
    _, _, _, dk, dv = run(tail)  # which only some of the queries of those keys have a part in
    check(tail, (out[:, :, -200:], logsumexp[:, :, -200:], dq[:, :, -200:], dk, dv))


# -------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("dtype", TYPES)
def test_views_of_one_array(dtype):
    """q, k and v as views (B, H, T, d) of one array (B, T, 3, H, d), and gradients into views of another."""
    c = case(dtype, 2, 2, 2, 170, 170, 64, causal=True)
    (q, k, v, g), keywords = arguments(c)
    expected = launch(q, k, v, g, **keywords)
    together = lambda *arrays: np.stack([x.transpose(0, 2, 1, 3) for x in arrays], 2)
    views = on_card(together(c.q, c.k, c.v)).transpose(2, 0, 3, 1, 4)
    g = on_card(np.ascontiguousarray(c.g.transpose(0, 2, 1, 3))).transpose(0, 2, 1, 3)
    found = launch(*views, g, **keywords)
    assert_same_bits(map(to_host, found), map(to_host, expected))
    room = on_card(np.full((2, 170, 3, 2, 64), np.nan, DTYPES[dtype]))
    into = tuple(room.transpose(2, 0, 3, 1, 4))
    kernels.flash_attention_backward(g, *views, *found[:2], **keywords, into=into)
    written = together(*map(to_host, expected[2:]))
    assert_same_bits([to_host(room)], [written])  # in place, each number


@pytest.mark.parametrize("d", [64, 40])
@pytest.mark.parametrize("dtype", TYPES)
def test_layouts_that_must_be_copied(dtype, d):
    c = case(dtype, 1, 2, 1, 140, 150, d)
    arrays, _ = arguments(c)
    expected = list(map(to_host, launch(*arrays)))

    def shifted(x):  # rows that do not start at multiples of 16 bytes
        room = cupy.zeros((*x.shape[:3], d + 1), x.dtype)
        room[..., 1:] = x
        return room[..., 1:]

    transposed = lambda x: cupy.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3)
    backwards = lambda x: cupy.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]
    spread = lambda x: cupy.repeat(x, 2, axis=3)[..., ::2]
    for layout in (shifted, transposed, backwards, spread):
        out, logsumexp, *_ = found = launch(*map(layout, arrays))
        assert_same_bits(map(to_host, found), expected)
        into = tuple(layout(cupy.zeros_like(x)) for x in arrays[:3])
        q, k, v, g = arrays
        assert kernels.flash_attention_backward(g, q, k, v, out, logsumexp, into=into) is into
        assert_same_bits(map(to_host, into), expected[2:])


@pytest.mark.parametrize("dtype", TYPES)
def test_one_row_for_all_heads(dtype):
    """Strides of 0: keys and values that all heads and sequences share without a copy."""
    c = case(dtype, 1, 1, 1, 100, 100, 64)
    (q, k, v, g), _ = arguments(c)
    wide = lambda x: cupy.broadcast_to(x, (2, 3, 100, 64))
    found = launch(*map(wide, (q, k, v, g)))
    expected = launch(q, k, v, g)
    for x, y in zip(found, expected):
        assert_same_bits([to_host(x)], [np.ascontiguousarray(np.broadcast_to(to_host(y), x.shape))])


# -------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("dtype", TYPES)
def test_the_kernel_runs_on_the_stream_in_use(dtype):
    """Inputs that a stream has still to make; a launch on any other stream would find NaN."""
    c = case(dtype, 2, 4, 2, 300, 300, 64, causal=True)
    arrays, keywords = arguments(c)
    expected = list(map(to_host, launch(*arrays, **keywords)))
    busy, stream = cupy.zeros((4096, 4096), np.float32), cupy.cuda.Stream(non_blocking=True)
    rooms = [on_card(np.full(x.shape, np.nan, x.dtype)) for x in (c.q, c.k, c.v, c.g)]
    with stream:
        busy = busy @ busy  # makes cuBLAS ready for this stream, and the next line its memory
        launch(*rooms, **keywords)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(50):
            busy = busy @ busy
        for room, x in zip(rooms, arrays):
            room[...] = x
        found = launch(*rooms, **keywords)
    assert not stream.done  # so nothing above waited, and the order on the stream alone made it right
    stream.synchronize()
    assert_same_bits(map(to_host, found), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_two_streams_at_once(dtype):
    problems = [case(dtype, 1, 4, 2, 700, 700, 64, seed=seed, causal=True) for seed in range(2)]
    inputs = [arguments(c) for c in problems]
    expected = [list(map(to_host, launch(*arrays, **keywords))) for arrays, keywords in inputs]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in problems]
    cupy.cuda.Device().synchronize()
    found = [[], []]
    for _ in range(10):
        for i, ((arrays, keywords), stream) in enumerate(zip(inputs, streams)):
            with stream:
                found[i].append(launch(*arrays, **keywords))
    for stream in streams:
        stream.synchronize()
    for results, wanted in zip(found, expected):
        for result in results:
            assert_same_bits(map(to_host, result), wanted)


# ----------------------------------------------------------------------------------------------- the engine


def test_memory_grows_with_the_length_and_not_its_square():
    """Beyond inputs and results: L and D, and in float32 R, each N numbers a head."""
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        q, k, v, g = (cupy.zeros((1, 2, 4096, 64), np.float32) for _ in range(4))
        launch(q, k, v, g)  # what compiling takes is not counted
        pool.free_all_blocks()
        before = pool.total_bytes()
        results = launch(q, k, v, g)
        taken = pool.total_bytes() - before
    needed = sum(x.nbytes for x in results) + 2 * q.shape[1] * q.shape[2] * 4
    assert needed <= taken <= needed + 16 * 512  # the pool rounds each array up to 512 bytes


@pytest.mark.skipif(NEW, reason="this card takes the 16-bit types")
def test_a_card_too_old_says_so():
    q = cupy.zeros((1, 1, 4, 32), np.float16)
    with pytest.raises(RuntimeError, match="8.0 or later.*use float32"):
        kernels.flash_attention(q, q, q)


def test_arrays_of_two_machines_are_refused():
    q = np.zeros((1, 1, 4, 32), np.float32)
    with pytest.raises(TypeError, match="all CuPy's"):
        kernels.flash_attention(cupy.asarray(q), q, q)
    with pytest.raises(TypeError, match="cupy.asnumpy moves them"):
        kernels.flash_attention(*[cupy.asarray(q)] * 3, backend="emulator")


def test_attention_of_tensors_takes_the_kernel():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, heads, 150, 40)) for heads in (4, 2, 2)]
    exact = [Tensor(x, requires_grad=True) for x in arrays]
    expected = attention_composed(*exact, causal=True)
    g = rng.standard_normal(expected.shape)
    wanted = [expected, *grad(expected, exact, Tensor(g))]
    tolerances = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
    for dtype in FOUND:
        F.use_flash(precision=None if dtype == "float32" else dtype)
        try:
            tensors = [Tensor(cupy.asarray(x, dtype=np.float32), requires_grad=True) for x in arrays]
            assert F.attention_path(*tensors) == f"flash kernel, {dtype}"
            out = F.attention(*tensors, causal=True)
            found = [out, *grad(out, tensors, Tensor(cupy.asarray(g, dtype=np.float32)))]
        finally:
            F.use_flash()
        for x, y in zip(found, wanted):
            assert x.dtype == np.float32
            atol = tolerances[dtype] * np.abs(y.data).max()
            np.testing.assert_allclose(cupy.asnumpy(x.data), y.data, rtol=0, atol=atol)
