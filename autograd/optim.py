"""Optimizers: AdamW, SGD, gradient clipping and the learning rate's course."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .backend import Array, array_module, to_device, to_host
from .nn import Module, Parameter

_CHUNK = 1 << 17  # elements whose parameters, gradient and state pass through the cache together


class _Group:
    """Parameters with one weight decay, laid end to end in one flat array.

    Their `.data` become views of it, so that one update serves them all.
    """

    def __init__(self, parameters: Sequence[Parameter], weight_decay: float, slots: Sequence[str]) -> None:
        self.parameters, self.weight_decay = list(parameters), weight_decay
        arrays = [p.data.reshape(-1) for p in self.parameters]
        if len({a.dtype for a in arrays}) > 1:
            raise ValueError("the parameters of one group must have one precision: use model.to(dtype=...)")
        xp = array_module(*arrays)
        self.flat = xp.concatenate(arrays) if arrays else np.zeros(0, np.float32)
        self.grad = xp.zeros_like(self.flat)
        self.state = {slot: xp.zeros_like(self.flat) for slot in slots}
        ends = np.cumsum([p.size for p in self.parameters]).tolist()
        self.slices = [slice(end - p.size, end) for p, end in zip(self.parameters, ends)]
        self.views = []
        for p, part in zip(self.parameters, self.slices):
            p.data = self.flat[part].reshape(p.shape)
            self.views.append(p.data)

    def gather_gradient(self, i: int) -> None:
        """Copy the gradient of parameter i to its place in the flat one."""
        p = self.parameters[i]
        if p.data is not self.views[i]:
            raise RuntimeError("a parameter's array was replaced: make a new optimizer after moving a model")
        if p.grad is None:
            raise RuntimeError(f"a parameter of shape {p.shape} has no gradient: call backward before step")
        self.grad[self.slices[i]] = p.grad.data.reshape(-1)

    def chunks(self) -> Iterator[slice]:
        size = _CHUNK if array_module(self.flat) is np else max(self.flat.size, 1)
        return (slice(i, i + size) for i in range(0, self.flat.size, size))


class Optimizer(ABC):
    """What the optimizers share: groups of parameters, zero_grad, and a state to save.

    parameters: a list of Parameters, or of dicts {"params": [...], "weight_decay": ...} as decay_groups
    makes them. `lr` may be set before each step.
    """

    slots: Sequence[str] = ()

    def __init__(self, parameters: Sequence[Any], lr: float, weight_decay: float) -> None:
        parameters = list(parameters)
        if not parameters or not isinstance(parameters[0], Mapping):
            parameters = [{"params": parameters}]
        self.lr = lr
        self.steps = 0
        self.groups = [
            _Group(list(g["params"]), g.get("weight_decay", weight_decay), self.slots) for g in parameters
        ]

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    def step(self, run: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map) -> None:
        """Update the parameters, in place, from their gradients.

        run works through the pieces of the update, which are independent: map, or that of a thread pool.

        Raises:
            RuntimeError: a parameter has no gradient; nothing is changed then.
        """
        gathers = [(group, i) for group in self.groups for i in range(len(group.parameters))]
        list(run(lambda piece: piece[0].gather_gradient(piece[1]), gathers))
        self.steps += 1
        for group in self.groups:
            for parameter in group.parameters:
                parameter.version += 1
        chunks = [(group, chunk) for group in self.groups for chunk in group.chunks()]
        list(run(lambda piece: self._update_chunk(*piece), chunks))

    def _update_chunk(self, group: _Group, chunk: slice) -> None:
        state = {slot: array[chunk] for slot, array in group.state.items()}
        self.update(group.flat[chunk], group.grad[chunk], state, group.weight_decay)

    @abstractmethod
    def update(self, p: Array, g: Array, state: dict[str, Array], weight_decay: float) -> None:
        """Change p and the state, in place, by one step with gradient g; g may be used up."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as host arrays by name; with `steps` all that a resumed run needs."""
        state = {f"{i}.{slot}": to_host(a) for i, g in enumerate(self.groups) for slot, a in g.state.items()}
        return {**state, "steps": np.array(self.steps, np.int64)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up the state of another optimizer over the same parameters.

        Raises:
            ValueError: its names or sizes are not ours.
        """
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[k].shape != tuple(state[k].shape) for k in own):
            raise ValueError("the optimizer's state belongs to other parameters")
        self.steps = int(state["steps"])
        for i, group in enumerate(self.groups):
            for slot, array in group.state.items():
                array[...] = to_device(state[f"{i}.{slot}"], "cpu" if array_module(array) is np else "cuda")


class AdamW(Optimizer):
    """Adam with decoupled weight decay   (Loshchilov & Hutter 2019, algorithm 2).

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,
    p = p - lr * decay * p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
    """

    slots = ("m", "v")

    def __init__(
        self,
        parameters: Sequence[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, lr, weight_decay)
        self.betas, self.eps = betas, eps

    def update(self, p: Array, g: Array, state: dict[str, Array], weight_decay: float) -> None:
        xp = array_module(p, g)
        b1, b2 = self.betas
        m, v = state["m"], state["v"]
        m *= b1
        v *= b2
        square = g * g
        square *= 1 - b2
        v += square
        g *= 1 - b1
        m += g
        root = xp.sqrt(v, out=square)
        root *= 1 / math.sqrt(1 - b2**self.steps)
        root += self.eps
        step = xp.divide(m, root, out=g)
        step *= self.lr / (1 - b1**self.steps)
        if weight_decay:
            p *= 1 - self.lr * weight_decay
        p -= step


class SGD(Optimizer):
    """Gradient descent with momentum.   v = momentum * v + g + decay * p,   p = p - lr * v."""

    slots = ("velocity",)

    def __init__(
        self, parameters: Sequence[Any], lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, lr, weight_decay)
        self.momentum = momentum

    def update(self, p: Array, g: Array, state: dict[str, Array], weight_decay: float) -> None:
        velocity = state["velocity"]
        velocity *= self.momentum
        velocity += g
        if weight_decay:
            velocity += p * weight_decay
        p -= velocity * self.lr


def decay_groups(model: Module, weight_decay: float) -> list[dict[str, Any]]:
    """The model's trainable parameters in two groups: matrices and tables decay, vectors do not.

    Biases and the weights of norms set a scale or an offset; pulling them to zero helps nothing.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def clip_grad_norm(
    parameters: Sequence[Parameter],
    max_norm: float,
    run: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
) -> float:
    """Scale all gradients, in place, by min(1, max_norm / norm), norm the root of the sum of their squares.

    Returns the norm before clipping (Pascanu et al. 2013, algorithm 1). Nothing is scaled by a norm that is
    not finite: the caller sees it and stops. run works through the gradients, as in `Optimizer.step`.
    """
    gradients = [p.grad.data for p in parameters if p.grad is not None]
    squares = run(lambda g: array_module(g).vdot(g, g), gradients)
    norm = math.sqrt(sum(float(s) for s in squares))
    if max_norm < norm < math.inf:
        list(run(lambda g: array_module(g).multiply(g, g.dtype.type(max_norm / norm), out=g), gradients))
    return norm


def warmup_cosine(step: int, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """The learning rate of a step, counted from 0: up to the peak in a line, down to the floor in a cosine.

    step < warmup:  peak * (step + 1) / warmup;   then  floor + (peak - floor) (1 + cos(pi t)) / 2
    with t from 0 to 1 over the steps that are left   (Loshchilov & Hutter 2017, equation 5).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (peak - floor) * (1 + math.cos(math.pi * t)) / 2
