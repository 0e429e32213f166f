"""The checker itself: planted wrong gradients must fail, at the right element, and right ones pass."""

from __future__ import annotations

import re

import numpy as np
import pytest

from autograd import GradientError, Tensor, gradcheck, no_grad
from autograd import exp as right_exp
from autograd.primitives import logsumexp, sum, tanh, unbroadcast
from autograd.tensor import fused_result, primitive

both_modes = pytest.mark.parametrize("projections", [None, 1, 3])


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).uniform(0.5, 1.5, shape), requires_grad=True)


def blamed(function, inputs, **how) -> tuple[int, tuple[int, ...], float, float]:
    """(input, element, analytic, numeric) of the error that the check must raise."""
    with pytest.raises(GradientError) as caught:
        gradcheck(function, inputs, **how)
    number = r"([-+.\de]+|nan)"
    message = str(caught.value)
    found = re.search(
        rf"input (\d+), element \(([\d, ]*)\): the analytic gradient is {number}, the numerical one {number}",
        message,
    )
    assert found, message
    element = tuple(int(i) for i in found[2].split(",") if i.strip())
    return int(found[1]), element, float(found[3]), float(found[4])


@both_modes
def test_missing_factor(projections):
    def cube(a):  # 2 a^2 instead of 3 a^2
        return primitive("cube", a.data**3, (a, lambda g: g * 2 * a * a))

    x = leaf(2, 3)
    i, element, analytic, numeric = blamed(cube, x, projections=projections)
    assert i == 0 and element in np.ndindex(2, 3)
    assert analytic / numeric == pytest.approx(2 / 3, rel=1e-6)


@both_modes
def test_wrong_sign_in_one_element(projections):
    def wrong(a):
        sign = np.ones(a.shape)
        sign[1, 2] = -1
        return primitive("exp", np.exp(a.data), (a, lambda g: g * right_exp(a) * Tensor(sign)))

    i, element, analytic, numeric = blamed(
        lambda b, a: b * wrong(a), [leaf(), leaf(2, 3)], projections=projections
    )
    assert (i, element) == (1, (1, 2))
    assert analytic == pytest.approx(-numeric, rel=1e-6)


@both_modes
def test_slightly_wrong_in_one_element(projections):
    """One part in a hundred thousand, in one element out of six."""

    def wrong(a):
        factor = np.ones(a.shape)
        factor[0, 1] += 1e-5
        return primitive("exp", np.exp(a.data), (a, lambda g: g * right_exp(a) * Tensor(factor)))

    assert blamed(wrong, leaf(2, 3), projections=projections)[:2] == (0, (0, 1))


@both_modes
def test_missing_unbroadcast(projections):
    def add(a, b):
        return primitive("add", a.data + b.data, (a, lambda g: g), (b, lambda g: g))

    gradcheck(add, [leaf(2, 3), leaf(2, 3, seed=1)], projections=projections)
    message = r"input 1 has shape \(3,\), but its gradient \(2, 3\)"
    with pytest.raises(GradientError, match=message):
        gradcheck(add, [leaf(2, 3), leaf(3)], projections=projections)


@both_modes
def test_unbroadcast_that_takes_a_slice_instead_of_the_sum(projections):
    def add(a, b):
        return primitive("add", a.data + b.data, (a, lambda g: unbroadcast(g, a.shape)), (b, lambda g: g[0]))

    assert blamed(add, [leaf(2, 3), leaf(3)], projections=projections)[0] == 1


def softmax(a, gradient):
    y = right_exp(a - logsumexp(a, -1, keepdims=True))
    return primitive("softmax", y.data, (a, lambda g: gradient(g, y)))


@both_modes
def test_softmax_gradient_that_is_right_for_ones_only(projections):
    """Softmax sums to one, so an all-ones upstream has the gradient zero: a diagonal-only error hides."""

    def wrong(g, y):
        return 3 * y * (g - sum(g * y, -1, keepdims=True))

    x = leaf(2, 4)
    total = softmax(x, wrong).sum()
    total.backward()
    np.testing.assert_allclose(x.grad.data, 0, atol=1e-15)  # so the usual test with .sum() passes
    i, _, analytic, numeric = blamed(lambda a: softmax(a, wrong), x, projections=projections)
    assert i == 0 and analytic == pytest.approx(3 * numeric, rel=1e-6)
    gradcheck(lambda a: softmax(a, lambda g, y: wrong(g, y) / 3), x, projections=projections)


@both_modes
def test_wrong_second_derivative_only(projections):
    def wrong(a):
        t = tanh(a).data  # a constant: right once, but the second derivative forgets it

        return primitive("tanh", t, (a, lambda g: g * Tensor(1 - t * t)))

    x = leaf(3)
    assert gradcheck(wrong, x, projections=projections)
    with pytest.raises(GradientError, match="second order.*input 0, element"):
        gradcheck(wrong, x, projections=projections, order=2)
    assert gradcheck(tanh, x, projections=projections, order=2)


@both_modes
def test_fused_operation_whose_composition_is_something_else(projections):
    """Right when differentiated once, and consistently wrong when differentiated twice."""

    def square(a):
        def composition():
            source = a * 1.0
            return source * source * source, [source]

        return fused_result("square", a.data**2, [a], lambda g, needed: [g * 2 * a.data], composition)

    x = leaf(2)
    assert gradcheck(square, x, projections=projections)
    assert blamed(square, x, projections=projections, order=2)[0] == 0


@both_modes
def test_nan_gradient(projections):
    def wrong(a):
        slope = np.exp(a.data)
        slope[2] = np.nan
        return primitive("exp", np.exp(a.data), (a, lambda g: g * Tensor(slope)))

    i, element, analytic, numeric = blamed(wrong, leaf(4), projections=projections)
    assert (i, element) == (0, (2,))
    assert np.isnan(analytic) and np.isfinite(numeric)


@both_modes
def test_gradient_that_is_not_propagated(projections):
    def wrong(a, b):
        return a * b.detach()

    i, _, analytic, numeric = blamed(wrong, [leaf(2), leaf(2)], projections=projections)
    assert i == 1 and analytic == 0 and abs(numeric) > 0.1


@both_modes
def test_wrong_for_one_of_several_results(projections):
    def wrong(a):
        return a * a, primitive("exp", np.exp(a.data), (a, lambda g: -g * right_exp(a)))

    assert blamed(wrong, leaf(2), projections=projections)[0] == 0


def test_names_the_exact_values():
    """The Jacobian of 2 a at a one-hot v: analytic 5 v against 2 v."""

    def wrong(a):
        return primitive("double", 2 * a.data, (a, lambda g: g * 5))

    i, element, analytic, numeric = blamed(wrong, leaf())
    assert (i, element) == (0, ()) and analytic / numeric == pytest.approx(2.5, rel=1e-9)


@both_modes
def test_right_gradients_pass(projections):
    inputs = [leaf(2, 3), leaf(3, 2), Tensor(np.ones(2, "int64"))]
    assert gradcheck(lambda a, b, n: tanh(a @ b) * n, inputs, projections=projections, order=2) is True
    assert gradcheck(lambda a: a.sum() * 0.0 + 1.0, leaf(0, 3), projections=projections) is True


def test_leaves_the_inputs_alone():
    x = leaf(3)
    before = x.data.copy()
    gradcheck(tanh, x, order=2)
    assert x.grad is None and np.array_equal(x.data, before)


def test_inside_no_grad_it_cannot_see_gradients():
    with no_grad(), pytest.raises(GradientError):
        gradcheck(tanh, leaf(2))


def test_refuses_what_it_cannot_check():
    with pytest.raises(TypeError, match="input 1 is float32"):
        gradcheck(lambda a, b: a * b, [leaf(2), Tensor(np.ones(2, "float32"), requires_grad=True)])
    with pytest.raises(ValueError, match="no input has requires_grad"):
        gradcheck(tanh, Tensor(np.ones(2)))
