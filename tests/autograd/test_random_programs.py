"""Random programs of 5 to 30 steps with shared values: gradients against differences, and against PyTorch.

A step is written once and runs on our Tensors and on PyTorch's, for the two have the same methods. Steps are
smooth, and a value that grows is squashed, so that differences stay accurate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autograd
from autograd import Tensor, gradcheck, no_grad

MAX_SIZE, LARGE = 24, 3.0

# name: (the fewest dimensions of the operand, step)
UNARY: dict[str, tuple[int, Callable[..., Any]]] = {
    "tanh": (0, lambda lib, a: a.tanh()),
    "sigmoid": (0, lambda lib, a: a.sigmoid() * 2),
    "erf": (0, lambda lib, a: a.erf()),
    "exp": (0, lambda lib, a: (a * 0.3).exp()),
    "log": (0, lambda lib, a: (a * a + 1.5).log()),
    "sqrt": (0, lambda lib, a: (a * a + 1).sqrt()),
    "abs": (0, lambda lib, a: (a * a + 0.5).abs()),
    "reciprocal": (0, lambda lib, a: 1 / (a * a + 1)),
    "square": (0, lambda lib, a: a**2 * 0.5),
    "power": (0, lambda lib, a: (a * a + 1) ** -0.5),
    "exponential": (0, lambda lib, a: 1.5 ** (a * 0.5)),
    "minus": (0, lambda lib, a: 0.5 - a),
    "sum": (0, lambda lib, a: a.sum() * 0.2),
    "mean": (1, lambda lib, a: a.mean(dim=-1, keepdim=True)),
    "logsumexp": (1, lambda lib, a: a.logsumexp(dim=0)),
    "softmax": (1, lambda lib, a: (a - a.logsumexp(dim=-1, keepdim=True)).exp()),
    "cumsum": (1, lambda lib, a: a.cumsum(dim=-1) * 0.5),
    "flatten": (0, lambda lib, a: a.reshape(-1)),
    "swap": (2, lambda lib, a: a.transpose(0, -1)),
    "lower": (2, lambda lib, a: a.tril(1)),
    "upper": (2, lambda lib, a: a.triu()),
    "new axis": (0, lambda lib, a: a[None]),
    "first": (1, lambda lib, a: a[0]),
    "slice": (1, lambda lib, a: a[..., -2:]),
    "gather": (1, lambda lib, a: a[[0, -1, 0]]),
    "squeeze": (0, lambda lib, a: a.squeeze()),
}


def fits(a: Any, b: Any) -> bool:
    try:
        return len(np.broadcast_shapes(a.shape, b.shape)) <= 4
    except ValueError:
        return False


def matrices(a: Any, b: Any) -> bool:
    return a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1]


# name: (do the operands fit, step)
BINARY: dict[str, tuple[Callable[..., bool], Callable[..., Any]]] = {
    "add": (fits, lambda lib, a, b: (a + b) * 0.7),
    "sub": (fits, lambda lib, a, b: a - b),
    "mul": (fits, lambda lib, a, b: a * b * 0.5),
    "div": (fits, lambda lib, a, b: a / (b * b + 1)),
    "power of two": (fits, lambda lib, a, b: (a * a + 1) ** (b * 0.3)),
    "where": (fits, lambda lib, a, b: lib.where(lib.mask(np.broadcast_shapes(a.shape, b.shape)), a, b)),
    "matmul": (matrices, lambda lib, a, b: a @ b.transpose(0, 1) * 0.3),
    "einsum": (matrices, lambda lib, a, b: lib.einsum("ij,kj->ki", a, b) * 0.3),
    "inner": (lambda a, b: a.size == b.size, lambda lib, a, b: a.reshape(-1) @ b.reshape(-1) * 0.2),
    "outer": (lambda a, b: True, lambda lib, a, b: a.reshape(-1, 1) @ b.reshape(1, -1)),
    "concatenate": (lambda a, b: True, lambda lib, a, b: lib.concatenate([a.reshape(-1), b.reshape(-1)])),
    "stack": (lambda a, b: a.shape == b.shape, lambda lib, a, b: lib.stack([a, b])),
}


def library(module: Any, wrap: Callable[..., Any]) -> SimpleNamespace:
    """What is a function in both libraries, and a checkered mask of any shape."""
    names = ("concatenate", "einsum", "stack", "where")
    return SimpleNamespace(
        mask=lambda shape: wrap(np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3 != 1),
        **{name: getattr(module, name) for name in names},
    )


OURS = library(autograd, lambda mask: mask)


@dataclass(frozen=True)
class Program:
    """Steps (name, operands), an operand being the number of a leaf or of an earlier step's value."""

    leaves: Sequence[np.ndarray]
    steps: Sequence[tuple[str, tuple[int, ...]]]

    def __call__(self, lib: Any, leaves: Sequence[Any]) -> list[Any]:
        """All the values that no later step used."""
        values, used = list(leaves), set()
        for name, operands in self.steps:
            values.append(take_step(lib, name, [values[i] for i in operands]))
            used.update(operands)
        return [value for i, value in enumerate(values) if i not in used and i >= len(leaves)]


def take_step(lib: Any, name: str, operands: Sequence[Any]) -> Any:
    return (UNARY if name in UNARY else BINARY)[name][1](lib, *operands)


@st.composite
def programs(draw: Any) -> Program:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = [(2, 3), (3,), (2, 1, 2), (), (3, 3), (4, 1)]
    leaves = [rng.uniform(-1, 1, s) for s in draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=3))]
    values = [Tensor(x) for x in leaves]
    steps: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(draw(st.integers(5, 30))):
        name = draw(st.sampled_from([*UNARY, *BINARY, *BINARY]))  # as many of two operands as of one
        i = len(values) - 1 - draw(st.integers(0, min(4, len(values) - 1)))  # mostly a recent value
        operands: tuple[int, ...] = (i,)
        if name in BINARY:
            partners = [j for j, b in enumerate(values) if BINARY[name][0](values[i], b)]
            operands = (i, draw(st.sampled_from(partners))) if partners else (i, i)
        if name in BINARY and not BINARY[name][0](*(values[j] for j in operands)):
            name, operands = "tanh", (i,)
        elif name in UNARY and values[i].ndim < UNARY[name][0]:
            name = "tanh"
        with no_grad():
            value = take_step(OURS, name, [values[j] for j in operands])
        if value.size > MAX_SIZE or value.ndim > 4:
            name, operands, value = "sum", (i,), take_step(OURS, "sum", [values[i]])
        values.append(value)
        steps.append((name, operands))
        if np.max(np.abs(value.data)) > LARGE:
            values.append(value.tanh())
            steps.append(("tanh", (len(values) - 2,)))
    return Program(leaves, steps)


@given(program=programs())
@settings(max_examples=60)
def test_against_differences(program):
    leaves = [Tensor(x, requires_grad=True) for x in program.leaves]
    # Thirty steps bend more than one: the fifth derivative of the whole may reach 1e5.
    gradcheck(lambda *leaves: program(OURS, leaves), leaves, projections=2, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@given(program=programs())
@settings(max_examples=15)
def test_second_order_against_differences(program):
    leaves = [Tensor(x, requires_grad=True) for x in program.leaves]
    gradcheck(lambda *leaves: program(OURS, leaves), leaves, order=2, projections=1, rtol=1e-5, atol=1e-5)


@given(program=programs())
@settings(max_examples=60)
def test_against_torch(program):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[reference]'")
    lib = library(torch, torch.as_tensor)
    ours = [Tensor(x, requires_grad=True) for x in program.leaves]
    theirs = [torch.tensor(x, requires_grad=True) for x in program.leaves]
    found, expected = program(OURS, ours), program(lib, theirs)
    rng = np.random.default_rng(0)
    upstream = [rng.standard_normal(y.shape) for y in found]
    for y, z in zip(found, expected, strict=True):
        np.testing.assert_allclose(y.data, z.detach().numpy(), rtol=1e-11, atol=1e-12)
    sum((y * g).sum() for y, g in zip(found, upstream)).backward()
    total = sum((z * torch.as_tensor(g)).sum() for z, g in zip(expected, upstream))
    for leaf, g in zip(ours, torch.autograd.grad(total, theirs, materialize_grads=True)):
        found_g = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.data
        np.testing.assert_allclose(found_g, g.numpy(), rtol=1e-10, atol=1e-11)
