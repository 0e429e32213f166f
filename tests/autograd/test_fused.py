"""Every fused operation: equal to its composition from primitives, in value and in both derivatives."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autograd.attention
import autograd.fused
import autograd.wkv
from autograd import Tensor, functional, grad, gradcheck, no_grad
from autograd.fused import FUSED as OPERATIONS
from autograd.tensor import RowsGradient

from .checks import (
    TOLERANCE,
    check_float32,
    check_gradients,
    check_values,
    check_views,
    gradients,
    run,
    upstream_of,
)  # fmt: skip
from .op_table import FUSED

every = pytest.mark.parametrize("name", sorted(FUSED))
PUBLIC_NAMES = {"embedding_lookup": "embedding"}


def test_every_fused_operation_has_a_row():
    assert sorted(FUSED) == sorted(OPERATIONS)


@every
def test_public_name(name):
    assert PUBLIC_NAMES.get(name, name) in functional.__all__


@every
@given(data=st.data())
def test_value(name, data):
    row = FUSED[name]
    check_values(row, OPERATIONS[name].fused, row.numpy, data.draw(row.cases))


@every
@given(data=st.data(), block=st.sampled_from([1, 3, 1 << 18]))
def test_equals_composition(name, data, block):
    """Also in blocks so small that each array takes several."""
    row, operation = FUSED[name], OPERATIONS[name]
    case = data.draw(row.cases)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd.fused, "_BLOCK", block)
        patch.setattr(autograd.attention, "_QUERY_BLOCK", min(block, 64))
        patch.setattr(autograd.wkv, "_BLOCK", block)
        check_equals_composition(row, operation, case)


def check_equals_composition(row, operation, case):
    fused, composed = case.tensors(), case.tensors()
    (found,), (expected,) = (
        run(row, operation.fused, fused, case, np),
        run(row, operation.composed, composed, case, np),
    )
    np.testing.assert_allclose(found.data, expected.data, rtol=1e-12, atol=1e-13)
    upstream = upstream_of([found])
    for g, h in zip(gradients([found], fused, upstream, np), gradients([expected], composed, upstream, np)):
        np.testing.assert_allclose(g, h, rtol=1e-10, atol=1e-11)
    with no_grad():
        (unrecorded,) = run(row, operation.fused, fused, case, np)
    assert np.array_equal(unrecorded.data, found.data) and not unrecorded.requires_grad


@every
@given(data=st.data())
@settings(max_examples=12)
def test_gradient(name, data):
    row = FUSED[name]
    check_gradients(row, OPERATIONS[name].fused, data.draw(row.cases))


@pytest.mark.slow
@every
@given(data=st.data())
@settings(max_examples=8)
def test_second_order(name, data):
    row = FUSED[name]
    check_gradients(row, OPERATIONS[name].fused, data.draw(row.cases), order=2)


@every
@given(data=st.data())
@settings(max_examples=5)
def test_inputs_that_depend_on_each_other(name, data):
    """A path from one input to another must not count twice when the composition is differentiated."""
    row = FUSED[name]
    case = data.draw(row.cases)

    def function(*tensors):
        first = tensors[0] * 1.0
        linked = [first, *(t + 0.1 * first.sum() for t in tensors[1:])]
        return run(row, OPERATIONS[name].fused, linked, case, np)

    gradcheck(function, case.tensors(), order=2, projections=2, **TOLERANCE)


@every
@given(data=st.data())
@settings(max_examples=12)
def test_float32(name, data):
    row = FUSED[name]
    check_float32(row, OPERATIONS[name].fused, data.draw(row.cases))


@every
@given(data=st.data())
@settings(max_examples=12)
def test_views(name, data):
    row = FUSED[name]
    check_views(row, OPERATIONS[name].fused, data.draw(row.cases))


@every
@given(data=st.data())
@settings(max_examples=10)
def test_gradients_are_arrays_of_their_own(name, data):
    """The walk adds to them in place: no two may share memory, nor any with what others hold."""
    row = FUSED[name]
    case = data.draw(row.cases)
    tensors = case.tensors()
    (y,) = run(row, OPERATIONS[name].fused, tensors, case, np)
    (g,) = upstream_of([y])
    before = g.copy()
    found = [
        array.added_to(None) if isinstance(array, RowsGradient) else Tensor(array).data
        for array in y.node.gradients(g, [True] * len(tensors))
    ]
    held = [g, y.data, *(t.data for t in tensors)]
    for i, array in enumerate(found):
        assert array.shape == tensors[i].shape and array.flags.writeable
        assert not any(np.shares_memory(array, other) for other in [*held, *found[:i]])
    assert np.array_equal(g, before)


@every
@given(data=st.data())
@settings(max_examples=10)
def test_only_needed_gradients(name, data):
    """A constant among the inputs gets no gradient, the others get the same as before."""
    row = FUSED[name]
    case = data.draw(row.cases)
    tensors = case.tensors()
    needed = data.draw(st.lists(st.booleans(), min_size=len(tensors), max_size=len(tensors)))
    (y,) = run(row, OPERATIONS[name].fused, tensors, case, np)
    upstream = upstream_of([y])
    expected = gradients([y], tensors, upstream, np)
    some = [Tensor(t.data, requires_grad=need) for t, need in zip(tensors, needed)]
    (y,) = run(row, OPERATIONS[name].fused, some, case, np)
    assert y.requires_grad == any(needed)
    if not y.requires_grad:
        return
    assert [edge is not None for edge in y.node.edges] == needed
    found = y.node.gradients(upstream[0], needed)
    assert [g is not None for g in found] == needed
    (y,) = run(row, OPERATIONS[name].fused, some, case, np)
    for g, h, need in zip(gradients([y], some, upstream, np), expected, needed):
        np.testing.assert_allclose(g, h if need else 0 * h, rtol=1e-12, atol=1e-13)


@every
@given(data=st.data())
@settings(max_examples=10)
def test_second_derivatives_with_constants(name, data):
    """Through the composition, which holds no more of the constants and of the rest than it needs."""
    row = FUSED[name]
    case = data.draw(row.cases)
    needed = data.draw(st.lists(st.booleans(), min_size=len(case.inputs), max_size=len(case.inputs)))
    found = {}
    for operation in (OPERATIONS[name].fused, OPERATIONS[name].composed):
        some = [Tensor(t.data, requires_grad=need) for t, need in zip(case.tensors(), needed)]
        learned = [t for t in some if t.requires_grad]
        if not learned:
            return
        (y,) = run(row, operation, some, case, np)
        weight = Tensor(upstream_of([y])[0], requires_grad=True)
        if not y.requires_grad:  # such as wkv of one position, with a decay alone that learns
            assert all(not g.data.any() for g in found[OPERATIONS[name].fused])
            return
        first = grad(y, learned, weight, create_graph=True)
        total = sum((g * Tensor(u)).sum() for g, u in zip(first, upstream_of(first)))
        found[operation] = [*first, *(grad(total, [weight, *learned]) if total.requires_grad else ())]
    for g, h in zip(*found.values()):
        np.testing.assert_allclose(g.data, h.data, rtol=1e-10, atol=1e-11)


def test_second_derivatives_of_an_input_that_is_not_read():
    """One position of wkv does without the decay."""
    w, u, k, v = (Tensor(np.ones(shape)) for shape in ((2,), (2,), (1, 1, 2), (1, 1, 2)))
    w.requires_grad = True
    (dw,) = grad(functional.wkv(w, u, k, v).sum(), w, create_graph=True)
    assert dw.shape == (2,) and not dw.data.any()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_linear_map_keeps_no_input(fused, frozen):
    """An input is kept for the gradient of a weight that learns, and for nothing else."""
    operation = OPERATIONS["linear"].fused if fused else OPERATIONS["linear"].composed
    x, weight, bias = (
        Tensor(np.ones(shape), requires_grad=learns)
        for shape, learns in (((3, 4), True), ((5, 4), not frozen), (5, False))
    )
    middle = x * 2.0
    reference = weakref.ref(middle.data)
    result = operation(middle, weight, bias)
    del middle
    assert (reference() is None) == frozen
    result.sum().backward()
    assert np.array_equal(x.grad.data, np.full((3, 4), 10.0))
    assert weight.grad is None if frozen else np.array_equal(weight.grad.data, np.full((5, 4), 6.0))


@every
@given(data=st.data())
@settings(max_examples=3)
def test_use_fused_switches_to_the_composition(name, data):
    row, public = FUSED[name], getattr(functional, PUBLIC_NAMES.get(name, name))
    case = data.draw(row.cases)
    case.kwargs.pop("keep", None)  # dropout's mask, which the public functions draw themselves
    functional.use_fused(False)
    try:
        (composed,) = run(row, public, case.tensors(), case, np)
    finally:
        functional.use_fused(True)
    (fused,) = run(row, public, case.tensors(), case, np)
    assert composed.node.composition is None and fused.node.composition is not None


@pytest.mark.parametrize("fused", [True, False])
def test_arguments_that_do_not_fit_are_named(fused):
    pick = lambda name: OPERATIONS[name].fused if fused else OPERATIONS[name].composed
    x = Tensor(np.ones((2, 3, 4)))
    for targets in ((3, 2), (2,), (2, 3, 1)):
        with pytest.raises(ValueError, match="targets .* do not fit logits"):
            pick("cross_entropy")(x, np.zeros(targets, int))
        with pytest.raises(ValueError, match="targets .* do not fit logits"):
            pick("linear_cross_entropy")(x, Tensor(np.ones((5, 4))), np.zeros(targets, int))
    right = np.zeros((2, 3), int)
    for settings_ in ({"reduction": "none"}, {"label_smoothing": 1.5}):
        with pytest.raises(ValueError, match="cross_entropy: "):
            pick("cross_entropy")(x, right, **settings_)
    for weight, bias in (((5, 3), None), ((4,), None), ((5, 4), (4,)), ((5, 4), (1,))):
        with pytest.raises(ValueError, match=r"linear: x \(2, 3, 4\)"):
            pick("linear")(x, Tensor(np.ones(weight)), None if bias is None else Tensor(np.ones(bias)))
    with pytest.raises(ValueError, match=r"self_attention: qkv \(2, 3, 4\)"):
        pick("self_attention")(x, 2)
    for heads, shapes in ((3, [(2, 3, 4)] * 3), (2, [(2, 3, 4), (2, 5, 4), (2, 6, 4)]), (2, [(3, 4)] * 3)):
        with pytest.raises(ValueError, match=f"multi_head_attention: q .* {heads} heads"):
            pick("multi_head_attention")(*(Tensor(np.ones(shape)) for shape in shapes), heads)
    for causal, window in ((True, 0), (False, 2)):
        with pytest.raises(ValueError, match=f"attention: window={window}"):
            pick("self_attention")(Tensor(np.ones((2, 3, 6))), 2, causal, window)


def test_attention_weights_are_what_attention_weighs_the_values_with():
    """Shown by values that are the unit vectors. A query that sees nothing has no weights."""
    rng = np.random.default_rng(0)
    q, k = Tensor(rng.normal(size=(2, 4, 3, 5))), Tensor(rng.normal(size=(2, 2, 6, 5)))
    v = Tensor(np.broadcast_to(np.eye(6), (2, 2, 6, 6)).copy())
    for settings_ in ({}, {"causal": True, "window": 2}, {"key_lengths": np.array([0, 4]), "scale": 0.7}):
        p = functional.attention_weights(q, k, **settings_).numpy()  # (B, H, n, m)
        np.testing.assert_allclose(p, functional.attention(q, k, v, **settings_).numpy(), rtol=0, atol=1e-15)
        seen = np.array([1.0, 1.0]) if "scale" not in settings_ else np.array([0.0, 1.0])
        np.testing.assert_allclose(p.sum(-1), np.broadcast_to(seen[:, None, None], (2, 4, 3)), rtol=1e-14)


@pytest.mark.parametrize("fused", [True, False])
def test_an_ignored_row_may_hold_anything(fused):
    """Impossible classes, of probability 0, in a row that does not count: no infinity times zero."""
    logits = Tensor(np.array([[-np.inf, 1.0, 2.0], [0.0, 1.0, 2.0]]), requires_grad=True)
    functional.use_fused(fused)
    try:
        loss = functional.cross_entropy(logits, np.array([-100, 1]))
        loss.backward()
    finally:
        functional.use_fused(True)
    e = np.exp([0.0, 1.0, 2.0])
    np.testing.assert_allclose(loss.item(), np.log(e.sum()) - 1, rtol=1e-14)
    np.testing.assert_allclose(logits.grad.data, [[0, 0, 0], e / e.sum() - [0, 1, 0]], atol=1e-15)
