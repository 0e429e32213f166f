"""WKV at sizes and in ranges that the op table leaves out: long texts, extreme decays and keys, states."""

from __future__ import annotations

import numpy as np
import pytest

import autograd.functional as F
from autograd import Tensor, gradcheck, no_grad
from autograd import wkv as module
from autograd.fused import FUSED

from .op_table import wkv as by_definition


def arrays(B, T, C, decay=(0.001, 3.0), keys=1.0, dtype=np.float64, seed=0):
    """w, u, k, v."""
    rng = np.random.default_rng(seed)
    w = np.exp(rng.uniform(*np.log(decay), C))
    found = w, rng.normal(0, 1, C), rng.normal(0, keys, (B, T, C)), rng.normal(0, 1, (B, T, C))
    return [a.astype(dtype) for a in found]


def everything(operation, inputs, state=None):
    """The result and the gradients of a random projection of it."""
    tensors = [Tensor(a, requires_grad=True) for a in inputs]
    out = operation(*tensors, state)
    upstream = np.random.default_rng(1).normal(0, 1, out.shape).astype(out.dtype)
    out.backward(upstream)
    # Of one token the decay is no part of the composition.
    return [out.data, *(np.zeros_like(t.data) if t.grad is None else t.grad.data for t in tensors)]


def assert_close(found, expected, tolerance):
    """Errors as parts of the largest number of each array, or of 1: sums of both signs cancel."""
    for name, a, b in zip(("out", "dw", "du", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1), err_msg=name)


@pytest.mark.parametrize("close", [-1.0, 3.0, 20.0], ids=["never close", "sometimes close", "close"])
@pytest.mark.parametrize("block", [1, 40, 1 << 16], ids=lambda n: f"blocks of {n}")
@pytest.mark.parametrize("B, T, C", [(1, 1, 1), (1, 33, 3), (3, 1, 2), (2, 65, 5), (1, 200, 3)])
def test_long_texts_in_blocks(B, T, C, block, close, monkeypatch):
    """Cut into blocks of one step, of some, and not at all, whose exponents are close or not; from nothing
    and from a state."""
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "_CLOSE", close)
    inputs = arrays(B, T, C)
    rng = np.random.default_rng(2)
    state = rng.normal(0, 1, (B, C)), rng.uniform(0.5, 2, (B, C)), rng.normal(0, 1, (B, C))
    for past in (None, state):
        found = everything(FUSED["wkv"].fused, inputs, past)
        assert_close(found, everything(FUSED["wkv"].composed, inputs, past), 1e-11)
        if T < 100:  # there e^(T w) is a number
            np.testing.assert_allclose(found[0], by_definition(*inputs, past), rtol=0, atol=1e-12)


# Forgetting everything at once, or nothing in a thousand steps; keys whose exponentials no float can hold.
EXTREMES = {
    "fast": {"decay": (50.0, 1e30)},
    "slow": {"decay": (1e-30, 1e-6)},
    "both": {"decay": (1e-30, 1e30)},
    "large keys": {"keys": 300.0},
    "larger keys": {"keys": 1e5, "decay": (1e-3, 1e6)},
    "large keys at times": {"keys": 12.0, "decay": (1e-3, 30.0)},  # close in some blocks, not in others
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("block", [60, 1 << 16])
def test_extremes(name, block, monkeypatch):
    """Nothing overflows, and float32 is as near to float64 as it is in the composition."""
    monkeypatch.setattr(module, "_BLOCK", block)
    inputs = arrays(1, 1000, 6, dtype=np.float32, **EXTREMES[name])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        out, *gradients = everything(FUSED["wkv"].fused, inputs)
    assert all(a.dtype == np.float32 and np.isfinite(a).all() for a in (out, *gradients))
    top, bottom = (extreme.accumulate(inputs[3], axis=1) for extreme in (np.maximum, np.minimum))
    assert (out <= top + 1e-5).all() and (out >= bottom - 1e-5).all()  # it is a mean of the values so far
    w, u, k, v = inputs
    inputs = w, u, k[:, :200], v[:, :200]
    found, plain = (everything(f, inputs) for f in (FUSED["wkv"].fused, FUSED["wkv"].composed))
    exact = everything(FUSED["wkv"].composed, [a.astype(np.float64) for a in inputs])
    for what, a, b, c in zip(("out", "dw", "du", "dk", "dv"), found, plain, exact, strict=True):
        error, usual, size = np.abs(a - c).max(), np.abs(b - c).max(), max(np.abs(c).max(), 1)
        assert error <= 3 * usual + 2e-6 * size, (what, error, usual)


def test_a_faded_key_is_forgotten_in_the_choice_too(monkeypatch):
    """After a large key that counts no more the short way goes on, and the long one is for what needs it."""
    w, u, k, v = arrays(1, 40, 1)
    w, k = w * 0 + 3, np.clip(k, -2, 2)
    k[0, 10:] -= 4
    expected = F.wkv(*map(Tensor, (w, u, k, v))).data
    k[0, 0] = 17  # less than 20 above its block, more above the next ones
    monkeypatch.setattr(module, "_BLOCK", 10)
    monkeypatch.setattr(module, "_weights", None)
    found = F.wkv(*map(Tensor, (w, u, k, v))).data
    np.testing.assert_allclose(found[0, 20:], expected[0, 20:], rtol=0, atol=1e-9)
    k[0, 15] = 40
    with pytest.raises(TypeError, match="not callable"):
        F.wkv(*map(Tensor, (w, u, k, v)))


def test_gradients_at_extreme_decays_are_derivatives():
    for w in (1e-3, 0.3, 4.0, 12.0):
        _, u, k, v = arrays(2, 9, 2)
        assert gradcheck(FUSED["wkv"].fused, [Tensor(a, True) for a in (np.full(2, w), u, k, v)])


def test_limits():
    """Without forgetting a mean over all, with instant forgetting of the last two; u decides on the last."""
    _, u, k, v = arrays(1, 7, 4)
    weights = np.exp(np.concatenate([k[0, :6], [k[0, 6] + u]]))
    out = F.wkv(*map(Tensor, (np.full(4, 1e-12), u, k, v))).data[0, 6]
    np.testing.assert_allclose(out, (weights * v[0]).sum(0) / weights.sum(0), rtol=1e-10)
    out = F.wkv(*map(Tensor, (np.full(4, 1e12), u, k, v))).data[0, 6]
    np.testing.assert_allclose(out, (weights * v[0])[5:].sum(0) / weights[5:].sum(0), rtol=1e-12)
    for sign, t in ((1, 6), (-1, 5)):
        out = F.wkv(*map(Tensor, (np.full(4, 1e12), np.full(4, sign * 1e3), k, v))).data[0, 6]
        np.testing.assert_allclose(out, v[0, t], rtol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-13)])
@pytest.mark.parametrize("cut", [[1] * 40, [39, 1], [1, 39], [13, 20, 7]], ids=str)
def test_a_text_in_parts(cut, dtype, tolerance):
    """Each part goes on from the state that the last left: the recurrent form, if each is one token."""
    w, u, k, v = arrays(3, 40, 5, dtype=dtype)
    with no_grad():
        whole = F.wkv(*map(Tensor, (w, u, k, v))).data
        state, outs, start = None, [], 0
        for size in cut:
            part = k[:, start : start + size], v[:, start : start + size]
            outs.append(F.wkv(Tensor(w), Tensor(u), *map(Tensor, part), state).data)
            state = F.wkv_state(w, *part, state)
            start += size
        np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, rtol=0, atol=tolerance)
        for a, b in zip(state, F.wkv_state(w, k, v), strict=True):
            assert a.dtype == dtype and a.shape == (3, 5)
            np.testing.assert_allclose(a, b, rtol=10 * tolerance, atol=tolerance)


def test_a_state_is_the_two_sums():
    w, _, k, v = arrays(2, 30, 3)
    aa, bb, pp = F.wkv_state(w, k, v)
    weights = np.exp(k - np.arange(29, -1, -1)[:, None] * w)
    np.testing.assert_allclose(aa * np.exp(pp), (weights * v).sum(1), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(bb * np.exp(pp), weights.sum(1), rtol=1e-12)
    assert (bb >= 1).all() and (bb <= 30).all()  # pp is the largest exponent


def test_a_long_text_leaves_a_finite_state():
    for extreme in EXTREMES.values():
        w, u, k, v = arrays(1, 1000, 6, dtype=np.float32, **extreme)
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            state = F.wkv_state(w, k, v)
            assert all(a.dtype == np.float32 and np.isfinite(a).all() for a in state)
            out = F.wkv(Tensor(w), Tensor(u), Tensor(k[:, :1]), Tensor(v[:, :1]), state).data
        assert np.isfinite(out).all()


def test_what_went_in_and_came_out_stays_as_it_was():
    """One row of a batch is a view of the input in the order of time, which nothing may write to."""
    inputs = arrays(1, 20, 4)
    rng = np.random.default_rng(2)
    state = rng.normal(0, 1, (1, 4)), rng.uniform(0.5, 2, (1, 4)), rng.normal(0, 1, (1, 4))
    tensors, g = [Tensor(a.copy(), requires_grad=True) for a in inputs], rng.normal(0, 1, (1, 20, 4))
    past, upstream = tuple(a.copy() for a in state), g.copy()
    out = F.wkv(*tensors, past)
    before = out.data.copy()
    out.backward(upstream)
    F.wkv_state(tensors[0].data, tensors[2].data, tensors[3].data, past)
    for a, b in zip([*(t.data for t in tensors), *past, out.data, upstream], [*inputs, *state, before, g]):
        assert np.array_equal(a, b)


def test_an_unrecorded_pass_keeps_nothing():
    tensors = [Tensor(a, requires_grad=True) for a in arrays(2, 5, 3)]
    with no_grad():
        assert F.wkv(*tensors).node is None


@pytest.mark.parametrize("fused", [True, False])
def test_arguments_that_do_not_fit_are_named(fused):
    operation = FUSED["wkv"].fused if fused else FUSED["wkv"].composed
    w, u, k, v = (Tensor(a) for a in arrays(2, 3, 4))
    short = Tensor(np.ones(3))
    empty = Tensor(np.ones((2, 0, 4)))
    for bad in (
        (short, u, k, v),
        (w, short, k, v),
        (w, u, k, v[:, 1:]),
        (w, u, k[0], v[0]),
        (w, u, empty, empty),
    ):
        with pytest.raises(ValueError, match=r"wkv: w \(\d,\), u .* do not fit: they are \(C,\)"):
            operation(*bad)
    with pytest.raises(ValueError, match=r"wkv: a state of shapes \[\(3, 4\), .* does not fit k \(2, 3, 4\)"):
        operation(w, u, k, v, (np.ones((3, 4)), np.ones((2, 4)), np.ones((2, 4))))
