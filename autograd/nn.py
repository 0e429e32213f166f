"""Modules: parameters with names, and the few layers that every model shares."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import backend
from . import functional as F
from .backend import Array
from .tensor import Tensor


class Parameter(Tensor):
    """A leaf that is learned. Frozen with `requires_grad = False`."""

    __slots__ = ()

    def __init__(self, data: Any) -> None:
        super().__init__(data, requires_grad=True)


class Module:
    """Parameters and other modules held as attributes, or in lists and dicts that are attributes.

    A parameter's name is its path: "blocks.0.attention.weight". One tensor under two names, such as an
    output head tied to the embedding, counts once, under the first.
    """

    training = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def _members(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of the attributes, and of what lists, tuples and dicts among them hold."""
        for name, value in vars(self).items():
            if isinstance(value, dict):
                yield from ((f"{name}.{key}", v) for key, v in value.items())
            elif isinstance(value, (list, tuple)):
                yield from ((f"{name}.{i}", v) for i, v in enumerate(value))
            else:
                yield name, value

    def children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) for each module held directly; those in a list as name.0, name.1 ..."""
        return ((name, value) for name, value in self._members() if isinstance(value, Module))

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        yield self
        for _, child in self.children():
            yield from child.modules()

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter), each parameter once."""
        seen: set[int] = set()
        for name, parameter in self._all_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def _all_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        for name, value in self._members():
            if isinstance(value, Parameter):
                yield prefix + name, value
        for name, child in self.children():
            yield from child._all_parameters(f"{prefix}{name}.")

    def parameters(self) -> list[Parameter]:
        """All parameters, each once, in the order of their names' first appearance."""
        return [parameter for _, parameter in self.named_parameters()]

    def parameter_count(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.size for parameter in self.parameters())

    def state_dict(self) -> dict[str, Array]:
        """name -> array, the parameters' own arrays and not copies."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy the arrays into the parameters of those names, in the parameters' precision.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs; nothing is changed then.
        """
        own = self.state_dict()
        wrong = [f"{name} is missing" for name in own.keys() - state.keys()]
        wrong += [f"{name} is unknown" for name in state.keys() - own.keys()]
        wrong += [
            f"{name} has shape {tuple(state[name].shape)}, not {own[name].shape}"
            for name in own.keys() & state.keys()
            if tuple(state[name].shape) != own[name].shape
        ]
        if wrong:
            raise ValueError("load_state_dict: " + "; ".join(sorted(wrong)[:5]))
        for name, parameter in self.named_parameters():
            parameter.data[...] = backend.to_device(state[name], parameter.device)
            parameter.version += 1

    def train(self, mode: bool = True) -> Module:
        """Training mode: dropout is on. Returns the module."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Evaluation mode: dropout is off. Returns the module."""
        return self.train(False)

    def to(self, device: str | None = None, dtype: Any = None) -> Module:
        """Move the parameters to "cpu" or "cuda", and to another precision. Returns the module.

        Make the optimizer afterwards: it keeps the arrays that it finds.
        """
        for parameter in self.parameters():
            if device is not None:
                parameter.data = backend.to_device(parameter.data, device)
            if dtype is not None:
                parameter.data = parameter.data.astype(dtype)
            parameter.grad = None
        return self


_local = threading.local()


@contextmanager
def skeleton(most: float = math.inf) -> Iterator[None]:
    """Inside, what `zeros` and `ones` make takes no memory: one number, seen from every place, not writable.

    To count the parameters of a model of any size, or to build one whose weights are then read from a file.
    In this thread only.

    Raises:
        ValueError: more than `most` parameters are made, or one of a shape that no array can have.
    """
    _local.room = most
    try:
        yield
    finally:
        _local.room = None


def _filled(make: Callable[..., Array], shape: tuple[int, ...]) -> Parameter:
    room = getattr(_local, "room", None)
    if room is None:
        return Parameter(make(shape, np.float32))
    if not room:
        raise ValueError("too many parameters")
    _local.room -= 1
    return Parameter(np.broadcast_to(make((), np.float32), shape))


def zeros(*shape: int) -> Parameter:
    """A float32 parameter of zeros."""
    return _filled(np.zeros, shape)


def ones(*shape: int) -> Parameter:
    """A float32 parameter of ones."""
    return _filled(np.ones, shape)


class Linear(Module):
    """out = x W^T + b.   x (..., inputs) -> (..., outputs); W (outputs, inputs) starts at zero."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        self.weight = zeros(outputs, inputs)
        self.bias = zeros(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.bias is not None else F.linear(x, self.weight)


class Embedding(Module):
    """out = table[ids].   ids (...) -> (..., width); the table (count, width) starts at zero."""

    def __init__(self, count: int, width: int) -> None:
        self.weight = zeros(count, width)

    def forward(self, ids: Any) -> Tensor:
        return F.embedding(ids, self.weight)


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        self.weight = ones(width)
        self.bias = zeros(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """x / sqrt(mean of x^2 + eps) * weight over the last axis."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        self.weight = ones(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight, self.eps)


class Dropout(Module):
    """In training, each value is 0 with probability p, else divided by 1 - p."""

    def __init__(self, p: float) -> None:
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)
