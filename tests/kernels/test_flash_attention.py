"""FlashAttention in the checking emulator, against attention in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

import kernels
from kernels.flash_attention import HEAD_DIMS, SOURCE
from kernels.module import Module

from . import emulated  # noqa: F401  (skips where there is no compiler)
from .attention import DTYPES, Case, case, check
from .draws import MASKS, cases

CHECKED = Module(SOURCE, backend="emulator", checked=True)
LENGTHS = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200)


def run(c: Case, module: Module | None = CHECKED) -> tuple[np.ndarray, ...]:
    out, logsumexp = kernels.flash_attention(c.q, c.k, c.v, **c.keywords, backend=module)
    grads = kernels.flash_attention_backward(c.g, c.q, c.k, c.v, out, logsumexp, **c.keywords, backend=module)
    return out, logsumexp, *grads


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lengths_around_the_tiles(dtype, mask):
    batch = 2 if "key_lengths" in MASKS[mask] else 1
    for length in LENGTHS:
        c = case(dtype, batch, 2, 1, length, length, 64, **MASKS[mask])
        check(c, run(c))


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dimensions(dtype, d):
    c = case(dtype, 1, 2, 1, 70, 90, d, causal=True)
    check(c, run(c))


@given(cases())
@settings(max_examples=25)
def test_against_float64(drawn):
    arguments, keywords = drawn
    c = case(*arguments, **keywords)
    check(c, run(c))


@pytest.mark.parametrize("values", ["large", "tailed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_edge(dtype, values):
    for seed in range(5):
        c = case(dtype, 1, 2, 1, 100, 130, 64, values, seed)
        check(c, run(c))


def test_one_query_against_a_long_cache():
    for dtype in ("float32", "float16"):
        c = case(dtype, 2, 4, 2, 1, 1000, 64, causal=True, window=700, key_lengths=np.array([1000, 901]))
        check(c, run(c))


def test_what_is_seen_by_nobody_is_zero():
    c = case("float32", 2, 2, 2, 90, 40, 32, causal=True, key_lengths=np.array([40, 0]))
    out, logsumexp, dq, dk, dv = run(c)
    assert np.isneginf(logsumexp[1]).all() and not out[1].any()
    assert (
        np.isneginf(logsumexp[0, :, :50]).all() and not out[0, :, :50].any()
    )  # 50 queries before the first key
    assert np.isfinite(logsumexp[0, :, 50:]).all()
    assert not (dq[1].any() or dk[1].any() or dv[1].any() or dq[0, :, :50].any())
    check(c, (out, logsumexp, dq, dk, dv))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (1, 0, 5, 7), (1, 2, 0, 7), (1, 2, 5, 0)])
def test_empty(shape):
    B, H, n, m = shape
    c = case("float32", B, H, H, n, m, 64)
    out, logsumexp, dq, dk, dv = run(c)
    assert out.shape == dq.shape == (B, H, n, 64) and dk.shape == dv.shape == (B, H, m, 64)
    assert not out.any() and np.isneginf(logsumexp).all() and not (dq.any() or dk.any() or dv.any())


def test_every_run_gives_the_same_bits():
    c = case("float16", 2, 4, 2, 150, 150, 64, causal=True)
    for first, second in zip(run(c), run(c)):
        assert first.tobytes() == second.tobytes()


def packed(c: Case) -> tuple[np.ndarray, ...]:
    """q, k, v as views (B, H, T, d) of one array (B, T, 3, H, d), as a linear map makes them."""
    qkv = np.stack([x.transpose(0, 2, 1, 3) for x in (c.q, c.k, c.v)], 2)
    return tuple(qkv.transpose(2, 0, 3, 1, 4))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_views_of_one_array(dtype):
    c = case(dtype, 2, 2, 2, 70, 70, 64, causal=True)
    q, k, v = packed(c)
    view = Case(q, k, v, np.swapaxes(np.swapaxes(c.g, 1, 2).copy(), 1, 2), c.keywords)
    expected = run(c)
    for x, y in zip(run(view), expected):
        assert np.array_equal(x, y)
    dqkv = np.full((2, 70, 3, 2, 64), np.nan, DTYPES[dtype])  # and the gradients into views of another
    into = tuple(dqkv.transpose(2, 0, 3, 1, 4))
    keywords = {**c.keywords, "backend": CHECKED, "into": into}
    assert kernels.flash_attention_backward(view.g, q, k, v, *expected[:2], **keywords) is into
    for x, y in zip(into, expected[2:]):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_that_must_be_copied(dtype):
    c = case(dtype, 1, 2, 1, 40, 50, 64)
    expected = run(c)

    def shifted(x: np.ndarray) -> np.ndarray:  # rows that do not start at multiples of 16 bytes
        room = np.zeros((*x.shape[:3], 65), x.dtype)
        room[..., 1:] = x
        return room[..., 1:]

    transposed = lambda x: x.swapaxes(2, 3).copy().swapaxes(2, 3)
    backwards = lambda x: x[:, :, ::-1].copy()[:, :, ::-1]
    for layout in (shifted, transposed, backwards):
        for x, y in zip(run(Case(*map(layout, (c.q, c.k, c.v, c.g)))), expected):
            assert np.array_equal(x, y)
    for into in (tuple(map(layout, expected[2:])) for layout in (shifted, transposed, backwards)):
        for gradient in into:
            gradient[...] = 0
        kernels.flash_attention_backward(c.g, c.q, c.k, c.v, *expected[:2], backend=CHECKED, into=into)
        for x, y in zip(into, expected[2:]):
            assert np.array_equal(x, y)


def test_heads_that_share_memory():
    c = case("float32", 1, 4, 4, 20, 30, 32)
    k, v = (np.broadcast_to(x[:, :1], x.shape) for x in (c.k, c.v))
    found = run(Case(c.q, k, v, c.g))
    expected = run(Case(c.q, k.copy(), v.copy(), c.g))
    for x, y in zip(found, expected):
        assert np.array_equal(x, y)


def test_wrong_arguments_say_what_to_do():
    c = case("float32", 2, 4, 2, 5, 6, 32)
    q, k, v = c.q, c.k, c.v

    def refused(error: type[Exception], match: str, *arrays: np.ndarray, **keywords) -> None:
        with pytest.raises(error, match=match):
            kernels.flash_attention(*arrays, **keywords)

    refused(TypeError, "not float64: use .astype", *(x.astype(np.float64) for x in (q, k, v)))
    refused(TypeError, "must be of one type", q, k.astype(np.float16), v)
    refused(TypeError, "NumPy's or all CuPy's", q, k.tolist(), v)
    refused(ValueError, "do not fit", q, k[..., :16], v[..., :16])
    refused(ValueError, "do not fit", q, k, v[:, :, :3])
    refused(ValueError, "do not fit", q[0], k[0], v[0])
    refused(ValueError, "2 key heads do not divide 3", q[:, :3], k, v)
    wide = [np.zeros((1, 1, 2, 129), np.float32)] * 3
    refused(ValueError, "head dimension 129 is above 128", *wide)
    refused(ValueError, "window=0", q, k, v, causal=True, window=0)
    refused(ValueError, "needs causal=True", q, k, v, window=3)
    refused(ValueError, "scale=-1", q, k, v, scale=-1)
    refused(ValueError, "must be 2 integers", q, k, v, key_lengths=np.array([1]))
    refused(ValueError, "must be 2 integers", q, k, v, key_lengths=np.array([1.0, 2.0]))
    refused(TypeError, "cupy.asarray moves them", q, k, v, backend="cuda")
    refused(ValueError, "'cuda', 'emulator' or None", q, k, v, backend="gpu")
    out, logsumexp = kernels.flash_attention(q, k, v)
    with pytest.raises(ValueError, match="grad_out"):
        kernels.flash_attention_backward(q[:, :, :2], q, k, v, out, logsumexp)
    with pytest.raises(ValueError, match="logsumexp float64"):
        kernels.flash_attention_backward(q, q, k, v, out, logsumexp.astype(np.float64))
    with pytest.raises(ValueError, match="dk float32"):
        kernels.flash_attention_backward(q, q, k, v, out, logsumexp, into=(q, q, v))
