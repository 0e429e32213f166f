"""The primitive operations, each with its gradient beside it.

Every function computes its result through the arrays' own module and hands `primitive` one gradient
function an input: from g, the gradient of the result, to the gradient of that input. Those functions are
themselves written in primitives, so gradients differentiate again. In the formulas d(out)/d(a) times g is
written da.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import numpy as np

from . import backend
from .backend import array_module
from .tensor import Tensor, as_tensor, primitive

Axis = int | tuple[int, ...] | None

__all__ = [
    "abs", "add", "astype", "broadcast_to", "concatenate", "cumsum", "div", "einsum", "embedding",
    "equal", "erf", "exp", "expand_dims", "getitem", "greater", "greater_equal", "identity", "less",
    "less_equal", "log", "logsumexp", "matmul", "max", "maximum", "mean", "min", "minimum", "mul", "neg",
    "not_equal", "pad", "power", "put", "reshape", "sigmoid", "split", "sqrt", "squeeze", "stack", "sub",
    "sum", "swapaxes", "tanh", "transpose", "tril", "triu", "unbroadcast", "var", "where",
]  # fmt: skip


def _pair(name: str, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both operands as Tensors whose shapes broadcast."""
    if not isinstance(a, Tensor):
        a = as_tensor(a, b) if isinstance(b, Tensor) else Tensor(a)
    b = as_tensor(b, a)
    if a.shape != b.shape:
        try:
            np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            raise ValueError(f"{name}: shapes {a.shape} and {b.shape} do not broadcast") from None
    array_module(a.data, b.data)  # raises if they are not on one device
    return a, b


def _tensor(a: Any) -> Tensor:
    return a if isinstance(a, Tensor) else Tensor(a)


def _floating(a: Any) -> Tensor:
    """a as a Tensor; whole numbers become float64, as in NumPy's own functions."""
    a = _tensor(a)
    return a if a.dtype.kind == "f" else Tensor(a.data.astype("float64"))


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """axis as a tuple of numbers from 0 to ndim - 1; None means all."""
    if axis is None:
        return tuple(range(ndim))
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    for a in axes:
        if not -builtins.max(ndim, 1) <= a < builtins.max(ndim, 1):
            raise ValueError(f"axis {a} is out of range for a tensor of {ndim} dimensions")
    return tuple(int(a) % builtins.max(ndim, 1) for a in axes) if ndim else ()


# Elementwise, two operands, with broadcasting.


def unbroadcast(g: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum g over the axes along which an operand of this shape was broadcast."""
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    stretched = tuple(i + extra for i, n in enumerate(shape) if n == 1 and g.shape[i + extra] != 1)
    return reshape(sum(g, tuple(range(extra)) + stretched), shape)


def add(a: Any, b: Any) -> Tensor:
    """out = a + b.   da = g,  db = g."""
    a, b = _pair("add", a, b)
    shape_a, shape_b = a.shape, b.shape  # the gradients need the shapes only: a and b are free to go
    return primitive(
        "add",
        a.data + b.data,
        (a, lambda g: unbroadcast(g, shape_a)),
        (b, lambda g: unbroadcast(g, shape_b)),
    )


def sub(a: Any, b: Any) -> Tensor:
    """out = a - b.   da = g,  db = -g."""
    a, b = _pair("sub", a, b)
    shape_a, shape_b = a.shape, b.shape
    return primitive(
        "sub",
        a.data - b.data,
        (a, lambda g: unbroadcast(g, shape_a)),
        (b, lambda g: unbroadcast(-g, shape_b)),
    )


def mul(a: Any, b: Any) -> Tensor:
    """out = a * b.   da = g * b,  db = g * a."""
    a, b = _pair("mul", a, b)
    shape_a, shape_b = a.shape, b.shape
    return primitive(
        "mul",
        a.data * b.data,
        (a, lambda g: unbroadcast(g * b, shape_a)),
        (b, lambda g: unbroadcast(g * a, shape_b)),
    )


def div(a: Any, b: Any) -> Tensor:
    """out = a / b.   da = g / b,  db = -g * a / b^2."""
    a, b = _pair("div", a, b)
    shape_a = a.shape
    return primitive(
        "div",
        a.data / b.data,
        (a, lambda g: unbroadcast(g / b, shape_a)),
        (b, lambda g: unbroadcast(-g * a / (b * b), b.shape)),
    )


def power(a: Any, b: Any) -> Tensor:
    """out = a ** b.   da = g * b * a^(b - 1),  db = g * a^b * log a  (zero where a = 0)."""
    a, b = _pair("power", a, b)

    def gradient_a(g: Tensor) -> Tensor:
        # A constant exponent 0 has the gradient 0, also at a = 0 where a^-1 is infinite.
        exponent = b - 1 if b.requires_grad else where(b.data == 0, 1, b - 1)
        return unbroadcast(g * (b * power(a, exponent)), a.shape)

    def gradient_b(g: Tensor) -> Tensor:
        zero = a.data == 0
        return unbroadcast(g * where(zero, 0.0, power(a, b) * log(where(zero, 1.0, a))), b.shape)

    return primitive(
        "power",
        _power(a.data, b.data),
        (a, gradient_a),
        (b, gradient_b),
    )


def _power(a: Any, b: Any) -> Any:
    """a ** b; small whole exponents by multiplication, a hundred times faster than NumPy's pow."""
    exponent = float(b) if b.ndim == 0 and a.dtype.kind == "f" and array_module(b) is np else None
    if exponent == 2:
        return a * a
    if exponent == 3:
        return a * a * a
    return a**b


def maximum(a: Any, b: Any) -> Tensor:
    """out = max(a, b) elementwise.   The larger one gets g; equal ones half each."""
    a, b = _pair("maximum", a, b)
    xp = array_module(a.data)
    return primitive(
        "maximum",
        xp.maximum(a.data, b.data),
        (a, lambda g: unbroadcast(g * _share(a.data > b.data, a.data == b.data, g), a.shape)),
        (b, lambda g: unbroadcast(g * _share(b.data > a.data, a.data == b.data, g), b.shape)),
    )


def minimum(a: Any, b: Any) -> Tensor:
    """out = min(a, b) elementwise.   The smaller one gets g; equal ones half each."""
    a, b = _pair("minimum", a, b)
    xp = array_module(a.data)
    return primitive(
        "minimum",
        xp.minimum(a.data, b.data),
        (a, lambda g: unbroadcast(g * _share(a.data < b.data, a.data == b.data, g), a.shape)),
        (b, lambda g: unbroadcast(g * _share(b.data < a.data, a.data == b.data, g), b.shape)),
    )


def _share(wins: Any, ties: Any, g: Tensor) -> Tensor:
    """1 where an operand wins, 1/2 where both are equal, else 0."""
    return Tensor(wins.astype(g.dtype) + ties.astype(g.dtype) * g.dtype.type(0.5))


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """out = a where condition, else b.   da = g where condition else 0,  db = 0 where condition else g."""
    condition = condition.data if isinstance(condition, Tensor) else condition
    condition = np.asarray(condition) if isinstance(condition, (bool, list)) else condition
    a, b = _pair("where", a, b)
    xp = array_module(a.data, condition)
    try:
        data = xp.where(condition, a.data, b.data)
    except ValueError:
        raise ValueError(
            f"where: shapes {condition.shape}, {a.shape} and {b.shape} do not broadcast"
        ) from None
    return primitive(
        "where",
        data,
        (a, lambda g: unbroadcast(where(condition, g, 0.0), a.shape)),
        (b, lambda g: unbroadcast(where(condition, 0.0, g), b.shape)),
    )


def _comparison(name: str, symbol: str) -> Any:
    def compare(a: Any, b: Any) -> Tensor:
        a, b = _pair(name, a, b)
        return Tensor(getattr(array_module(a.data), name)(a.data, b.data))

    compare.__name__ = name
    compare.__doc__ = f"out = a {symbol} b as booleans, with broadcasting; a constant, without gradient."
    return compare


equal = _comparison("equal", "==")
not_equal = _comparison("not_equal", "!=")
less = _comparison("less", "<")
less_equal = _comparison("less_equal", "<=")
greater = _comparison("greater", ">")
greater_equal = _comparison("greater_equal", ">=")


# Elementwise, one operand.


def identity(a: Any) -> Tensor:
    """out = a, as a tensor of its own in the graph.   da = g."""
    a = _tensor(a)
    return primitive("identity", a.data, (a, lambda g: g))


def neg(a: Any) -> Tensor:
    """out = -a.   da = -g."""
    a = _tensor(a)
    return primitive("neg", -a.data, (a, lambda g: -g))


def abs(a: Any) -> Tensor:
    """out = |a|.   da = g * sign(a)."""
    a = _tensor(a)
    xp = array_module(a.data)
    return primitive("abs", xp.abs(a.data), (a, lambda g: g * Tensor(xp.sign(a.data))))


def exp(a: Any) -> Tensor:
    """out = e^a.   da = g * e^a."""
    a = _tensor(a)
    return primitive("exp", array_module(a.data).exp(a.data), (a, lambda g: g * exp(a)))


def log(a: Any) -> Tensor:
    """out = ln a.   da = g / a."""
    a = _tensor(a)
    return primitive("log", array_module(a.data).log(a.data), (a, lambda g: g / a))


def sqrt(a: Any) -> Tensor:
    """out = sqrt(a).   da = g / (2 sqrt(a))."""
    a = _tensor(a)
    return primitive("sqrt", array_module(a.data).sqrt(a.data), (a, lambda g: g / (2 * sqrt(a))))


def tanh(a: Any) -> Tensor:
    """out = tanh a.   da = g * (1 - tanh^2 a)."""
    a = _tensor(a)

    def gradient(g: Tensor) -> Tensor:
        t = tanh(a)
        return g * (1 - t * t)

    return primitive("tanh", array_module(a.data).tanh(a.data), (a, gradient))


def sigmoid(a: Any) -> Tensor:
    """out = 1 / (1 + e^-a).   da = g * out * (1 - out).

    Computed as (1 + tanh(a / 2)) / 2, which never overflows.
    """
    a = _floating(a)
    half = a.dtype.type(0.5)

    def gradient(g: Tensor) -> Tensor:
        s = sigmoid(a)
        return g * (s * (1 - s))

    return primitive("sigmoid", array_module(a.data).tanh(a.data * half) * half + half, (a, gradient))


def erf(a: Any) -> Tensor:
    """out = 2/sqrt(pi) * integral of e^(-t^2) from 0 to a.   da = g * 2/sqrt(pi) * e^(-a^2)."""
    a = _floating(a)
    return primitive("erf", backend.erf(a.data), (a, lambda g: g * (2 / math.sqrt(math.pi) * exp(-a * a))))


def astype(a: Any, dtype: Any) -> Tensor:
    """out = a in another floating-point precision.   da = g in the precision of a.

    In a type without gradients, integers or booleans, out is a constant.
    """
    a = _tensor(a)
    data = a.data.astype(dtype)
    if data.dtype.kind != "f":
        return Tensor(data)
    return primitive("astype", data, (a, lambda g: astype(g, a.dtype)))


# Reductions.


def _spread(g: Tensor, axes: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Put back the axes that a reduction removed, and repeat g along them."""
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    return broadcast_to(reshape(g, kept), shape)


def sum(a: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """out = sum of a over the axes.   da = g, repeated along them."""
    a = _tensor(a)
    axes, shape = _axes(axis, a.ndim), a.shape
    return primitive("sum", a.data.sum(axis=axes, keepdims=keepdims), (a, lambda g: _spread(g, axes, shape)))


def mean(a: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """out = sum of a over the axes / n.   da = g / n, repeated along them."""
    a = _tensor(a)
    n = math.prod(a.shape[i] for i in _axes(axis, a.ndim))
    return sum(a, axis, keepdims) / n


def var(a: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """out = mean of (a - mean of a)^2: the biased variance, as layer normalization uses it."""
    centred = a - mean(a, axis, keepdims=True)
    return mean(centred * centred, axis, keepdims)


def max(a: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """out = the largest of a over the axes.   da = g at the largest; equal ones share it."""
    a = _tensor(a)
    axes = _axes(axis, a.ndim)
    data = a.data.max(axis=axes, keepdims=True)

    def gradient(g: Tensor) -> Tensor:
        hit = (a.data == data).astype(a.dtype)
        return _spread(g, axes, a.shape) * Tensor(hit / hit.sum(axis=axes, keepdims=True))

    return primitive("max", data if keepdims else _drop(data, axes), (a, gradient))


def min(a: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """out = the smallest of a over the axes = -max(-a)."""
    return -max(-_tensor(a), axis, keepdims)


def logsumexp(a: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """out = log(sum of e^a over the axes).   da = g * e^(a - out), the softmax.

    The maximum is taken out first, so that e^a never overflows; all of -inf gives -inf.
    """
    a = _tensor(a)
    xp = array_module(a.data)
    axes = _axes(axis, a.ndim)
    top = a.data.max(axis=axes, keepdims=True)
    top = xp.where(xp.isfinite(top), top, 0).astype(a.dtype)
    total = xp.exp(a.data - top).sum(axis=axes, keepdims=True)
    data = top + xp.log(total) if array_module(total) is not np else top + _quiet_log(total)

    def gradient(g: Tensor) -> Tensor:
        out = reshape(logsumexp(a, axes, keepdims=True), data.shape)
        finite = where(xp.isfinite(out.data), out, 0.0)
        return _spread(g, axes, a.shape) * exp(a - finite)

    return primitive("logsumexp", data if keepdims else _drop(data, axes), (a, gradient))


def _quiet_log(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant
        return np.log(x)


def _drop(data: Any, axes: tuple[int, ...]) -> Any:
    return data.reshape(tuple(n for i, n in enumerate(data.shape) if i not in axes))


def cumsum(a: Any, axis: int) -> Tensor:
    """out_i = a_0 + ... + a_i along the axis.   da_i = g_i + ... + g_last."""
    a = _tensor(a)
    (axis,) = _axes(axis, a.ndim)

    def gradient(g: Tensor) -> Tensor:
        backwards = (slice(None),) * axis + (slice(None, None, -1),)
        return cumsum(g[backwards], axis)[backwards]

    return primitive("cumsum", a.data.cumsum(axis=axis, dtype=a.dtype), (a, gradient))


# Products.


def matmul(a: Any, b: Any) -> Tensor:
    """out = a @ b over the last two axes, the others broadcast.   da = g @ b^T,  db = a^T @ g.

    a (..., n, k), b (..., k, m) -> (..., n, m). A 1-D a is a row, a 1-D b a column, as in NumPy.
    """
    if not isinstance(a, Tensor):
        a = as_tensor(a, b) if isinstance(b, Tensor) else Tensor(a)
    b = as_tensor(b, a)
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"matmul: shapes {a.shape} and {b.shape} do not fit: columns of a = rows of b")
    if a.ndim == 1:
        return squeeze(matmul(expand_dims(a, 0), b), -1 if b.ndim == 1 else -2)
    if b.ndim == 1:
        return squeeze(matmul(a, expand_dims(b, 1)), -1)
    if b.ndim == 2 and a.ndim > 2:  # one large product instead of many small ones
        rows = reshape(a, (math.prod(a.shape[:-1]), a.shape[-1]))
        return reshape(matmul(rows, b), a.shape[:-1] + b.shape[-1:])
    try:
        np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(f"matmul: leading axes of {a.shape} and {b.shape} do not broadcast") from None
    shape_a, shape_b = a.shape, b.shape
    return primitive(
        "matmul",
        array_module(a.data, b.data).matmul(a.data, b.data),
        (a, lambda g: unbroadcast(matmul(g, swapaxes(b, -1, -2)), shape_a)),
        (b, lambda g: unbroadcast(matmul(swapaxes(a, -1, -2), g), shape_b)),
    )


def einsum(subscripts: str, *operands: Any) -> Tensor:
    """Sums of products named by letters, "bqd,bkd->bqk"; an ellipsis stands for leading axes.

    The gradient of an operand is an einsum too: g takes the operand's place, and the letters of out and of
    the operand change roles. A letter that only this operand has was summed, so g is repeated along it.

    Raises:
        ValueError: a letter occurs twice in one operand (take the diagonal by indexing first).
    """
    like = next((o for o in operands if isinstance(o, Tensor)), None)
    tensors = [as_tensor(o, like) if like is not None else Tensor(o) for o in operands]
    inputs, output = _letters(subscripts, tensors)
    xp = array_module(*(t.data for t in tensors))
    sizes: dict[str, int] = {}
    for letters, t in zip(inputs, tensors):
        for letter, n in zip(letters, t.shape):
            sizes[letter] = n if sizes.get(letter, 1) == 1 else sizes[letter]

    def gradient(i: int) -> Any:
        others = [tensors[j] for j in range(len(tensors)) if j != i]
        known = set(output).union(*(inputs[j] for j in range(len(tensors)) if j != i))
        found = "".join(letter for letter in inputs[i] if letter in known)
        formula = ",".join([output] + [inputs[j] for j in range(len(tensors)) if j != i]) + "->" + found

        def backward(g: Tensor) -> Tensor:
            part = einsum(formula, g, *others)
            found_sizes = dict(zip(found, part.shape))
            shape = tuple(found_sizes.get(c, 1) for c in inputs[i])
            full = tuple(sizes[c] for c in inputs[i])
            return unbroadcast(broadcast_to(reshape(part, shape), full), tensors[i].shape)

        return backward

    data = xp.einsum(",".join(inputs) + "->" + output, *(t.data for t in tensors))
    return primitive("einsum", data, *((t, gradient(i)) for i, t in enumerate(tensors)))


def _letters(subscripts: str, tensors: Sequence[Tensor]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, ellipses written out as capital letters."""
    left, arrow, output = subscripts.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(tensors):
        raise ValueError(f"einsum: {subscripts!r} names {len(inputs)} operands, not {len(tensors)}")
    free = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in subscripts]
    extra = [t.ndim - len(s.replace("...", "")) for s, t in zip(inputs, tensors)]
    widest = builtins.max((n for s, n in zip(inputs, extra) if "..." in s), default=0)
    dots = "".join(reversed(free[:widest]))
    for i, (letters, n) in enumerate(zip(inputs, extra)):
        if n < 0 or (n > 0 and "..." not in letters):
            raise ValueError(f"einsum: {letters!r} does not fit shape {tensors[i].shape}")
        inputs[i] = letters.replace("...", dots[widest - n :] if n else "")
        if len(set(inputs[i])) < len(inputs[i]):
            raise ValueError(f"einsum: a letter occurs twice in {letters!r}: take the diagonal first")
    if not arrow:
        every = "".join(inputs)
        output = "..." + "".join(sorted(c for c in set(every) if every.count(c) == 1 and c not in dots))
    return inputs, output.replace("...", dots)


# Shape.


def reshape(a: Any, *shape: Any) -> Tensor:
    """out = a in another shape of the same size, one axis may be -1.   da = g in a's shape."""
    a = _tensor(a)
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], (int, np.integer)) else shape
    before = a.shape
    return primitive("reshape", a.data.reshape(shape), (a, lambda g: reshape(g, before)))


def transpose(a: Any, *axes: Any) -> Tensor:
    """out = a with its axes in another order.   da = g with the order undone.

    No axes: all reversed. Two axes: those two swapped, as PyTorch means it. All axes (numbers or one
    tuple): the new order, as NumPy means it.
    """
    a = _tensor(a)
    if len(axes) == 1 and not isinstance(axes[0], (int, np.integer)):
        axes = tuple(axes[0])
    elif len(axes) == 2:
        return swapaxes(a, *axes)
    order = tuple(int(i) % a.ndim for i in axes) if axes else tuple(reversed(range(a.ndim)))
    undo = tuple(order.index(i) for i in range(len(order)))
    return primitive("transpose", a.data.transpose(order), (a, lambda g: transpose(g, undo)))


def swapaxes(a: Any, first: int, second: int) -> Tensor:
    """out = a with two axes exchanged.   da = g with the same two exchanged."""
    a = _tensor(a)
    return primitive("swapaxes", a.data.swapaxes(first, second), (a, lambda g: swapaxes(g, first, second)))


def expand_dims(a: Any, axis: int) -> Tensor:
    """out = a with a new axis of length 1.   da = g without it."""
    a = _tensor(a)
    return reshape(a, array_module(a.data).expand_dims(a.data, axis).shape)


def squeeze(a: Any, axis: Axis = None) -> Tensor:
    """out = a without the given axes of length 1 (None: without any).   da = g with them."""
    a = _tensor(a)
    return reshape(a, a.data.squeeze(axis=axis).shape)


def broadcast_to(a: Any, shape: tuple[int, ...]) -> Tensor:
    """out = a repeated along new axes and axes of length 1.   da = g summed over them."""
    a = _tensor(a)
    if a.shape == tuple(shape):
        return a
    try:
        data = array_module(a.data).broadcast_to(a.data, shape)
    except ValueError:
        raise ValueError(f"broadcast_to: shape {a.shape} does not broadcast to {tuple(shape)}") from None
    before = a.shape
    return primitive("broadcast_to", data, (a, lambda g: unbroadcast(g, before)))


def concatenate(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """out = the tensors one after the other along the axis.   Each gets its slice of g."""
    tensors = [_tensor(t) for t in tensors]
    axis = _axes(axis, tensors[0].ndim)[0]
    xp = array_module(*(t.data for t in tensors))
    shapes = [t.shape for t in tensors]
    if any(s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes):
        raise ValueError(f"concatenate: shapes {shapes} differ beside axis {axis}")
    before = (slice(None),) * axis
    inputs, start = [], 0
    for t in tensors:
        part = before + (slice(start, start + t.shape[axis]),)
        inputs.append((t, lambda g, part=part: g[part]))
        start += t.shape[axis]
    return primitive("concatenate", xp.concatenate([t.data for t in tensors], axis=axis), *inputs)


def stack(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """out = the tensors, all of one shape, along a new axis."""
    tensors = [_tensor(t) for t in tensors]
    axis = axis % (tensors[0].ndim + 1)
    return concatenate([expand_dims(t, axis) for t in tensors], axis)


def split(a: Any, sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """a cut along the axis: into equal sections, or at the given positions. Undoes concatenate."""
    a = _tensor(a)
    axis = _axes(axis, a.ndim)[0]
    n = a.shape[axis]
    if isinstance(sections, (int, np.integer)):
        if n % sections:
            raise ValueError(f"split: an axis of {n} does not divide into {sections} equal sections")
        sections = range(n // sections, n, n // sections) if n else [0] * (sections - 1)
    edges = [0, *sections, n]
    before = (slice(None),) * axis
    return [getitem(a, before + (slice(i, j),)) for i, j in zip(edges, edges[1:])]


def pad(a: Any, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """out = a with (before, after) entries of a constant added to each axis.   da = g without them."""
    a = _tensor(a)
    inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, a.shape))
    data = array_module(a.data).pad(a.data, widths, constant_values=value)
    return primitive("pad", data, (a, lambda g: g[inner]))


def tril(a: Any, k: int = 0) -> Tensor:
    """out = a where column <= row + k, else 0, over the last two axes.   da = tril(g)."""
    a = _tensor(a)
    return primitive("tril", array_module(a.data).tril(a.data, k), (a, lambda g: tril(g, k)))


def triu(a: Any, k: int = 0) -> Tensor:
    """out = a where column >= row + k, else 0, over the last two axes.   da = triu(g)."""
    a = _tensor(a)
    return primitive("triu", array_module(a.data).triu(a.data, k), (a, lambda g: triu(g, k)))


# Indexing.


def getitem(a: Any, index: Any) -> Tensor:
    """out = a[index], for slices, numbers, integer arrays and masks.   da = zeros, with g added at index."""
    a = _tensor(a)
    index = _raw(index)
    shape = a.shape
    return primitive("getitem", a.data[index], (a, lambda g: put(g, index, shape)))


def put(values: Any, index: Any, shape: tuple[int, ...]) -> Tensor:
    """out = zeros of the shape, with values added at index.   dvalues = g[index].

    Where an index occurs twice, both values are added.
    """
    values = _tensor(values)
    index = _raw(index)
    data = array_module(values.data).zeros(shape, values.dtype)
    if _is_basic(index):
        data[index] = values.data
    else:
        backend.add_at(data, index, values.data)
    return primitive("put", data, (values, lambda g: getitem(g, index)))


def _raw(index: Any) -> Any:
    """An index without Tensors or lists in it."""
    if isinstance(index, tuple):
        return tuple(_raw(i) for i in index)
    if isinstance(index, list):
        return np.asarray(index)
    return index.data if isinstance(index, Tensor) else index


def _is_basic(index: Any) -> bool:
    """True if the index reads every element at most once by its form: slices, numbers, None, ellipsis."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or isinstance(p, (int, np.integer, slice, EllipsisType)) for p in parts)


def embedding(ids: Any, table: Tensor) -> Tensor:
    """out = table[ids]: a row for each id.   dtable = zeros, with the rows of g added at their ids.

    ids (...) of integers, table (V, C) -> (..., C).

    Raises:
        IndexError: an id is not a row of the table.
    """
    ids = ids.data if isinstance(ids, Tensor) else ids
    return getitem(table, checked_ids(ids, table))


def checked_ids(ids: Any, table: Tensor) -> Any:
    """The ids, if every one is a row of the table."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, and these are {ids.dtype}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= len(table)):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise IndexError(f"id {bad} is out of range: the table has rows 0 to {len(table) - 1}")
    return ids


def _torch_names(function: Any) -> Any:
    """A method that also understands PyTorch's dim and keepdim."""

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for theirs, ours in (("dim", "axis"), ("keepdim", "keepdims")):
            if theirs in kwargs:
                kwargs[ours] = kwargs.pop(theirs)
        return function(self, *args, **kwargs)

    method.__name__, method.__doc__ = function.__name__, function.__doc__
    return method


def _install_methods() -> None:
    for name in ("add", "sub", "mul", "matmul"):
        operation = globals()[name]
        setattr(Tensor, f"__{name}__", operation)
        setattr(Tensor, f"__r{name}__", lambda self, other, operation=operation: operation(other, self))
    Tensor.__truediv__ = div
    Tensor.__rtruediv__ = lambda self, other: div(other, self)
    Tensor.__pow__ = power
    Tensor.__rpow__ = lambda self, other: power(other, self)
    Tensor.__neg__, Tensor.__abs__, Tensor.__getitem__ = neg, abs, getitem
    Tensor.__eq__, Tensor.__ne__, Tensor.__hash__ = equal, not_equal, object.__hash__
    Tensor.__lt__, Tensor.__le__, Tensor.__gt__, Tensor.__ge__ = less, less_equal, greater, greater_equal
    Tensor.T = property(transpose)
    for name in ("sum", "mean", "var", "max", "min", "logsumexp", "cumsum", "squeeze"):
        setattr(Tensor, name, _torch_names(globals()[name]))
    for name in (
        "abs", "astype", "broadcast_to", "erf", "exp", "expand_dims", "log", "reshape", "sigmoid", "split",
        "sqrt", "swapaxes", "tanh", "transpose", "tril", "triu",
    ):  # fmt: skip
        setattr(Tensor, name, globals()[name])


_install_methods()
