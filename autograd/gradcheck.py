"""A numerical check of any function's gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from . import backend
from .tensor import GradientError, Tensor, enable_grad, grad, no_grad


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
    differences = _Differences(function, inputs, step)
    close = lambda analytic, numeric: np.abs(analytic - numeric) <= atol + rtol * np.abs(numeric)
    for v in _upstream(function, inputs, projections, rng):
        # A fused operation computes its gradient in another way when it is to be differentiated again.
        for create_graph in (False, True)[:order]:
            for i, found in zip(checked, _vector_jacobian(function, inputs, checked, v, create_graph)):
                if projections is not None:
                    u = rng.standard_normal(found.shape)
                    u /= np.sqrt(np.sum(u * u)) or 1.0
                    if close(np.sum(found * u), differences.along(i, u) @ v):
                        continue
                _compare(i, found, differences.gradient(i, v), close)
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
) -> Iterator[np.ndarray]:
    """The gradients of the results, laid end to end, to try: random ones, or each element in turn."""
    with no_grad():
        size = sum(y.size for y in _call(function, inputs))
    if projections is not None:
        yield from (rng.standard_normal(size) for _ in range(projections))
    else:
        for unit in np.eye(size):
            yield unit * rng.choice((-1, 1)) * rng.uniform(0.5, 2)


def _weighted(results: Sequence[Tensor], v: Sequence[Any]) -> Tensor:
    """The single value v . results."""
    parts = [(y * w).sum() for y, w in zip(results, v)]
    return sum(parts[1:], parts[0])


def _vector_jacobian(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    checked: Sequence[int],
    v: np.ndarray,
    create_graph: bool,
) -> list[np.ndarray]:
    """The analytic gradients of v . results for the inputs to check."""
    results = _call(function, inputs)
    ends = np.cumsum([y.size for y in results])[:-1]
    parts = [Tensor(_like(y, part.reshape(y.shape))) for y, part in zip(results, np.split(v, ends))]
    total = _weighted(results, parts)
    if not total.requires_grad:
        return [np.zeros(inputs[i].shape) for i in checked]
    found = grad(total, [inputs[i] for i in checked], create_graph=create_graph)
    return [g.numpy() for g in found]


class _Differences:
    """The numerical derivatives of a function's results, laid end to end as one vector (M,)."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], step: float) -> None:
        self.function, self.inputs, self.step = function, inputs, step
        self._jacobians: dict[int, np.ndarray] = {}

    def along(self, i: int, direction: np.ndarray) -> np.ndarray:
        """d/dt of the results at input_i + t * direction, t = 0: (M,)."""

        def results(t: float) -> np.ndarray:
            moved = list(self.inputs)
            moved[i] = Tensor(moved[i].data + _like(moved[i], t * direction))
            with no_grad():
                return np.concatenate([y.numpy().reshape(-1) for y in _call(self.function, moved)])

        h = self.step
        near, far = results(h) - results(-h), results(2 * h) - results(-2 * h)
        return (8 * near - far) / (12 * h)

    def gradient(self, i: int, v: np.ndarray) -> np.ndarray:
        """The gradient of v . results for input i, in its shape."""
        shape, n = self.inputs[i].shape, self.inputs[i].size
        if i not in self._jacobians:
            rows = [self.along(i, unit) for unit in np.eye(n).reshape(n, *shape)]
            self._jacobians[i] = np.array(rows).reshape(n, v.size)
        return (self._jacobians[i] @ v).reshape(shape)


def _compare(i: int, found: np.ndarray, expected: np.ndarray, close: Callable[..., Any]) -> None:
    """Raise GradientError at the element where the two differ most, if they differ."""
    wrong = ~close(found, expected)  # NaN is not close to anything
    if wrong.any():
        gap = np.where(wrong, np.nan_to_num(np.abs(found - expected), nan=np.inf), -1)
        element = tuple(int(k) for k in np.unravel_index(gap.argmax(), gap.shape))
        raise GradientError(
            f"input {i}, element {element}: the analytic gradient is {found[element]:.12g}, "
            f"the numerical one {expected[element]:.12g}"
        )


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
