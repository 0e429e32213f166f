"""The op table: for every operation, which inputs to try and what it must compute.

`PRIMITIVES` and `FUSED` have one row an operation. A row holds a hypothesis strategy of cases, how to call
the operation, and NumPy's function of the same meaning. A case holds float64 values inside the operation's
domain, at least 0.05 away from its kinks and ties (a central difference reaches 0.002 far), each as some view
of memory, and the arguments that have no gradient. Tests for the CPU, the stand-in for CuPy and a real card
run the same table; see checks.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from autograd import Tensor

MAX_SIZE = 24  # elements of a result: a full Jacobian stays cheap

# Views: the same values in another layout of memory, through what NumPy and CuPy have in common.

VIEWS: dict[str, Callable[[Any, Any], Any]] = {
    "contiguous": lambda xp, a: a,
    "permuted": lambda xp, a: a.T.copy().T,
    "swapped": lambda xp, a: a.swapaxes(0, -1).copy().swapaxes(0, -1),
    "strided": lambda xp, a: xp.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda xp, a: a[::-1].copy()[::-1],
    "offset": lambda xp, a: xp.concatenate([a, a], axis=0)[len(a) :],
    "broadcast": lambda xp, a: xp.broadcast_to(a[:1], a.shape),  # stride 0
}


@dataclass(frozen=True)
class Input:
    values: np.ndarray
    view: str = "contiguous"

    def array(self, xp: Any = np, dtype: str = "float64") -> Any:
        return VIEWS[self.view](xp, xp.asarray(self.values.astype(dtype)))


@dataclass(frozen=True)
class Case:
    """The differentiable inputs of an operation, and its other arguments."""

    inputs: Sequence[Input]
    args: Sequence[Any] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def tensors(self, xp: Any = np, dtype: str = "float64") -> list[Tensor]:
        return [Tensor(x.array(xp, dtype), requires_grad=True) for x in self.inputs]

    def constants(self, xp: Any = np, dtype: str = "float64") -> tuple[list[Any], dict[str, Any]]:
        """The other arguments, arrays among them on the device and Inputs in the precision."""
        return placed(list(self.args), xp, dtype), placed(self.kwargs, xp, dtype)


def placed(value: Any, xp: Any, dtype: str) -> Any:
    if isinstance(value, Input):
        return value.array(xp, dtype)
    if isinstance(value, np.ndarray):
        return xp.asarray(value)
    if isinstance(value, dict):
        return {key: placed(item, xp, dtype) for key, item in value.items()}
    return type(value)(placed(v, xp, dtype) for v in value) if isinstance(value, (tuple, list)) else value


@dataclass(frozen=True)
class Row:
    """cases; call(function, tensors, *args, **kwargs); NumPy's function, called in the same way."""

    cases: st.SearchStrategy[Case]
    call: Callable[..., Any] = lambda f, t, *args, **kwargs: f(*t, *args, **kwargs)
    numpy: Callable[..., Any] | None = None  # None: np.<name>, for a primitive
    differentiable: bool = True


# Domains: functions (random generator, shape) -> values.


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-2, 2, shape)


def positive(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(0.7, 2, shape)


def nonzero(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.choice((-1, 1), shape) * positive(rng, shape)


def distinct(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """No two elements closer than 0.1: the largest stays the largest."""
    n = math.prod(shape)
    return (0.1 * (rng.permutation(n) - n / 2) + rng.uniform(0.02, 0.05)).reshape(shape)


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """No two elements closer than 0.7: a variance is far from zero, around which normalization bends."""
    n = math.prod(shape)
    return (rng.permutation(n) - n / 2).reshape(shape) + rng.uniform(0, 0.3, shape)


def even(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return 0.2 * rng.integers(-5, 6, shape)


def odd(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """At least 0.1 away from anything even()."""
    return 0.1 + 0.2 * rng.integers(-5, 6, shape)


def coins(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(rng.random(shape) < 0.5)


def generators() -> st.SearchStrategy[np.random.Generator]:
    return st.builds(np.random.default_rng, st.integers(0, 2**32 - 1))


@st.composite
def inputs(draw: Any, shape: tuple[int, ...], domain: Callable[..., np.ndarray] = smooth) -> Input:
    values = domain(draw(generators()), shape)
    view = draw(st.sampled_from(sorted(VIEWS))) if shape else "contiguous"
    if view == "broadcast":
        if domain in (distinct, spread) or not shape[0]:
            view = "contiguous"
        values = np.broadcast_to(values[:1], shape).copy() if view == "broadcast" else values
    return Input(values, view)


# Shapes: up to four dimensions, one in six of size zero.


@st.composite
def shapes(draw: Any, min_dims: int = 0, empty: bool = True) -> tuple[int, ...]:
    shape: list[int] = []
    for _ in range(draw(st.integers(min_dims, 4))):
        shape.append(min(draw(st.integers(1, 4)), MAX_SIZE // math.prod(shape)))
    if shape and empty and draw(st.integers(0, 5)) == 5:
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    return tuple(shape)


@st.composite
def narrower(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to this one."""
    kept = shape[draw(st.integers(0, len(shape))) :] if draw(st.booleans()) else shape
    return tuple(n if draw(st.integers(0, 3)) else 1 for n in kept)


@st.composite
def shape_pairs(draw: Any, min_dims: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast; often neither is the result's."""
    shape = draw(shapes(min_dims))
    return draw(narrower(shape)), draw(narrower(shape)) if draw(st.booleans()) else shape


# Arguments: functions (draw, shape) -> tuple.


def nothing(draw: Any, shape: tuple[int, ...]) -> tuple:
    return ()


def one_of(*choices: Any) -> Callable[..., tuple]:
    return lambda draw, shape: (draw(st.sampled_from(choices)),)


def axis(draw: Any, shape: tuple[int, ...]) -> tuple:
    return (draw(st.integers(-len(shape), len(shape) - 1)),)


def new_axis(draw: Any, shape: tuple[int, ...]) -> tuple:
    return (draw(st.integers(-len(shape) - 1, len(shape))),)


def two_axes(draw: Any, shape: tuple[int, ...]) -> tuple:
    return axis(draw, shape) + axis(draw, shape)


def permutation(draw: Any, shape: tuple[int, ...]) -> tuple:
    return (tuple(draw(st.permutations(range(len(shape))))),) if draw(st.booleans()) else ()


def diagonal(draw: Any, shape: tuple[int, ...]) -> tuple:
    return (draw(st.integers(-3, 3)),)


def any_axes(draw: Any, shape: tuple[int, ...], candidates: Sequence[int] | None = None) -> tuple:
    """(axis, keepdims) of a reduction: one axis, several, or None for all."""
    keepdims = draw(st.booleans())
    candidates = list(range(len(shape))) if candidates is None else candidates
    if len(candidates) == len(shape) and (not shape or draw(st.booleans())):
        return None, keepdims
    axes = draw(st.lists(st.sampled_from(candidates), min_size=1, unique=True))
    axes = [i - len(shape) if draw(st.booleans()) else i for i in axes]
    return tuple(axes) if len(axes) > 1 or draw(st.booleans()) else axes[0], keepdims


def filled_axes(draw: Any, shape: tuple[int, ...]) -> tuple:
    """The same for a reduction that has no value over nothing: only axes that have elements."""
    candidates = [i for i, n in enumerate(shape) if n]
    assume(candidates or not shape)
    return any_axes(draw, shape, candidates)


def filled_axis(draw: Any, shape: tuple[int, ...]) -> tuple:
    candidates = [i - j for i, n in enumerate(shape) if n for j in (0, len(shape))]
    assume(candidates)
    return (draw(st.sampled_from(candidates)),)


def other_shape(draw: Any, shape: tuple[int, ...]) -> tuple:
    """The same number of elements in another shape, one length perhaps left to be found."""
    size, lengths = math.prod(shape), []
    for factor in (2, 3):
        if size and size % factor == 0 and draw(st.booleans()):
            lengths, size = [*lengths, factor], size // factor
    lengths = draw(st.permutations([*lengths, -1 if size and draw(st.booleans()) else size]))
    return (tuple(lengths),)


def wider_shape(draw: Any, shape: tuple[int, ...]) -> tuple:
    stretched = tuple(draw(st.integers(0, 3)) if n == 1 else n for n in shape)
    return ((draw(st.integers(1, 2)),) * draw(st.integers(0, 4 - len(shape))) + stretched,)


def squeezable(draw: Any, shape: tuple[int, ...]) -> tuple:
    ones = [i for i, n in enumerate(shape) if n == 1]
    return draw(st.sampled_from([(None,), *((i,) for i in ones), (tuple(ones),)]))


def sections(draw: Any, shape: tuple[int, ...]) -> tuple:
    """(equal parts or positions, axis) of a split."""
    i = draw(st.integers(-len(shape), len(shape) - 1))
    parts = [p for p in (1, 2, 3) if shape[i] % p == 0]
    cuts = sorted(draw(st.lists(st.integers(0, shape[i]), max_size=3)))
    return draw(st.sampled_from(parts)) if draw(st.booleans()) else cuts, i


def widths(draw: Any, shape: tuple[int, ...]) -> tuple:
    pairs = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in shape)
    return pairs, draw(st.sampled_from([0.0, -1.5]))


def index(draw: Any, shape: tuple[int, ...]) -> tuple:
    """Slices, numbers, new axes, an ellipsis, arrays of integers (repeated, negative) and masks."""
    rng = draw(generators())
    kind = draw(st.sampled_from(["basic", "rows", "points", "mixed", "mask", "row mask"]))
    if kind == "mask" or not shape:
        return (coins(rng, shape),)
    if kind == "row mask":
        return (coins(rng, shape[:1]),)
    if kind != "basic":
        assume(all(shape))
        columns = shape if kind == "points" else shape[:1]
        size = draw(st.sampled_from([(), (3,), (2, 2), (0,)]))
        arrays = tuple(np.asarray(rng.integers(-n, n, size)) for n in columns)
        return arrays if kind == "rows" else (arrays + (slice(None, None, -1),) * (len(shape) > len(arrays)),)
    parts: list[Any] = []
    for n in shape[: draw(st.integers(0, len(shape)))]:
        if n and draw(st.booleans()):
            parts.append(draw(st.integers(-n, n - 1)))
        else:
            parts.append(draw(st.slices(n)) if draw(st.booleans()) else slice(None, None, -2))
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), None)
    if draw(st.booleans()):
        parts.append(Ellipsis)
    return (tuple(parts),)


# Cases.


@st.composite
def one(
    draw: Any,
    domain: Any = smooth,
    args: Any = nothing,
    min_dims: int = 0,
    max_dims: int = 4,
    empty: bool = True,
) -> Case:
    shape = draw(shapes(min_dims, empty))[:max_dims]
    return Case([draw(inputs(shape, domain))], args(draw, shape))


@st.composite
def pair(draw: Any, first: Any = smooth, second: Any = smooth, args: Any = nothing) -> Case:
    a, b = draw(shape_pairs())
    return Case([draw(inputs(a, first)), draw(inputs(b, second))], args(draw, np.broadcast_shapes(a, b)))


@st.composite
def choices(draw: Any) -> Case:
    """where: two operands and a condition, all of which broadcast."""
    case = draw(pair())
    shape = np.broadcast_shapes(*(x.values.shape for x in case.inputs))
    return Case(case.inputs, (coins(draw(generators()), draw(narrower(shape))),))


@st.composite
def products(draw: Any) -> Case:
    """matmul: vectors, matrices, and stacks of matrices whose leading axes broadcast."""
    n, k, m = (draw(st.integers(0 if draw(st.integers(0, 7)) == 7 else 1, 3)) for _ in range(3))
    batch = draw(shapes(empty=False))[:2]
    left = (k,) if draw(st.integers(0, 4)) == 4 else (*draw(narrower(batch)), n, k)
    right = (k,) if draw(st.integers(0, 4)) == 4 else (*draw(narrower(batch)), k, m)
    return Case([draw(inputs(left)), draw(inputs(right))])


@st.composite
def einsums(draw: Any) -> Case:
    """einsum: sums over own and shared letters, axes of length 1 that broadcast, ellipses."""
    formula = draw(
        st.sampled_from(
            "i-> ij->ji ij->j ij,jk->ik ij,jk i,i-> i,j->ij ij,ij->i ij,ij->ij bqd,bkd->bqk i,ij,j-> "
            "i,j,k->kij ...->... ...i->... ...ij->...ji ...ij,...jk->...ik ...i,i->... "
            "i...,i...->...i".split()
        )
    )
    sizes = {letter: draw(st.integers(0 if draw(st.integers(0, 9)) == 9 else 1, 3)) for letter in "bdijkq"}
    dots = draw(shapes(empty=False))[:2]
    operands = []
    for letters in formula.partition("->")[0].split(","):
        named = tuple(sizes[c] if draw(st.integers(0, 4)) else 1 for c in letters.replace("...", ""))
        extra = draw(narrower(dots)) if "..." in letters else ()
        shape = extra + named if letters.startswith("...") else named + extra
        operands.append(draw(inputs(shape)))
    return Case(operands, (formula,))


@st.composite
def lookups(draw: Any) -> Case:
    """embedding: a table, and ids of which some repeat."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    ids = np.asarray(draw(generators()).integers(0, rows, draw(shapes())[:2]))
    return Case([draw(inputs((rows, width)))], (ids,))


@st.composite
def several(draw: Any, same: bool) -> Case:
    """concatenate, stack: one to three tensors and the axis along which they meet."""
    shape = draw(shapes(min_dims=0 if same else 1))
    (i,) = (new_axis if same else axis)(draw, shape)
    operands = []
    for _ in range(draw(st.integers(1, 3))):
        lengths = list(shape)
        if not same:
            lengths[i] = draw(st.integers(0, 2))
        operands.append(draw(inputs(tuple(lengths))))
    return Case(operands, (i,))


@st.composite
def scatters(draw: Any) -> Case:
    """put: an index into a shape, and values of the indexed shape."""
    shape = draw(shapes(min_dims=1))
    (where,) = index(draw, shape)
    return Case([draw(inputs(np.zeros(shape)[where].shape))], (where, shape))


@st.composite
def sums_back(draw: Any) -> Case:
    """unbroadcast: a gradient, and the shape of the operand that was broadcast."""
    shape = draw(shapes())
    return Case([draw(inputs(shape))], (draw(narrower(shape)),))


@st.composite
def normalized(draw: Any, domain: Any, parameters: int) -> Case:
    """layer_norm, rms_norm: rows of at least one element, and up to so many parameters of a row's length."""
    shape = (*draw(shapes())[:3], draw(st.integers(1, 4)))
    operands = [inputs(shape[-1:], smooth)] * draw(st.integers(0, parameters))
    eps = draw(st.sampled_from([1e-5, 0.1]))
    return Case([draw(inputs(shape, domain)), *map(draw, operands)], kwargs={"eps": eps})


@st.composite
def linears(draw: Any, bias: bool = True) -> Case:
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    x = inputs((*draw(shapes())[:2], n))
    biases = [inputs((m,))] * draw(st.integers(0, 1)) if bias else []
    return Case([draw(x), draw(inputs((m, n))), *map(draw, biases)])


@st.composite
def classified(draw: Any, head: bool) -> Case:
    """cross_entropy: logits, or features and a head's weights; targets, some of them to be ignored."""
    classes, leading = draw(st.integers(1, 4)), draw(shapes())[:2]
    rng, ignored = draw(generators()), draw(st.sampled_from([-100, 0]))
    targets = np.where(rng.random(leading) < 0.3, ignored, rng.integers(0, classes, leading))
    kwargs = {"ignore_index": ignored, "reduction": draw(st.sampled_from(["mean", "sum"]))}
    if head:
        n = draw(st.integers(1, 3))
        return Case([draw(inputs((*leading, n))), draw(inputs((classes, n)))], (targets,), kwargs)
    smoothing = draw(st.sampled_from([0.0, 0.2]))
    return Case([draw(inputs((*leading, classes)))], (targets,), {**kwargs, "label_smoothing": smoothing})


def dropped(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.where(rng.random(shape) < 0.3, 0.0, 1.25)


@st.composite
def attentions(draw: Any) -> Case:
    """attention: grouped heads, fewer or more keys than queries, each mask, and queries that see nothing."""
    B, kv_heads, group, n, m = (draw(st.integers(1, 2)) for _ in range(5))
    n, m = n * draw(st.integers(1, 2)), m * draw(st.integers(0, 2))
    d, d_v, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2)), kv_heads * group
    kwargs: dict[str, Any] = {"causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.3]))}
    if kwargs["causal"] and draw(st.booleans()):
        kwargs["window"] = draw(st.integers(1, 3))
    if draw(st.booleans()):
        kwargs["key_lengths"] = draw(generators()).integers(0, m + 1, B)
    if draw(st.integers(0, 3)) == 3:
        kwargs["keep"] = Input(dropped(draw(generators()), (B, heads, n, m)))
    operands = [(B, heads, n, d), (B, kv_heads, m, d), (B, kv_heads, m, d_v)]
    return Case([draw(inputs(shape)) for shape in operands], (), kwargs)


@st.composite
def self_attentions(draw: Any) -> Case:
    B, T, heads, d = (draw(st.integers(1, top)) for top in (2, 3, 2, 2))
    kwargs: dict[str, Any] = {"causal": draw(st.booleans())}
    if kwargs["causal"] and draw(st.booleans()):
        kwargs["window"] = draw(st.integers(1, 3))
    if draw(st.integers(0, 3)) == 3:
        kwargs["keep"] = Input(dropped(draw(generators()), (B, heads, T, T)))
    return Case([draw(inputs((B, T, 3 * heads * d)))], (heads,), kwargs)


@st.composite
def multi_head_attentions(draw: Any) -> Case:
    B, heads, n, m, d, d_v = (draw(st.integers(1, top)) for top in (2, 2, 3, 3, 2, 2))
    kwargs: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        kwargs["key_lengths"] = draw(generators()).integers(0, m + 1, B)
    if draw(st.integers(0, 3)) == 3:
        kwargs["keep"] = Input(dropped(draw(generators()), (B, heads, n, m)))
    operands = [(B, n, heads * d), (B, m, heads * d), (B, m, heads * d_v)]
    return Case([draw(inputs(shape)) for shape in operands], (heads,), kwargs)


@st.composite
def turns(draw: Any) -> Case:
    """rotary: heads side by side, and any two tables, which need not be a cosine and a sine."""
    leading = draw(shapes())[:2]
    T, heads, half = (draw(st.integers(1, top)) for top in (3, 2, 2))
    tables = [Input(smooth(draw(generators()), (T, half))) for _ in range(2)]
    return Case([draw(inputs((*leading, T, heads * 2 * half)))], tables)


@st.composite
def rotary_attentions(draw: Any) -> Case:
    B, T, kv_heads, group, half = (draw(st.integers(1, top)) for top in (2, 3, 2, 2, 2))
    tables = [Input(smooth(draw(generators()), (T, half))) for _ in range(2)]
    kwargs: dict[str, Any] = {"window": draw(st.sampled_from([None, 1, 2]))}
    if draw(st.integers(0, 3)) == 3:
        kwargs["keep"] = Input(dropped(draw(generators()), (B, kv_heads * group, T, T)))
    q, kv = (B, T, kv_heads * group * 2 * half), (B, T, kv_heads * 2 * half)
    return Case([draw(inputs(shape)) for shape in (q, kv, kv)], tables, kwargs)


@st.composite
def gated(draw: Any) -> Case:
    """swiglu: a gate and what it lets through."""
    shape = draw(shapes())
    return Case([draw(inputs(shape)), draw(inputs(shape))])


@st.composite
def wkvs(draw: Any) -> Case:
    """wkv: decays, bonuses, keys and values, from nothing or from a state."""
    B, T, C = (draw(st.integers(1, top)) for top in (2, 4, 2))
    operands = [inputs((C,), positive), inputs((C,)), inputs((B, T, C)), inputs((B, T, C))]
    state = tuple(Input(domain(draw(generators()), (B, C))) for domain in (smooth, positive, smooth))
    return Case([draw(operand) for operand in operands], (state if draw(st.booleans()) else None,))


# References that NumPy has no name for.

erf = np.vectorize(math.erf, otypes=[float])


def scattered(values: np.ndarray, where: Any, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape)
    np.add.at(out, where, values)
    return out


def summed_back(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The transpose of broadcasting, by its definition: every element goes to where it came from."""
    source = np.broadcast_to(np.arange(math.prod(shape)).reshape(shape), g.shape)
    return scattered(g.ravel(), source.ravel(), (math.prod(shape),)).reshape(shape)


def keeping(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, axis, keepdims: f(a, axis=axis, keepdims=keepdims)


def log_sum_exp(a: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    return np.log(np.sum(np.exp(a), axis=axis, keepdims=keepdims))


def padded(a: np.ndarray, pairs: Any, value: float) -> np.ndarray:
    return np.pad(a, pairs, constant_values=value)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)


def layer_norm(x: np.ndarray, weight: Any = 1.0, bias: Any = 0.0, eps: float = 0.0) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x: np.ndarray, weight: Any = 1.0, eps: float = 0.0) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def gelu(x: np.ndarray, approximate: str) -> np.ndarray:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * (1 + (np.tanh(inner) if approximate == "tanh" else erf(x / math.sqrt(2)))) / 2


def cross_entropy(
    logits: np.ndarray, targets: Any, ignore_index: int, reduction: str, label_smoothing: float = 0.0
) -> np.ndarray:
    losses = []
    for position in np.argwhere(targets != ignore_index):
        p = softmax(logits[tuple(position)])
        q = np.full(p.shape, label_smoothing / len(p))
        q[targets[tuple(position)]] += 1 - label_smoothing
        losses.append(-np.sum(q * np.log(p)))
    return np.sum(losses) / (max(len(losses), 1) if reduction == "mean" else 1)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray,
    causal: bool = False, window: Any = None, key_lengths: Any = None, scale: Any = None, keep: Any = 1.0,
) -> np.ndarray:  # fmt: skip
    """One query at a time: the keys that it sees, their softmax, the mean of their values."""
    (B, H, n, d), (_, kv_heads, m, d_v) = q.shape, v.shape
    out, keep = np.zeros((B, H, n, d_v)), np.broadcast_to(keep, (B, H, n, m))
    for b, h, i in np.ndindex(B, H, n):
        position = i + m - n
        seen = [
            j
            for j in range(m if key_lengths is None else key_lengths[b])
            if (not causal or j <= position) and (window is None or j > position - window)
        ]
        if seen:
            scores = k[b, h // (H // kv_heads), seen] @ q[b, h, i] * (scale or 1 / math.sqrt(d))
            out[b, h, i] = (softmax(scores) * keep[b, h, i, seen]) @ v[b, h // (H // kv_heads), seen]
    return out


def multi_head_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, **kwargs: Any
) -> np.ndarray:
    split = lambda x: np.stack(np.split(x, heads, -1), 1)  # (B, H, T, d)
    return np.concatenate(list(attention(split(q), split(k), split(v), **kwargs).swapaxes(0, 1)), -1)


def self_attention(qkv: np.ndarray, heads: int, **kwargs: Any) -> np.ndarray:
    return multi_head_attention(*np.split(qkv, 3, -1), heads, **kwargs)


def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Points as complex numbers, each the i-th number of a half of a head and of its other half."""
    heads = np.split(x, x.shape[-1] // (2 * cos.shape[1]), -1)
    turned = [(a + 1j * b) * (cos + 1j * sin) for a, b in (np.split(head, 2, -1) for head in heads)]
    return np.concatenate([part for z in turned for part in (z.real, z.imag)], -1)


def rotary_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, cos: np.ndarray, sin: np.ndarray, **kwargs: Any
) -> np.ndarray:
    split = lambda x: np.stack(np.split(x, x.shape[-1] // (2 * cos.shape[1]), -1), 1)  # (B, H, T, d)
    out = attention(split(rotary(q, cos, sin)), split(rotary(k, cos, sin)), split(v), causal=True, **kwargs)
    return np.concatenate(list(out.swapaxes(0, 1)), -1)


def wkv(w: np.ndarray, u: np.ndarray, k: np.ndarray, v: np.ndarray, state: Any = None) -> np.ndarray:
    """Equation 16 of Peng et al. 2023 as it stands, one position at a time."""
    out = np.empty(k.shape)
    aa, bb, pp = state or (0.0, 0.0, 0.0)
    for t in range(k.shape[1]):
        weights = [np.exp(k[:, i] - (t - 1 - i) * w) for i in range(t)] + [np.exp(u + k[:, t])]
        past = np.exp(pp - t * w)
        top = past * aa + sum(weight * v[:, i] for i, weight in enumerate(weights))
        out[:, t] = top / (past * bb + sum(weights))
    return out


def as_list(f: Any, t: Any, *args: Any) -> Any:
    return f(list(t), *args)


def args_first(f: Any, t: Any, *args: Any) -> Any:
    return f(*args, *t)


VALUES = st.one_of(
    pair(positive), one(positive, one_of(0, 1, 2, 3, 0.5, -1.5)), one(nonzero, one_of(2, 3, -1))
)
COMPARED = Row(pair(even, even), differentiable=False)

PRIMITIVES: dict[str, Row] = {
    "abs": Row(one(nonzero)),
    "add": Row(pair()),
    "astype": Row(one(), lambda f, t: f(t[0], t[0].dtype), np.asarray),
    "broadcast_to": Row(one(args=wider_shape)),
    "concatenate": Row(several(same=False), as_list),
    "cumsum": Row(one(args=axis, min_dims=1)),
    "div": Row(pair(second=nonzero), numpy=np.divide),
    "einsum": Row(einsums(), args_first),
    "embedding": Row(lookups(), args_first, lambda ids, table: table[ids]),
    "equal": COMPARED,
    "erf": Row(one(), numpy=erf),
    "exp": Row(one()),
    "expand_dims": Row(one(args=new_axis, max_dims=3)),
    "getitem": Row(one(args=index), numpy=lambda a, i: a[i]),
    "greater": COMPARED,
    "greater_equal": COMPARED,
    "identity": Row(one(), numpy=np.asarray),
    "less": COMPARED,
    "less_equal": COMPARED,
    "log": Row(one(positive)),
    "logsumexp": Row(one(args=filled_axes), numpy=log_sum_exp),
    "matmul": Row(products()),
    "max": Row(one(distinct, filled_axes), numpy=keeping(np.max)),
    "maximum": Row(pair(even, odd)),
    "mean": Row(one(args=filled_axes), numpy=keeping(np.mean)),
    "min": Row(one(distinct, filled_axes), numpy=keeping(np.min)),
    "minimum": Row(pair(even, odd)),
    "mul": Row(pair(), numpy=np.multiply),
    "neg": Row(one(), numpy=np.negative),
    "not_equal": COMPARED,
    "pad": Row(one(args=widths, min_dims=1), numpy=padded),
    "power": Row(VALUES),
    "put": Row(scatters(), numpy=scattered),
    "reshape": Row(one(args=other_shape)),
    "sigmoid": Row(one(), numpy=lambda a: 1 / (1 + np.exp(-a))),
    "split": Row(one(args=sections, min_dims=1)),
    "sqrt": Row(one(positive)),
    "squeeze": Row(one(args=squeezable)),
    "stack": Row(several(same=True), as_list),
    "sub": Row(pair(), numpy=np.subtract),
    "sum": Row(one(args=any_axes), numpy=keeping(np.sum)),
    "swapaxes": Row(one(args=two_axes, min_dims=1)),
    "tanh": Row(one()),
    "transpose": Row(one(args=permutation)),
    "tril": Row(one(args=diagonal, min_dims=2)),
    "triu": Row(one(args=diagonal, min_dims=2)),
    "unbroadcast": Row(sums_back(), numpy=summed_back),
    "var": Row(one(args=filled_axes), numpy=keeping(np.var)),
    "where": Row(choices(), args_first),
}

FUSED: dict[str, Row] = {
    "attention": Row(attentions(), numpy=attention),
    "cross_entropy": Row(classified(head=False), numpy=cross_entropy),
    "embedding_lookup": PRIMITIVES["embedding"],
    "gelu": Row(one(args=one_of("tanh", "none")), numpy=gelu),
    "layer_norm": Row(normalized(spread, 2), numpy=layer_norm),
    "linear": Row(linears(), numpy=lambda x, w, b=0.0: x @ w.T + b),
    "linear_cross_entropy": Row(
        classified(head=True), numpy=lambda x, w, *a, **kw: cross_entropy(x @ w.T, *a, **kw)
    ),
    "log_softmax": Row(one(args=filled_axis, min_dims=1), numpy=lambda x, axis: np.log(softmax(x, axis))),
    "multi_head_attention": Row(multi_head_attentions(), numpy=multi_head_attention),
    "rms_norm": Row(normalized(nonzero, 1), numpy=rms_norm),
    "rotary": Row(turns(), numpy=rotary),
    "rotary_attention": Row(rotary_attentions(), numpy=rotary_attention),
    "self_attention": Row(self_attentions(), numpy=self_attention),
    "silu": Row(one(), numpy=lambda x: x / (1 + np.exp(-x))),
    "softmax": Row(one(args=filled_axis, min_dims=1), numpy=softmax),
    "swiglu": Row(gated(), numpy=lambda a, b: a / (1 + np.exp(-a)) * b),
    "wkv": Row(wkvs(), numpy=wkv),
}
