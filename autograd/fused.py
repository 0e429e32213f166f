"""Fused operations: softmax, norms, activations, losses, each one node of the graph.

They exist for speed and memory only. Each is defined twice: `NAME_composed`, from primitives, is the
specification; the fused function computes the same on raw arrays and returns (result, gradients).
`gradients(g, needed)` gives a gradient for every argument, None for those not needed, in fresh arrays of its
own: it may spend what the forward pass saved, for a graph is walked once. An operation that is linear in each
argument may give a tuple instead, a function g -> gradient for every argument: then nothing is kept that only
a constant's gradient would read, such as the inputs of a frozen layer. Second derivatives go through the
composition. `use_fused(False)` runs everything composed.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Array, array_module, erf
from .primitives import checked_ids, embedding, exp, getitem, identity, logsumexp, matmul, sigmoid, sqrt, tanh
from .primitives import erf as erf_primitive
from .primitives import maximum as maximum_primitive
from .tensor import RowsGradient, Tensor, fused_result, is_recording

# Elements of a block that passes several times through the cache. Smaller ones cost more than they save: at
# each operation a thread may have to wait for Python's lock.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class FusedOp:
    fused: Callable[..., Tensor]
    composed: Callable[..., Tensor]


FUSED: dict[str, FusedOp] = {}
_enabled = True


def use_fused(enabled: bool) -> None:
    """Whether fused operations run fused (the default) or as their compositions, in all threads."""
    global _enabled
    _enabled = enabled


def fused(composed: Callable[..., Tensor]) -> Callable[[Callable[..., Any]], Callable[..., Tensor]]:
    """Make a differentiable operation of a function on raw arrays, with `composed` as its specification."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Tensor]:
        """forward(arrays and settings) -> (result, gradients) becomes an operation on Tensors."""
        name = forward.__name__
        signature = inspect.signature(forward)

        def run_fused(*args: Any, **kwargs: Any) -> Tensor:
            if kwargs and any(
                isinstance(value, Tensor) for value in kwargs.values()
            ):  # gradients go by place
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                args, kwargs = bound.args, bound.kwargs
            places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
            tensors = [args[i] for i in places]
            if tensors and tensors[0].data.dtype.kind != "f":
                raise TypeError(f"{name}: needs floating-point values, and these are {tensors[0].dtype}")
            data, backward = forward(*[a.data if isinstance(a, Tensor) else a for a in args], **kwargs)
            if not is_recording():
                return Tensor(data)
            held, count = list(args), len(args)
            if isinstance(backward, tuple):
                backward = _without_constants(backward, held)

            def gradients(g: Array, needed: Any) -> list[Array | None]:
                wanted = [False] * count
                for i, need in zip(places, needed):
                    wanted[i] = need
                found = backward(g, wanted)
                return [found[i] if wanted[i] else None for i in places]

            def composition() -> tuple[Tensor, list[Tensor]]:
                # In op(x, f(x)) the gradient for x must not run through f here: the walk outside does that.
                again = list(held)
                for i in places:
                    again[i] = identity(held[i])
                return composed(*again, **kwargs), [again[i] for i in places]

            return fused_result(name, data, tensors, gradients, composition)

        @functools.wraps(forward)
        def operation(*args: Any, **kwargs: Any) -> Tensor:
            return run_fused(*args, **kwargs) if _enabled else composed(*args, **kwargs)

        FUSED[name] = FusedOp(run_fused, composed)
        return operation

    return decorate


def _without_constants(functions: tuple[Callable[[Array], Array], ...], held: list[Any]) -> Any:
    """gradients(g, needed) of the functions of arguments that need one, so that the others' arrays go free.

    held: the arguments, from which the composition starts. An operation linear in each argument has, for the
    only one with a gradient, the same gradient whatever its values: a zero that takes no memory replaces it.
    """
    learned = [i for i, a in enumerate(held) if isinstance(a, Tensor) and a.requires_grad]
    kept = {i: functions[i] for i in learned}
    if len(learned) == 1:
        x = held[learned[0]].data
        xp = array_module(x)
        held[learned[0]] = Tensor(xp.broadcast_to(xp.zeros((), x.dtype), x.shape), requires_grad=True)
    return lambda g, needed: [kept[i](g) if need else None for i, need in enumerate(needed)]


def _rows(x: Array) -> Array:
    """x (..., C) as a matrix (N, C)."""
    return x.reshape(-1, x.shape[-1]) if x.size else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _column_sums(g: Array) -> Array:
    """The sum of the rows of g (N, C), as a product: the BLAS adds faster than the reduction does."""
    return array_module(g).ones(len(g), g.dtype) @ g


# Tables and linear maps.


@fused(embedding)
def embedding_lookup(ids: Array, table: Array) -> Any:
    """out = table[ids].   dtable = the rows of g added at their ids.

    ids (...) of integers, table (V, C) -> (..., C). The gradient stays a list of rows until it is added to
    the table's own, so a table tied to the output head is never filled with zeros first.
    """

    def gradients(g: Array, needed: Any) -> Any:
        return None, RowsGradient(ids.reshape(-1), _rows(g), table.shape)

    return table[checked_ids(ids, table)], gradients


def linear_composed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_linear(x, weight, bias)
    out = matmul(x, weight.T)
    return out if bias is None else out + bias


@fused(linear_composed)
def linear(x: Array, weight: Array, bias: Array | None = None) -> Any:
    """out = x W^T + b.   dx = g W,  dW = g^T x,  db = sum of g.

    x (..., n), weight (m, n), bias (m) -> (..., m).
    """
    _check_linear(x, weight, bias)
    shape, rows = x.shape, _rows(x)
    out = rows @ weight.T
    if bias is not None:
        out += bias
    return out.reshape(*shape[:-1], len(weight)), (
        lambda g: (_rows(g) @ weight).reshape(shape),
        lambda g: _rows(g).T @ rows,
        lambda g: _column_sums(_rows(g)),
    )


def _check_linear(x: Any, weight: Any, bias: Any) -> None:
    fits = len(weight.shape) == 2 and x.shape[-1:] == weight.shape[1:]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        given = f"x {x.shape}, weight {weight.shape}" + (f", bias {bias.shape}" if bias is not None else "")
        raise ValueError(f"linear: {given} do not fit: they are (..., n), (m, n) and (m,)")


# Norms over the last axis.


def layer_norm_composed(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    centred = x - x.mean(-1, keepdims=True)
    out = centred / sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@fused(layer_norm_composed)
def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5) -> Any:
    """y = (x - mean x) / sqrt(var x + eps),  out = y * weight + bias   (Ba et al. 2016, equation 4).

    With h = g * weight:  dx = (h - mean h - y * mean(h * y)) / sqrt(var x + eps).
    x (..., C), weight and bias (C) -> (..., C); means are over C.
    """
    xp = array_module(x)
    n = x.dtype.type(1 / x.shape[-1])
    rows = _rows(x)
    y = rows - xp.einsum("ij->i", rows)[:, None] * n
    scale = 1 / xp.sqrt(xp.einsum("ij,ij->i", y, y)[:, None] * n + x.dtype.type(eps))
    y *= scale
    out = y * weight if weight is not None else y.copy()
    if bias is not None:
        out += bias

    def gradients(g: Array, needed: Any) -> Any:
        g = _rows(g)
        dx = dweight = dbias = None
        if len(needed) > 1 and needed[1]:
            dweight = xp.einsum("ij,ij->j", g, y)
        if len(needed) > 2 and needed[2]:
            dbias = _column_sums(g)
        if needed[0]:
            dx = g * weight if weight is not None else g.copy()
            slope = xp.einsum("ij,ij->i", dx, y)[:, None] * n
            dx -= xp.einsum("ij->i", dx)[:, None] * n
            dx -= xp.multiply(y, slope, out=y)  # y has served
            dx *= scale
            dx = dx.reshape(x.shape)
        return dx, dweight, dbias

    return out.reshape(x.shape), gradients


def rms_norm_composed(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    out = x / sqrt((x * x).mean(-1, keepdims=True) + eps)
    return out if weight is None else out * weight


@fused(rms_norm_composed)
def rms_norm(x: Array, weight: Array | None = None, eps: float = 1e-6) -> Any:
    """y = x / sqrt(mean x^2 + eps),  out = y * weight   (Zhang & Sennrich 2019, equation 4).

    With h = g * weight:  dx = (h - y * mean(h * y)) / sqrt(mean x^2 + eps).
    x (..., C), weight (C) -> (..., C); means are over C.
    """
    xp = array_module(x)
    n = x.dtype.type(1 / x.shape[-1])
    rows = _rows(x)
    scale = 1 / xp.sqrt(xp.einsum("ij,ij->i", rows, rows)[:, None] * n + x.dtype.type(eps))
    y = rows * scale
    out = y * weight if weight is not None else y.copy()

    def gradients(g: Array, needed: Any) -> Any:
        g = _rows(g)
        dx = None
        if needed[0]:
            dx = g * weight if weight is not None else g.copy()
            dx -= y * (xp.einsum("ij,ij->i", dx, y)[:, None] * n)
            dx *= scale
            dx = dx.reshape(x.shape)
        return dx, xp.einsum("ij,ij->j", g, y) if len(needed) > 1 and needed[1] else None

    return out.reshape(x.shape), gradients


# Activations. What the derivative shares with the value is computed once, in the forward pass.


def relu(x: Tensor) -> Tensor:
    """out = max(x, 0).   dx = g where x > 0, and g / 2 at 0, where both sides meet."""
    return maximum_primitive(x, 0.0)


def gelu_composed(x: Tensor, approximate: str = "tanh") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
    return 0.5 * x * (1 + erf_primitive(x * math.sqrt(0.5)))


@fused(gelu_composed)
def gelu(x: Array, approximate: str = "tanh") -> Any:
    """out = x Phi(x), Phi the normal distribution function   (Hendrycks & Gimpel 2016).

    approximate "tanh": Phi(x) = (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, as in GPT;
    "none": Phi(x) = (1 + erf(x / sqrt 2)) / 2, as in BERT.
    With u = sqrt(2/pi) (x + 0.044715 x^3):  Phi' = 2 u' Phi (1 - Phi), so out' = Phi (1 + 2 u' (x - out)).
    With erf:  Phi' = exp(-x^2 / 2) / sqrt(2 pi), so out' = Phi + x Phi'.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"gelu: approximate={approximate!r}: use 'tanh' or 'none'")
    xp, shape, x = array_module(x), x.shape, x.reshape(-1)
    out, slope = xp.empty(len(x), x.dtype), xp.empty(len(x), x.dtype) if is_recording() else None
    step = _BLOCK if xp is np else max(len(x), 1)
    for start in range(0, len(x), step):
        block = slice(start, start + step)
        _gelu(x[block], approximate == "tanh", out[block], None if slope is None else slope[block])

    def gradients(g: Array, needed: Any) -> Any:
        return xp.multiply(g.reshape(-1), slope, out=slope).reshape(shape), None

    return out.reshape(shape), gradients


def _gelu(x: Array, by_tanh: bool, out: Array, slope: Array | None) -> None:
    """Fill out, and the derivative slope, if it is given."""
    xp = array_module(x)
    if by_tanh:
        c = math.sqrt(2 / math.pi)
        square = x * x
        phi = square * (c * 0.044715)
        phi += c
        phi *= x  # u
        xp.tanh(phi, out=phi)
    else:
        phi = erf(x * math.sqrt(0.5))
    phi += 1
    phi *= 0.5
    xp.multiply(x, phi, out=out)
    if slope is None:
        return
    if by_tanh:
        twice_du = square
        twice_du *= 6 * 0.044715 * c
        twice_du += 2 * c
        xp.subtract(x, out, out=slope)
        slope *= twice_du
        slope += 1
        slope *= phi
    else:
        xp.exp(x * x * -0.5, out=slope)
        slope *= x
        slope *= 1 / math.sqrt(2 * math.pi)
        slope += phi


def silu_composed(x: Tensor) -> Tensor:
    return x * sigmoid(x)


@fused(silu_composed)
def silu(x: Array) -> Any:
    """out = x s with s = sigmoid(x), also called swish.   dx = g (s + out (1 - s))."""
    xp = array_module(x)
    s = xp.tanh(x * x.dtype.type(0.5))
    s += 1
    s *= 0.5
    out = x * s

    def gradients(g: Array, needed: Any) -> Any:
        slope = 1 - s
        slope *= out
        slope += s
        slope *= g
        return (slope,)

    return out, gradients


def swiglu_composed(gate: Tensor, up: Tensor) -> Tensor:
    _check_swiglu(gate, up)
    return silu_composed(gate) * up


@fused(swiglu_composed)
def swiglu(gate: Array, up: Array) -> Any:
    """out = y up with y = gate s, s = sigmoid(gate)   (Shazeer 2020, equation 6).

    dup = g y,  dgate = g up (s + y (1 - s)).   gate and up have the same shape (...).
    """
    _check_swiglu(gate, up)
    xp = array_module(gate, up)
    saves = is_recording()
    shape, gate, up = gate.shape, gate.reshape(-1), up.reshape(-1)
    n = len(gate)
    out = xp.empty(n, gate.dtype)
    y, slope = (xp.empty(n, gate.dtype) for _ in range(2)) if saves else (out, None)
    step = _BLOCK if xp is np else max(n, 1)
    for start in range(0, n, step):
        block = slice(start, start + step)
        s = gate[block] * gate.dtype.type(0.5)
        xp.tanh(s, out=s)
        s += 1
        s *= 0.5
        y_block = xp.multiply(gate[block], s, out=y[block])
        if saves:
            rest = xp.subtract(1, s, out=slope[block])
            rest *= y_block
            rest += s
            rest *= up[block]
        xp.multiply(y_block, up[block], out=out[block])

    def gradients(g: Array, needed: Any) -> Any:
        g = g.reshape(-1)
        return (
            xp.multiply(g, slope, out=slope).reshape(shape) if needed[0] else None,
            xp.multiply(g, y, out=y).reshape(shape) if needed[1] else None,
        )

    return out.reshape(shape), gradients


def _check_swiglu(gate: Any, up: Any) -> None:
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {gate.shape} and up {up.shape} do not fit: they have one shape")


# Softmax and losses.


def softmax_composed(x: Tensor, axis: int = -1) -> Tensor:
    return exp(x - logsumexp(x, axis, keepdims=True))


@fused(softmax_composed)
def softmax(x: Array, axis: int = -1) -> Any:
    """out = e^x / sum of e^x over the axis.   dx = out * (g - sum of g * out)."""
    xp = array_module(x)
    out = x - x.max(axis=axis, keepdims=True) if x.size else x.copy()
    xp.exp(out, out=out)
    out /= out.sum(axis=axis, keepdims=True)

    def gradients(g: Array, needed: Any) -> Any:
        dx = g * out
        dx -= out * dx.sum(axis=axis, keepdims=True)
        return dx, None

    return out, gradients


def log_softmax_composed(x: Tensor, axis: int = -1) -> Tensor:
    return x - logsumexp(x, axis, keepdims=True)


@fused(log_softmax_composed)
def log_softmax(x: Array, axis: int = -1) -> Any:
    """out = x - log(sum of e^x over the axis).   dx = g - e^out * sum of g."""
    xp = array_module(x)
    out = x - x.max(axis=axis, keepdims=True) if x.size else x.copy()
    out -= xp.log(xp.exp(out).sum(axis=axis, keepdims=True))
    return out, lambda g, needed: (g - xp.exp(out) * g.sum(axis=axis, keepdims=True), None)


def cross_entropy_composed(
    logits: Tensor,
    targets: Array,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    targets = targets.data if isinstance(targets, Tensor) else targets
    _check_cross_entropy(logits.shape, targets, label_smoothing, reduction)
    logits = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    targets = targets.reshape(-1)
    (kept,) = (targets != ignore_index).nonzero()
    logits, targets = getitem(logits, kept), checked_targets(targets[kept], logits.shape[-1])
    log_p = log_softmax_composed(logits)
    rows = array_module(targets).arange(len(kept))
    loss = -(1 - label_smoothing) * getitem(log_p, (rows, targets)).sum()
    if label_smoothing:
        loss = loss - label_smoothing * log_p.mean(-1).sum()
    return loss / max(len(kept), 1) if reduction == "mean" else loss


@fused(cross_entropy_composed)
def cross_entropy(
    logits: Array,
    targets: Array,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Any:
    """loss = mean over the positions of -log softmax(logits)[target], in nats.   dlogits = (p - q) g / n.

    q is 1 at the target; with label smoothing s it is s / V everywhere and 1 - s more at the target
    (Szegedy et al. 2016, section 7). logits (..., V), targets (...) of integers -> (). Positions whose
    target is ignore_index do not count; reduction "sum" leaves the division by their number n away.
    """
    _check_cross_entropy(logits.shape, targets, label_smoothing, reduction)
    p = _rows(logits).copy()
    loss, n = _cross_entropy_in_place(p, targets.reshape(-1), ignore_index, label_smoothing)
    scale = 1 / max(n, 1) if reduction == "mean" else 1.0

    def gradients(g: Array, needed: Any) -> Any:
        p_scaled = array_module(p).multiply(p, g * p.dtype.type(scale), out=p)
        return p_scaled.reshape(logits.shape), None, None, None, None

    return loss * loss.dtype.type(scale), gradients


def linear_cross_entropy_composed(
    x: Tensor, weight: Tensor, targets: Array, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    return cross_entropy_composed(linear_composed(x, weight), targets, ignore_index, 0.0, reduction)


@fused(linear_cross_entropy_composed)
def linear_cross_entropy(
    x: Array, weight: Array, targets: Array, ignore_index: int = -100, reduction: str = "mean"
) -> Any:
    """cross_entropy(x W^T, targets), the output head and its loss in one.

    With P = (p - q) / n from cross_entropy:  dx = g P W,  dW = g P^T x. The logits, the largest array of a
    step, are turned into P where they stand. x (..., C), weight (V, C), targets (...) -> ().
    """
    _check_linear(x, weight, None)
    _check_cross_entropy((*x.shape[:-1], len(weight)), targets, 0.0, reduction)
    rows = _rows(x)
    p = rows @ weight.T
    loss, n = _cross_entropy_in_place(p, targets.reshape(-1), ignore_index, 0.0)
    scale = x.dtype.type(1 / max(n, 1) if reduction == "mean" else 1.0)

    def gradients(g: Array, needed: Any) -> Any:
        g = g * scale
        dx = dweight = None
        if needed[0]:
            dx = p @ weight
            dx *= g
            dx = dx.reshape(x.shape)
        if needed[1]:
            dweight = p.T @ (rows * g)
        return dx, dweight, None, None, None

    return loss * scale, gradients


def _cross_entropy_in_place(
    logits: Array, targets: Array, ignore_index: int, smoothing: float
) -> tuple[Array, int]:
    """The summed loss over the rows and how many count; logits (N, V) becomes p - q, zero where ignored.

    With z = logits and smoothing s the loss of a row is  log(sum e^z) - (1 - s) z[target] - s mean(z).
    Blocks of rows that fit the cache go through all the passes at once; a large vocabulary goes row by row.
    """
    xp = array_module(logits, targets)
    N, V = logits.shape
    kept = targets != ignore_index
    targets = checked_targets(xp.where(kept, targets, 0), V)
    total = xp.zeros((), logits.dtype)
    step = max(1, _BLOCK // max(V, 1)) if xp is np else max(N, 1)
    for start in range(0, N, step):
        z, t, keep = (a[start : start + step] for a in (logits, targets, kept))
        rows = xp.arange(len(z))
        z -= z.max(axis=1, keepdims=True)
        chosen = z[rows, t]
        average = z.mean(axis=1) if smoothing else None
        xp.exp(z, out=z)
        sums = z.sum(axis=1, keepdims=True)
        loss = xp.log(sums[:, 0]) - (1 - smoothing) * chosen
        if smoothing:
            loss -= smoothing * average
            z /= sums
            z -= smoothing / V
        else:
            z /= sums
        z[rows, t] -= 1 - smoothing
        if not keep.all():
            loss[~keep] = 0  # not multiplied by 0: it may be infinite
            z[~keep] = 0
        total += loss.sum()
    return total, int(kept.sum())


def _check_cross_entropy(logits: tuple[int, ...], targets: Any, smoothing: float, reduction: str) -> None:
    if tuple(targets.shape) != tuple(logits[:-1]):
        raise ValueError(
            f"cross_entropy: targets {targets.shape} do not fit logits {logits}: one for each row"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"cross_entropy: reduction={reduction!r}: use 'mean' or 'sum'")
    if not 0 <= smoothing < 1:
        raise ValueError(f"cross_entropy: label_smoothing={smoothing} is not in [0, 1)")


def checked_targets(targets: Array, vocabulary: int) -> Array:
    """The targets, if each is a class from 0 to vocabulary - 1."""
    if targets.size and not (0 <= int(targets.min()) and int(targets.max()) < vocabulary):
        bad = int(targets.min()) if int(targets.min()) < 0 else int(targets.max())
        raise IndexError(f"cross_entropy: target {bad} is out of range: there are {vocabulary} classes")
    return targets
