"""A numerical check of any function's gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from . import backend
from .tensor import Tensor, enable_grad, grad, no_grad


class GradientError(AssertionError):
    """An analytic gradient disagrees with the numerical one; the message says where."""


def gradcheck(
    function: Callable[..., Any],
    inputs: Tensor | Sequence[Tensor],
    *,
    order: int = 1,
    projections: int | None = None,
    step: float = 1e-3,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    seed: int = 0,
) -> bool:
    """True if the gradients that backward computes are the function's derivatives.

    The numerical derivative is the five-point central difference
    (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12h, off by h^4 f^(5) / 30 and by rounding, eps / h: about
    1e-12 of the function's size at h = step = 1e-3.

    Args:
        function: takes the inputs, gives a Tensor or several. It must be deterministic.
        inputs: float64 Tensors; those with requires_grad are checked.
        order: 2 also checks the gradients of the gradients.
        projections: None compares the whole Jacobian, element by element of the result. A number n compares
            v . J . u for n random pairs v, u instead: cheap for large tensors, and sure to notice all but
            freak errors. A random v finds what an all-ones v does not, as in softmax, where ones give zero.
        step: h. The function must be smooth within 2h of every input.
        rtol, atol: |analytic - numerical| may be atol + rtol * |numerical|.

    Raises:
        GradientError: naming the input, its element, the analytic value and the numerical one.
        TypeError: an input that is to be checked is not float64.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    checked = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    if not checked:
        raise ValueError("gradcheck: no input has requires_grad=True")
    for i in checked:
        if inputs[i].dtype != np.float64:
            raise TypeError(
                f"gradcheck: input {i} is {inputs[i].dtype}; differences need float64 to mean anything"
            )
    rng = np.random.default_rng(seed)
    for v in _upstream(function, inputs, projections, rng):
        analytic = _vector_jacobian(function, inputs, checked, v)
        for i, found in zip(checked, analytic):
            _compare(function, inputs, i, v, found, projections is not None, step, rtol, atol, rng)
    if order == 2:
        with no_grad():
            results = _call(function, inputs)
        upstream = [Tensor(_like(y, rng.standard_normal(y.shape)), requires_grad=True) for y in results]
        try:
            gradcheck(
                _gradients_of(function, len(inputs), checked),
                [*inputs, *upstream],
                projections=projections,
                step=step,
                rtol=rtol,
                atol=atol,
                seed=seed,
            )
        except GradientError as error:
            raise GradientError(f"second order, inputs then upstream gradients: {error}") from None
    return True


def _call(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    result = function(*inputs)
    return [result] if isinstance(result, Tensor) else list(result)


def _like(tensor: Tensor, array: np.ndarray) -> Any:
    return backend.array_module(tensor.data).asarray(array)


def _upstream(
    function: Callable[..., Any], inputs: Sequence[Tensor], projections: int | None, rng: np.random.Generator
) -> Iterator[list[Tensor]]:
    """The gradients of the results to try: random ones, or each element in turn."""
    with no_grad():
        results = _call(function, inputs)
    if projections is not None:
        for _ in range(projections):
            yield [Tensor(_like(y, rng.standard_normal(y.shape))) for y in results]
        return
    for k, result in enumerate(results):
        for element in np.ndindex(result.shape):
            v = [np.zeros(y.shape) for y in results]
            v[k][element] = rng.choice((-1, 1)) * rng.uniform(0.5, 2)
            yield [Tensor(_like(y, weights)) for y, weights in zip(results, v)]


def _weighted(results: Sequence[Tensor], v: Sequence[Any]) -> Tensor:
    """The single value v . results."""
    parts = [(y * w).sum() for y, w in zip(results, v)]
    return sum(parts[1:], parts[0])


def _vector_jacobian(
    function: Callable[..., Any], inputs: Sequence[Tensor], checked: Sequence[int], v: Sequence[Tensor]
) -> list[np.ndarray]:
    total = _weighted(_call(function, inputs), v)
    if not total.requires_grad:
        return [np.zeros(inputs[i].shape) for i in checked]
    found = grad(total, [inputs[i] for i in checked])
    for i, g in zip(checked, found):
        if g.shape != inputs[i].shape:
            raise GradientError(f"input {i} has shape {inputs[i].shape}, but its gradient {g.shape}")
    return [g.numpy() for g in found]


def _derivative(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    i: int,
    direction: np.ndarray,
    v: Sequence[Tensor],
    step: float,
) -> float:
    """d/dt of v . function(..., input_i + t * direction, ...) at t = 0."""

    def value(t: float) -> float:
        moved = list(inputs)
        moved[i] = Tensor(inputs[i].data + _like(inputs[i], t * direction))
        with no_grad():
            return float(_weighted(_call(function, moved), v))

    near, far = value(step) - value(-step), value(2 * step) - value(-2 * step)
    return (8 * near - far) / (12 * step)


def _compare(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    i: int,
    v: Sequence[Tensor],
    found: np.ndarray,
    project: bool,
    step: float,
    rtol: float,
    atol: float,
    rng: np.random.Generator,
) -> None:
    def close(analytic: float, numeric: float) -> bool:
        return bool(np.abs(analytic - numeric) <= atol + rtol * np.abs(numeric))  # False for NaN

    if project and found.size:
        u = rng.standard_normal(found.shape)
        u /= np.sqrt(np.sum(u * u))
        if close(float(np.sum(found * u)), _derivative(function, inputs, i, u, v, step)):
            return
    worst: tuple[float, tuple[int, ...], float] | None = None
    for element in np.ndindex(found.shape):
        direction = np.zeros(found.shape)
        direction[element] = 1.0
        numeric = _derivative(function, inputs, i, direction, v, step)
        if not close(found[element], numeric):
            gap = np.nan_to_num(np.abs(found[element] - numeric), nan=np.inf)
            if worst is None or gap > worst[0]:
                worst = (gap, element, numeric)
    if worst is not None:
        _, element, numeric = worst
        raise GradientError(
            f"input {i}, element {element}: the analytic gradient is {found[element]:.12g}, "
            f"the numerical one {numeric:.12g}"
        )
    if project and found.size:
        raise GradientError(f"input {i}: wrong along a random direction, though no single element stands out")


def _gradients_of(
    function: Callable[..., Any], count: int, checked: Sequence[int]
) -> Callable[..., list[Tensor]]:
    """The function (inputs, upstream gradients) -> gradients of the checked inputs, differentiable again."""

    def gradients(*arguments: Tensor) -> list[Tensor]:
        given, upstream = list(arguments[:count]), arguments[count:]
        with enable_grad():  # the numerical derivatives call this under no_grad, with plain tensors
            for i in checked:
                if not given[i].requires_grad:
                    given[i] = Tensor(given[i].data, requires_grad=True)
            total = _weighted(_call(function, given), upstream)
            return list(grad(total, [given[i] for i in checked], create_graph=True))

    return gradients
