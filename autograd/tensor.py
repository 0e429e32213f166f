"""Tensor, the graph that it records, and the backward walk.

An operation on Tensors computes at once, and hangs a `Node` on its result: which inputs it had, and how a
gradient of the result becomes gradients of the inputs (the chain rule, one factor a node). `backward` walks
the nodes from the newest to the oldest and multiplies the factors up.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

import numpy as np

from . import backend
from .backend import Array, array_module

_order = itertools.count()  # next() is atomic, so threads may share it
_local = threading.local()
_accumulating = threading.Lock()


class GradientError(AssertionError):
    """An operation's gradient is wrong, by its shape or by comparison with differences: a bug in it."""


def is_recording() -> bool:
    """True where operations record the graph: everywhere but inside `no_grad()`."""
    return getattr(_local, "recording", True)


@contextmanager
def _set_recording(recording: bool) -> Iterator[None]:
    before = is_recording()
    _local.recording = recording
    try:
        yield
    finally:
        _local.recording = before


def no_grad() -> Any:
    """Context manager and decorator: operations inside record nothing. Each thread has its own."""
    return _set_recording(False)


def enable_grad() -> Any:
    """Context manager and decorator: operations record again, inside a `no_grad()`."""
    return _set_recording(True)


class Node:
    """One operation of the recorded graph.

    A node holds no arrays: what its gradients need lives in their closures, which `backward` drops as soon
    as they are used. The bare skeleton (names, shapes, edges) stays as long as the result does.
    """

    __slots__ = ("name", "shape", "dtype", "edges", "leaves", "gradients", "composition", "order")

    def __init__(
        self,
        name: str,
        data: Array,
        inputs: Sequence[Tensor],
        gradients: Any,
        composition: Callable[[], tuple[Tensor, Sequence[Tensor]]] | None = None,
    ) -> None:
        self.name = name
        self.shape = data.shape
        self.dtype = data.dtype
        self.edges = [(t.node or t) if t.requires_grad else None for t in inputs]
        self.leaves = [(t, t.version) for t in inputs if t.node is None and t.requires_grad]
        self.gradients = gradients
        self.composition = composition
        self.order = next(_order)

    def input_gradients(
        self, g: Tensor, needed: Sequence[bool], create_graph: bool
    ) -> Sequence[Tensor | RowsGradient | None]:
        """The gradients of the inputs that need one, from the gradient g of the result."""
        if self.gradients is None:
            raise RuntimeError(
                f"the graph at {self.name!r} was freed by an earlier backward: run the forward pass again, "
                "add the losses before one backward, or use grad(..., create_graph=True)"
            )
        for leaf, version in self.leaves:
            if leaf.version != version:
                raise RuntimeError(
                    f"a parameter that {self.name!r} read was changed in place since, by an optimizer or "
                    "load_state_dict: run the forward pass again, its old values are gone"
                )
        if self.composition is None:  # a primitive: one function an input, written in primitives
            return [gradient(g) if need else None for gradient, need in zip(self.gradients, needed)]
        if create_graph:  # a fused operation differentiates twice through its composition
            output, inputs = self.composition()
            if not output.requires_grad:  # for these shapes it does without the inputs that need a gradient
                return [None] * len(needed)
            wanted = [tensor for tensor, need in zip(inputs, needed) if need]
            found = iter(grad(output, wanted, g, create_graph=True))
            return [next(found) if need else None for need in needed]
        arrays = self.gradients(g.data, needed)
        return [a if a is None or isinstance(a, RowsGradient) else Tensor(a) for a in arrays]


class Tensor:
    """An array that remembers how it was computed.

    Tensor(array, requires_grad=False) wraps a NumPy or CuPy array (no copy), a number or nested lists.
    `.data` is the array, `.grad` the gradient (a Tensor) that `backward` accumulated into a leaf.
    Operators and methods (`+ - * / ** @`, indexing, sum, mean, exp, reshape ...) are named as in PyTorch and
    defined in `primitives.py`. No operation changes an array in place. Optimizers and load_state_dict do, and
    count `.version` up, so that a graph which still needs the old values says so. Whoever changes `.data` in
    place by hand does so after backward: a graph from before would read the new values, and nobody notices.

    Raises:
        TypeError: requires_grad for an array that is not floating-point.
    """

    __slots__ = ("data", "grad", "requires_grad", "node", "version", "__weakref__")
    __array_ufunc__ = None  # array + tensor becomes tensor.__radd__(array)

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        if isinstance(data, Tensor):
            data = data.data
        self.data: Array = data if backend.is_array(data) else np.asarray(data)
        self.grad: Tensor | None = None
        self.node: Node | None = None
        self.version = 0
        self.requires_grad = requires_grad
        if requires_grad and self.data.dtype.kind != "f":
            raise TypeError(
                f"only floating-point tensors have gradients, and this one is {self.data.dtype}: "
                "convert it first, with array.astype('float32')"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def device(self) -> str:
        return backend.device_of(self.data)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array, copied from the GPU if they are there."""
        return backend.to_host(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if array_module(self.data) is not np:
            raise TypeError("a tensor on the GPU does not become a NumPy array silently: use .numpy()")
        return np.array(self.data, dtype=dtype, copy=copy)

    def item(self) -> float:
        """The one value as a Python number."""
        return self.data.item()

    def detach(self) -> Tensor:
        """The same array outside the graph."""
        return Tensor(self.data)

    def backward(self, gradient: Any = None) -> None:
        """Add d(self)/d(leaf) to `.grad` of every leaf with requires_grad, and free the graph.

        With a gradient g of self's shape: the vector-Jacobian product g . d(self)/d(leaf).

        Raises:
            RuntimeError: self has no graph, or its graph was freed by an earlier backward.
            ValueError: self is not a single value and no gradient is given, or the shapes differ.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: no tensor with requires_grad=True took part in this result")
        gradient = _initial_gradient(self, gradient, "backward")
        found = _walk(self, gradient, None, create_graph=False)
        with _accumulating:  # threads may share leaves
            for leaf, g in found:
                leaf.grad = g if leaf.grad is None else Tensor(leaf.grad.data + g.data)

    def __len__(self) -> int:
        return len(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __float__(self) -> float:
        return float(self.data)

    def __repr__(self) -> str:
        leaf = ", requires_grad=True" if self.requires_grad else ""
        made = f", made by {self.node.name}" if self.node else leaf
        return f"Tensor({self.data}, dtype={self.dtype}{made})"

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(
            "a Tensor does not change in place, for a graph may still need its values: "
            "build a new one, with where(mask, a, b) for instance"
        )


def _vertex(tensor: Tensor) -> Node | Tensor:
    """What stands for a tensor in the graph: the node that made it, or a leaf itself."""
    return tensor if tensor.node is None else tensor.node


def as_tensor(value: Any, like: Tensor) -> Tensor:
    """value as a Tensor beside `like`: a number takes its dtype and device, so it never promotes."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Number):  # np.float64 and np.int64 scalars too
        integral = isinstance(value, (int, np.integer, bool, np.bool_))
        dtype = like.dtype if like.dtype.kind == "f" or (integral and like.dtype.kind in "iu") else None
        return Tensor(array_module(like.data).asarray(value, dtype=dtype))
    return Tensor(value)


def primitive(name: str, data: Array, *inputs: tuple[Tensor, Callable[[Tensor], Tensor]]) -> Tensor:
    """The result of a primitive: its array, and for each input (tensor, how g becomes its gradient).

    A gradient function is written in primitives on Tensors, so gradients differentiate again.
    """
    result = Tensor(data)
    if is_recording() and any(tensor.requires_grad for tensor, _ in inputs):
        result.requires_grad = True
        # A constant's gradient is never asked for, so what it alone would read is not kept.
        gradients = [gradient if tensor.requires_grad else None for tensor, gradient in inputs]
        result.node = Node(name, result.data, [tensor for tensor, _ in inputs], gradients)
    return result


def fused_result(
    name: str,
    data: Array,
    inputs: Sequence[Tensor],
    gradients: Callable[[Array, Sequence[bool]], Sequence[Array | None]],
    composition: Callable[[], tuple[Tensor, Sequence[Tensor]]],
) -> Tensor:
    """The result of a fused operation.

    gradients(g, needed) works on raw arrays and gives one for each input, in arrays of its own that nobody
    else holds (None where not needed). composition() computes the same from primitives and gives (result,
    the inputs it used), for second derivatives.
    """
    result = Tensor(data)
    if is_recording() and any(tensor.requires_grad for tensor in inputs):
        result.requires_grad = True
        result.node = Node(name, result.data, inputs, gradients, composition)
    return result


class RowsGradient:
    """The gradient of an embedding table (V, C) of which only some rows were read.

    It is added to a gradient that exists, where one does, instead of filling a table with zeros first: a
    tied output head has made one already.
    """

    def __init__(self, rows: Array, values: Array, shape: tuple[int, ...]) -> None:
        self.rows, self.values, self.shape, self.dtype = rows, values, shape, values.dtype

    def added_to(self, dense: Array | None) -> Array:
        if dense is None:
            dense = array_module(self.values).zeros(self.shape, self.dtype)
        backend.add_rows(dense, self.rows, self.values)
        return dense


def _initial_gradient(output: Tensor, gradient: Any, caller: str) -> Tensor:
    xp = array_module(output.data)
    if gradient is None:
        if output.size != 1:
            raise ValueError(
                f"{caller}: the result has shape {output.shape}, not a single value: "
                "sum it first, or give the gradient of that shape"
            )
        return Tensor(xp.ones_like(output.data))
    gradient = as_tensor(gradient, output)
    if gradient.shape != output.shape:
        raise ValueError(f"{caller}: the gradient has shape {gradient.shape}, the result {output.shape}")
    return gradient if gradient.dtype == output.dtype else gradient.astype(output.dtype)


def _reachable(root: Node | Tensor) -> list[Node]:
    """All nodes from root down, oldest first: whoever is used stands before who uses it."""
    seen: dict[int, Node] = {}
    stack = [root]
    while stack:
        vertex = stack.pop()
        if isinstance(vertex, Node) and id(vertex) not in seen:
            seen[id(vertex)] = vertex
            stack.extend(edge for edge in vertex.edges if edge is not None)
    return sorted(seen.values(), key=lambda node: node.order)


def _walk(
    output: Tensor, gradient: Tensor, targets: Sequence[Node | Tensor] | None, create_graph: bool
) -> list[tuple[Node | Tensor, Tensor]]:
    """(vertex, gradient) for each target that the output depends on; for each leaf if targets is None.

    Backpropagation is this loop, from the newest node to the oldest:

        for node in newest_first:
            for edge, g in zip(node.edges, node.input_gradients(gradients.pop(node))):
                gradients[edge] += g

    What is added skips nodes that lead to no target, and saves memory.
    Without create_graph a node is freed once its gradient is passed on: its closures, the arrays in them
    and its own gradient go at once, so memory falls as the walk proceeds.
    """
    root = _vertex(output)
    wanted = {id(root): root} if isinstance(root, Tensor) else {}
    if targets is not None:
        wanted = {id(target): target for target in targets}
    leads = set(wanted)  # the vertices from which a target is reached
    plan = []  # (node, which of its inputs lead on), oldest first
    for node in _reachable(root):
        if targets is None:
            needed = [edge is not None for edge in node.edges]
            wanted.update((id(edge), edge) for edge in node.edges if isinstance(edge, Tensor))
        else:
            needed = [id(edge) in leads for edge in node.edges]
        if True in needed:
            leads.add(id(node))
            plan.append((node, needed))

    gradients = {id(root): gradient}
    owned: set[int] = set()  # vertices whose gradient array nobody else holds: sums may go in place
    with _set_recording(create_graph):
        while plan:
            node, needed = plan.pop()
            key = id(node)
            g = gradients.get(key) if key in wanted else gradients.pop(key, None)
            if g is None:
                continue
            fresh = node.composition is not None and not create_graph
            found = node.input_gradients(g, needed, create_graph)
            if not create_graph:  # free: nothing here may hold on to an array that the rest does not need
                node.gradients = node.composition = None
                owned.discard(key)
            g = None
            for i, edge in enumerate(node.edges):
                g_edge = found[i]
                if g_edge is None:
                    continue
                if g_edge.shape != edge.shape:
                    raise GradientError(
                        f"{node.name}: input {i} has shape {edge.shape}, but its gradient {g_edge.shape}"
                    )
                if g_edge.dtype != edge.dtype:
                    g_edge = g_edge.astype(edge.dtype)
                if not create_graph:
                    _accumulate(gradients, owned, id(edge), g_edge, fresh)
                elif id(edge) in gradients:
                    gradients[id(edge)] = gradients[id(edge)] + g_edge
                else:
                    gradients[id(edge)] = g_edge
            found = g_edge = None

    if not create_graph:
        for key in gradients.keys() & wanted.keys() - owned:
            gradients[key] = Tensor(gradients[key].data.copy())
    return [(vertex, gradients[key]) for key, vertex in wanted.items() if key in gradients]


def _accumulate(
    gradients: dict[int, Tensor], owned: set[int], key: int, g: Tensor | RowsGradient, fresh: bool
) -> None:
    """gradients[key] += g, in place where the array belongs to this gradient alone.

    A primitive may hand the same array to both its inputs (the g of an addition), so only the arrays of
    fused operations (fresh) and sums made here are owned.
    """
    before = gradients.get(key)
    if isinstance(g, RowsGradient):
        if before is not None and key not in owned:
            before = Tensor(before.data.copy())
        gradients[key] = Tensor(g.added_to(None if before is None else before.data))
        owned.add(key)
    elif before is None:
        gradients[key] = g
        if fresh:
            owned.add(key)
    elif key in owned:
        before.data += g.data
    else:
        gradients[key] = Tensor(before.data + g.data)
        owned.add(key)


def grad(
    output: Tensor,
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Any = None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """The gradients of output with respect to each of the inputs, leaving every `.grad` alone.

    grad_outputs has output's shape (default: 1 for a single value); an input on which output does not
    depend has the gradient zero. With create_graph the gradients carry a graph of their own, so they can be
    differentiated again, and the graph of output stays; without it that graph is freed.

    Raises:
        RuntimeError: output has no graph, it was freed before, or an input does not require gradients.
        ValueError: output is not a single value and no grad_outputs is given, or the shapes differ.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if not output.requires_grad:
        raise RuntimeError("grad: no tensor with requires_grad=True took part in this result")
    for i, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            raise RuntimeError(f"grad: input {i} does not require gradients: make it with requires_grad=True")
    gradient = _initial_gradient(output, grad_outputs, "grad")
    vertices = [_vertex(tensor) for tensor in inputs]
    found = {id(vertex): g for vertex, g in _walk(output, gradient, vertices, create_graph)}
    return tuple(
        found[id(v)] if id(v) in found else Tensor(array_module(t.data).zeros_like(t.data))
        for v, t in zip(vertices, inputs)
    )
