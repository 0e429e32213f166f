"""What every operation of the op table must satisfy, on any device.

The functions take a row of the table, the operation, a case and the array library `xp` to run on: NumPy,
CuPy, or the stand-in for CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autograd import Tensor, grad, gradcheck

from .op_table import Case, Row

FULL_JACOBIAN = {1: 150, 2: 60}  # by order: elements of the results times elements of the inputs
# Rounding (eps / step, 1e-13) and the step's own error (step^4 / 30 times the fifth derivative, up to 1e5 for
# second derivatives near the edge of a domain) stay below 1e-8 of the size of the function. A wrong factor or
# sign is off by 1e-1.
TOLERANCE = {"rtol": 1e-7, "atol": 1e-8}
EPS32 = float(np.finfo(np.float32).eps)


def run(row: Row, operation: Callable[..., Any], tensors: list[Tensor], case: Case, xp: Any) -> list[Tensor]:
    args, kwargs = case.constants(xp, tensors[0].dtype.name)
    result = row.call(operation, tensors, *args, **kwargs)
    return [result] if isinstance(result, Tensor) else list(result)


def weighted(results: Sequence[Tensor], upstream: Sequence[np.ndarray], xp: Any) -> Tensor:
    """The single value sum(upstream * result), whose gradients are the vector-Jacobian products."""
    terms = [(y * Tensor(xp.asarray(g.astype(y.dtype)))).sum() for y, g in zip(results, upstream)]
    return sum(terms[1:], terms[0])


def gradients(results: list[Tensor], tensors: list[Tensor], upstream: list[np.ndarray], xp: Any) -> list[Any]:
    """The gradients of sum(upstream * result), as `backward` leaves them in the leaves."""
    for tensor in tensors:
        tensor.grad = None
    total = weighted(results, upstream, xp)
    if total.requires_grad:
        total.backward()
    return [tensor.grad.data if tensor.grad is not None else xp.zeros_like(tensor.data) for tensor in tensors]


def upstream_of(results: Sequence[Tensor]) -> list[np.ndarray]:
    """Random gradients of the results; not all-ones, for which a wrong softmax gradient is right."""
    rng = np.random.default_rng(0)
    return [rng.uniform(0.5, 2, y.shape) * rng.choice((-1, 1), y.shape) for y in results]


def check_gradients(
    row: Row, operation: Callable[..., Any], case: Case, xp: Any = np, order: int = 1
) -> None:
    """The whole Jacobian where it is small, then random projections; with order 2 those of the gradients."""
    tensors = case.tensors(xp)
    results = run(row, operation, tensors, case, xp)
    n, m = sum(t.size for t in tensors), sum(y.size for y in results)
    work = n * m if order == 1 else n * (n + m)

    def function(*inputs: Tensor) -> list[Tensor]:
        return run(row, operation, list(inputs), case, xp)

    if work <= FULL_JACOBIAN[order]:
        gradcheck(function, tensors, order=order, **TOLERANCE)
    gradcheck(function, tensors, order=order, projections=1, **TOLERANCE)


def check_values(
    row: Row, operation: Callable[..., Any], reference: Callable[..., Any], case: Case, xp: Any = np
) -> None:
    """float64 results agree with the reference on NumPy arrays, and live on the device."""
    arrays = [x.array() for x in case.inputs]
    args, kwargs = case.constants()
    expected = row.call(reference, arrays, *args, **kwargs)
    found = run(row, operation, case.tensors(xp), case, xp)
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    assert len(found) == len(expected)
    for y, z in zip(found, expected):
        assert isinstance(y.data, xp.ndarray) and y.requires_grad == row.differentiable
        assert y.shape == np.shape(z) and y.dtype == np.asarray(z).dtype
        np.testing.assert_allclose(y.numpy(), z, rtol=1e-12, atol=1e-12)


def check_float32(row: Row, operation: Callable[..., Any], case: Case, xp: Any = np) -> None:
    """float32 stays float32, result and gradient, and is within rounding of float64 on the same inputs."""
    single = case.tensors(xp, "float32")
    double = [Tensor(t.data.astype("float64"), requires_grad=True) for t in single]
    results, expected = (run(row, operation, tensors, case, xp) for tensors in (single, double))
    upstream = [g.astype("float32") for g in upstream_of(results)]
    pairs = list(zip([y.data for y in results], [y.data for y in expected]))
    pairs += zip(gradients(results, single, upstream, xp), gradients(expected, double, upstream, xp))
    for found, exact in pairs:
        assert found.dtype == np.float32 and isinstance(found, xp.ndarray) and found.shape == exact.shape
        found, exact = Tensor(found).numpy(), Tensor(exact).numpy()
        # Sums of up to MAX_SIZE terms of size up to about 10, each rounded: a few eps of the largest term.
        bound = 64 * EPS32 * max(1.0, np.max(np.abs(exact), initial=0))
        np.testing.assert_allclose(found, exact, rtol=0, atol=bound)


def check_views(row: Row, operation: Callable[..., Any], case: Case, xp: Any = np) -> None:
    """Views give what contiguous copies give, and nothing that was handed in is changed."""
    views, copies = (
        case.tensors(xp),
        [Tensor(xp.asarray(x.values.copy()), requires_grad=True) for x in case.inputs],
    )
    found, expected = (run(row, operation, tensors, case, xp) for tensors in (views, copies))
    for y, z in zip(found, expected):
        np.testing.assert_allclose(y.numpy(), z.numpy(), rtol=1e-13, atol=1e-13)
    upstream = upstream_of(found)
    for g, h in zip(gradients(found, views, upstream, xp), gradients(expected, copies, upstream, xp)):
        np.testing.assert_allclose(Tensor(g).numpy(), Tensor(h).numpy(), rtol=1e-12, atol=1e-12)
    for tensor, x in zip(views, case.inputs):
        assert np.array_equal(tensor.numpy(), x.values)


def second_gradients(
    results: list[Tensor], tensors: list[Tensor], upstream: list[np.ndarray], xp: Any
) -> list[Tensor]:
    """The gradients of the sum of w * (the gradients of the tensors), with random weights w."""
    first = grad(weighted(results, upstream, xp), tensors, create_graph=True)
    total = weighted(first, upstream_of(first), xp)
    return list(grad(total, tensors)) if total.requires_grad else [t * 0.0 for t in tensors]


def everything(row: Row, operation: Callable[..., Any], case: Case, xp: Any) -> list[Tensor]:
    """Results, gradients and second gradients."""
    tensors = case.tensors(xp)
    results = run(row, operation, tensors, case, xp)
    if not row.differentiable:
        return results
    upstream = upstream_of(results)
    again = run(row, operation, tensors, case, xp)  # second gradients free what they walk
    second = second_gradients(again, tensors, upstream, xp)
    return results + [Tensor(g) for g in gradients(results, tensors, upstream, xp)] + second


def check_device(row: Row, operation: Callable[..., Any], case: Case, xp: Any) -> None:
    """On another device: the values and gradients, first and second, of the CPU; float32; views."""
    (expected, found) = (everything(row, operation, case, module) for module in (np, xp))
    for y, z in zip(found, expected, strict=True):
        assert isinstance(y.data, xp.ndarray) and y.shape == z.shape and y.dtype == z.dtype
        np.testing.assert_allclose(y.numpy(), z.data, rtol=1e-11, atol=1e-12)
    if row.differentiable:
        check_float32(row, operation, case, xp)
        check_views(row, operation, case, xp)
