"""The kernel as an operation with gradients: what attention does on a GPU, here done by the emulator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autograd.functional as F
from autograd import Tensor, flash, grad, no_grad
from autograd.attention import attention_composed, multi_head_attention_composed, self_attention_composed
from autograd.rotary import rotary_attention_composed
from kernels.emulator.build import EmulatorUnavailable, compiler

try:
    compiler()
except EmulatorUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def as_on_a_card(monkeypatch):
    """NumPy arrays pass for arrays on a GPU, so attention takes the kernel, which the emulator then runs."""
    monkeypatch.setattr(flash, "on_card", lambda x: True)
    yield
    F.use_flash()


def launches(monkeypatch) -> list[str]:
    """The calls of the kernel from here on, by name, in a list that grows."""
    calls = []
    for name in ("flash_attention", "flash_attention_backward"):
        call = getattr(flash.kernels, name)
        monkeypatch.setattr(
            flash.kernels,
            name,
            lambda *a, _call=call, _name=name, **k: calls.append(_name) or _call(*a, **k),
        )
    return calls


def check(operation, composed, arrays, tolerance, **keywords):
    """Values and gradients of the float32 operation, against the composition in float64, for a random g."""
    tensors = [Tensor(x.astype(np.float32), requires_grad=True) for x in arrays]
    exact = [Tensor(x, requires_grad=True) for x in arrays]
    out, expected = operation(*tensors, **keywords), composed(*exact, **keywords)
    assert out.dtype == np.float32
    g = np.random.default_rng(1).standard_normal(out.shape)
    found = [out, *grad(out, tensors, Tensor(g.astype(np.float32)))]
    wanted = [expected, *grad(expected, exact, Tensor(g))]
    for x, y in zip(found, wanted):
        assert x.shape == y.shape and x.dtype == np.float32
        size = max(1.0, np.abs(y.data).max(initial=0))
        np.testing.assert_allclose(x.data, y.data, rtol=0, atol=tolerance * size)


@st.composite
def attentions(draw):
    B, H_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n, m, d = draw(st.integers(0, 70)), draw(st.integers(0, 70)), draw(st.integers(1, 64))
    keywords = {"causal": draw(st.booleans())}
    if keywords["causal"] and draw(st.booleans()):
        keywords["window"] = draw(st.integers(1, 80))
    if draw(st.booleans()):
        keywords["key_lengths"] = np.array(draw(st.lists(st.integers(0, m), min_size=B, max_size=B)))
    if draw(st.booleans()):
        keywords["scale"] = draw(st.floats(0.05, 1))
    return (B, H_kv * group, H_kv, n, m, d, draw(st.integers(0, 99))), keywords


@given(attentions())
@settings(max_examples=20)
def test_attention(as_on_a_card, drawn):
    (B, H, H_kv, n, m, d, seed), keywords = drawn
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape) for shape in ((B, H, n, d), (B, H_kv, m, d), (B, H_kv, m, d))]
    check(F.attention, attention_composed, arrays, 1e-5, **keywords)


def test_the_other_doors(as_on_a_card, monkeypatch):
    calls = launches(monkeypatch)
    rng = np.random.default_rng(0)
    check(
        F.self_attention,
        self_attention_composed,
        [rng.standard_normal((2, 40, 3 * 64))],
        1e-5,
        heads=2,
        causal=True,
    )
    q, k, v = (rng.standard_normal((2, length, 64)) for length in (20, 30, 30))
    keywords = {"heads": 2, "key_lengths": np.array([30, 12])}
    check(F.multi_head_attention, multi_head_attention_composed, [q, k, v], 1e-5, **keywords)
    q, k, v = (rng.standard_normal((2, 33, width)) for width in (128, 64, 64))
    angles = rng.standard_normal((33, 16))
    tables = [np.cos(angles), np.sin(angles)]

    def rotary(operation):
        return lambda q, k, v: operation(q, k, v, *(t.astype(q.dtype) for t in tables), window=9)

    check(rotary(F.rotary_attention), rotary(rotary_attention_composed), [q, k, v], 1e-5)
    assert calls == ["flash_attention", "flash_attention_backward"] * 3


def test_gradients_go_into_views_without_a_copy(as_on_a_card, monkeypatch):
    """The kernel writes the gradient of qkv (B, T, 3 C) in place, through views of it."""
    seen = []
    backward = flash.kernels.flash_attention_backward
    monkeypatch.setattr(
        flash.kernels, "flash_attention_backward", lambda *a, **k: seen.append(k["into"]) or backward(*a, **k)
    )
    qkv = Tensor(np.random.default_rng(0).standard_normal((1, 10, 96)).astype(np.float32), requires_grad=True)
    F.self_attention(qkv, 1).sum().backward()
    assert all(
        np.shares_memory(view, qkv.grad if isinstance(qkv.grad, np.ndarray) else qkv.grad.data)
        for view in seen[0]
    )


@pytest.mark.parametrize("precision, tolerance", [("float16", 4e-3), ("bfloat16", 3e-2)])
def test_mixed_precision(as_on_a_card, precision, tolerance):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 2, length, 64)) for length in (50, 60, 60)]
    F.use_flash(precision=precision)
    check(F.attention, attention_composed, arrays, tolerance, causal=True)
    q = Tensor(arrays[0].astype(np.float32))
    assert F.attention_path(q, q, q) == f"flash kernel, {precision}"
    F.use_flash()
    assert F.attention_path(q, q, q) == "flash kernel, float32"
    with pytest.raises(ValueError, match="precision 'int8'"):
        F.use_flash(precision="int8")


def test_precision_is_that_of_the_forward_pass(as_on_a_card):
    q = Tensor(np.random.default_rng(0).standard_normal((1, 1, 8, 32)).astype(np.float32), requires_grad=True)
    F.use_flash(precision="float16")
    out = F.attention(q, q, q)
    F.use_flash()
    (dq,) = grad(out.sum(), q)
    assert dq.dtype == np.float32 and np.isfinite(dq.data).all()


def test_second_derivatives_go_through_the_composition(as_on_a_card):
    x = Tensor(np.random.default_rng(0).standard_normal((1, 1, 6, 4)).astype(np.float32), requires_grad=True)
    (first,) = grad((F.attention(x, x, x) ** 2).sum(), x, create_graph=True)
    (second,) = grad((first**2).sum(), x)
    y = Tensor(x.data.astype(np.float64), requires_grad=True)
    (first,) = grad((attention_composed(y, y, y) ** 2).sum(), y, create_graph=True)
    (expected,) = grad((first**2).sum(), y)
    np.testing.assert_allclose(second.data, expected.data, rtol=1e-3, atol=1e-3)


def test_nothing_is_kept_without_a_graph(as_on_a_card):
    q = Tensor(np.zeros((1, 1, 3, 32), np.float32), requires_grad=True)
    with no_grad():
        assert not F.attention(q, q, q).requires_grad


def test_what_the_kernel_cannot_do_takes_the_array_path(as_on_a_card, monkeypatch):
    calls = launches(monkeypatch)
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(rng.standard_normal((1, 2, 5, 8)).astype(np.float32)) for _ in range(3))
    wide = Tensor(rng.standard_normal((1, 2, 5, 130)).astype(np.float32))
    double = Tensor(q.data.astype(np.float64))

    F.attention(q, k, v, dropout=0.5)
    assert F.attention_path(q, k, v, dropout=0.5) == "array operations: dropout of the probabilities"
    F.attention(wide, wide, wide)
    assert "heads of 130 and 130" in F.attention_path(wide, wide, wide)
    F.attention(q, k, wide)
    assert "heads of 8 and 130" in F.attention_path(q, k, wide)
    F.attention(double, double, double)
    assert "does not take float64" in F.attention_path(double, double, double)
    F.attention(q, k, v, scale=-1.0)
    assert "scale=-1.0" in F.attention_path(q, k, v, scale=-1.0)
    F.use_flash(False)
    F.attention(q, k, v)
    assert F.attention_path(q, k, v) == "array operations: use_flash(False)"
    assert calls == []
    F.use_flash()
    half = Tensor(k.data.astype(np.float16))
    F.attention(q, half, half)
    mixed = "array operations: q float32, k float16 and v float16 are not of one type"
    assert F.attention_path(q, half, half) == mixed
    F.use_fused(False)
    try:
        F.attention(q, k, v)
        assert F.attention_path(q, k, v) == "array operations: use_fused(False)"
    finally:
        F.use_fused(True)
    assert calls == []
    F.attention(q, k, v)
    assert calls == ["flash_attention"]


@pytest.mark.parametrize("d, needed", [(64, 49536), (96, 74112), (128, 98688)])
def test_a_card_with_too_little_shared_memory_takes_the_array_path(as_on_a_card, monkeypatch, d, needed):
    """The backward pass needs more than the forward pass, so that is asked for before the forward pass."""
    calls = launches(monkeypatch)
    x = Tensor(np.ones((1, 1, 4, d - 3), np.float32), requires_grad=True)
    monkeypatch.setattr(flash, "shared_limit", lambda array: needed - 1)
    F.attention(x, x, x).sum().backward()
    reason = f"array operations: the kernels need {needed} bytes of shared memory, more than this card has"
    assert F.attention_path(x, x, x) == reason and calls == []
    monkeypatch.setattr(flash, "shared_limit", lambda array: needed)
    assert F.attention_path(x, x, x) == "flash kernel, float32"


def test_bfloat16_with_an_older_cupy(as_on_a_card):
    class Refusing(np.ndarray):
        def astype(self, dtype, *args, **keywords):
            if dtype.__name__ == "bfloat16":
                raise ValueError("Unsupported dtype bfloat16")
            return super().astype(dtype, *args, **keywords)

    F.use_flash(precision="bfloat16")
    with pytest.raises(
        RuntimeError, match='^use_flash.*needs CuPy 14 or later, or take precision="float16"$'
    ):
        flash._rounded(np.zeros((1, 1, 2, 32), np.float32).view(Refusing))


def test_on_a_cpu_it_is_array_operations():
    q = np.zeros((1, 1, 2, 4), np.float32)
    assert F.attention_path(q, q, q) == "array operations: the arrays are not on a GPU"


def test_on_the_stand_in_for_cupy_too(strict_cupy):
    q = strict_cupy.zeros((1, 1, 2, 4), np.float32)
    assert F.attention_path(q, q, q) == "array operations: the arrays are not on a GPU"
