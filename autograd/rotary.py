"""Rotary positions: the query and the key at position t are turned by angles that grow with t.

A head's d numbers are d/2 points of the plane. Point i turns by t times the i-th frequency, so the product
of a query at position s and a key at position t depends on s - t alone (Su et al. 2021, "RoFormer", equation
16). Point i is (x_i, x_(i + d/2)), as in published weights; the paper pairs neighbours, which is the same
model with its columns in another order.
"""

from __future__ import annotations

from typing import Any

from .attention import attend_to, attention_composed, check_shapes
from .backend import Array, array_module
from .fused import fused
from .primitives import concatenate, getitem, reshape, transpose
from .tensor import Tensor


def rotary_composed(x: Tensor, cos: Array, sin: Array) -> Tensor:
    d = _head_size(x, cos, sin)
    cos, sin = Tensor(cos[:, None]), Tensor(sin[:, None])  # (T, 1, d/2), the same for all heads
    heads = reshape(x, (*x.shape[:-1], x.shape[-1] // d, d))
    a, b = getitem(heads, (..., slice(d // 2))), getitem(heads, (..., slice(d // 2, d)))
    return reshape(concatenate([a * cos - b * sin, b * cos + a * sin], -1), x.shape)


@fused(rotary_composed)
def rotary(x: Array, cos: Array, sin: Array) -> Any:
    """Each point (a, b) of each head becomes (a cos - b sin, b cos + a sin).   dx = g turned back.

    x (..., T, H d), the heads side by side; cos and sin (T, d/2) of the angles at each position.

    Raises:
        ValueError: shapes that do not fit, named.
    """
    d = _head_size(x, cos, sin)
    tables = _tables(cos, sin, x.shape[-1] // d)

    def gradients(g: Array, needed: Any) -> Any:
        return _turned(g, *tables, back=True), None, None

    return _turned(x, *tables), gradients


def rotary_attention_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Array,
    sin: Array,
    window: int | None = None,
    keep: Array | None = None,
) -> Tensor:
    d = _check_attention(q, k, v, cos, sin)
    B, T, width = q.shape

    def heads(x: Tensor) -> Tensor:
        return transpose(reshape(x, (B, T, x.shape[-1] // d, d)), (0, 2, 1, 3))  # (B, H, T, d)

    q, k = rotary_composed(q, cos, sin), rotary_composed(k, cos, sin)
    out = attention_composed(heads(q), heads(k), heads(v), True, window, keep=keep)
    return reshape(transpose(out, (0, 2, 1, 3)), (B, T, width))


@fused(rotary_attention_composed)
def rotary_attention(
    q: Array,
    k: Array,
    v: Array,
    cos: Array,
    sin: Array,
    window: int | None = None,
    keep: Array | None = None,
) -> Any:
    """Causal attention among T positions, with q and k turned by `rotary` first.

    q (B, T, H d), k and v (B, T, H_kv d), as linear maps make them; cos, sin (T, d/2) -> (B, T, H d). The
    heads are views, and the gradients are filled through such views: nothing is cut apart or joined.
    """
    d = _check_attention(q, k, v, cos, sin)
    B, T, width = q.shape
    xp = array_module(q, k, v)

    def heads(x: Array) -> Array:
        return x.reshape(B, T, x.shape[-1] // d, d).transpose(0, 2, 1, 3)  # (B, H, T, d)

    wide, narrow = (_tables(cos, sin, x.shape[-1] // d) for x in (q, k))
    arrays = heads(_turned(q, *wide)), heads(_turned(k, *narrow)), heads(v)
    check_shapes(*arrays, True, window, None)
    attend = attend_to(*arrays, True, window, None, None, keep)

    def gradients(g: Array, needed: Any) -> Any:
        dq, dk, dv = (xp.empty(x.shape, x.dtype) for x in (q, k, v))
        attend.backward(heads(g), heads(dq), heads(dk), heads(dv))
        return _turned(dq, *wide, back=True), _turned(dk, *narrow, back=True), dv, *[None] * 4

    return attend.out.transpose(0, 2, 1, 3).reshape(B, T, width), gradients


def _tables(cos: Array, sin: Array, heads: int) -> tuple[Array, Array]:
    """cos twice and (-sin, sin), each (T, heads, 2, d/2).

    One whole row for each position lets NumPy run over it at once; a head by itself is a short run.
    """
    xp = array_module(cos, sin)
    T, half = cos.shape
    tables = xp.empty((2, T, heads, 2, half), cos.dtype)
    tables[0] = cos[:, None, None]
    tables[1, :, :, 0] = -sin[:, None]
    tables[1, :, :, 1] = sin[:, None]
    return tables[0], tables[1]


def _turned(x: Array, cos: Array, sin: Array, back: bool = False) -> Array:
    """x (..., T, H d) with every point turned, or turned back: x cos + (x with its halves swapped) sin."""
    points = x.reshape(*x.shape[:-1], *cos.shape[1:])  # (..., T, H, 2, d/2)
    out = points * cos
    other = array_module(x).empty(points.shape, x.dtype)
    other[..., 0, :] = points[..., 1, :]
    other[..., 1, :] = points[..., 0, :]
    other *= sin
    if back:
        out -= other
    else:
        out += other
    return out.reshape(x.shape)


def _head_size(x: Any, cos: Any, sin: Any) -> int:
    """d, if x (..., T, H d) and cos, sin (T, d/2) fit."""
    fits = len(x.shape) >= 2 and len(cos.shape) == 2 and cos.shape == sin.shape and cos.shape[1] > 0
    if not fits or x.shape[-2] != cos.shape[0] or x.shape[-1] % (2 * cos.shape[1]):
        raise ValueError(
            f"rotary: x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do not fit: "
            "they are (..., length, heads * d), (length, d / 2), (length, d / 2)"
        )
    return 2 * cos.shape[1]


def _check_attention(q: Any, k: Any, v: Any, cos: Any, sin: Any) -> int:
    """d, if q (B, T, H d), k and v (B, T, H_kv d) and cos, sin (T, d/2) fit; H / H_kv is up to attention."""
    if len(q.shape) != 3 or k.shape != v.shape or k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"rotary_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: "
            "they are (batch, length, heads * d), and twice (batch, length, kv_heads * d)"
        )
    _head_size(q, cos, sin)
    return _head_size(k, cos, sin)
