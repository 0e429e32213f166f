"""Scaled dot-product attention: softmax(q k^T * scale) v, composed and fused.

Which key a query may see: with n queries and m keys, query i stands at position i + m - n, so the last query
stands at the last key. `causal` hides the keys after that position, `window` also those `window` or more
before it, `key_lengths` (B,) the padding from that length on. A query that sees nothing gives zeros.
Heads may be grouped: k and v have H_kv heads, each serving H / H_kv query heads (Ainslie et al. 2023).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .backend import Array, array_module
from .flash import FlashAttend, why_not
from .fused import fused
from .primitives import broadcast_to, exp, logsumexp, matmul, reshape, swapaxes, transpose, where
from .tensor import Tensor, is_recording

_QUERY_BLOCK = 64


def attention_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window: int | None = None,
    key_lengths: Array | None = None,
    scale: float | None = None,
    keep: Array | None = None,
) -> Tensor:
    check_shapes(q, k, v, causal, window, key_lengths)
    (B, H, n, _), (_, H_kv, m, d_v) = q.shape, v.shape
    p = attention_weights(q, k, causal, window, key_lengths, scale)
    if keep is not None:
        p = p * Tensor(keep)
    grouped = reshape(p, (B, H_kv, H // H_kv, n, m))
    return reshape(matmul(grouped, reshape(v, (B, H_kv, 1, m, d_v))), (B, H, n, d_v))


def attention_weights(
    q: Tensor,
    k: Tensor,
    causal: bool = False,
    window: int | None = None,
    key_lengths: Array | None = None,
    scale: float | None = None,
) -> Tensor:
    """P = softmax(q k^T * scale) over the visible keys, for looking at.

    q (B, H, n, d), k (B, H_kv, m, d) -> (B, H, n, m).
    """
    check_shapes(q, k, k, causal, window, key_lengths)
    xp = array_module(q.data, k.data)
    (B, H, n, d), (_, H_kv, m, _) = q.shape, k.shape
    grouped = reshape(q, (B, H_kv, H // H_kv, n, d))
    scores = matmul(grouped, swapaxes(reshape(k, (B, H_kv, 1, m, d)), -1, -2)) * _scale(scale, d)
    visible = _visible(xp, slice(0, n), slice(0, m), m - n, causal, window, key_lengths)
    if visible is not None:
        scores = where(visible, scores, -math.inf)  # (B, H_kv, H / H_kv, n, m)
    total = (
        logsumexp(scores, -1, keepdims=True)
        if m
        else broadcast_to(Tensor(xp.zeros((), q.dtype)), scores.shape)
    )
    p = exp(scores - where(xp.isfinite(total.data), total, 0.0))
    return reshape(p, (B, H, n, m))


@fused(attention_composed)
def attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    window: int | None = None,
    key_lengths: Array | None = None,
    scale: float | None = None,
    keep: Array | None = None,
) -> Any:
    """out = (P * keep) v with P = softmax(q k^T * scale) over the visible keys (Vaswani et al. 2017, eq. 1).

    q (B, H, n, d), k (B, H_kv, m, d), v (B, H_kv, m, d_v) -> (B, H, n, d_v). scale defaults to 1/sqrt(d).
    keep (B, H, n, m) multiplies the probabilities: dropout's mask.
    dv = P^T g,  dP = g v^T,  dS = P * (dP - rowsum(g * out)),  dq = dS k * scale,  dk = dS^T q * scale.
    """
    check_shapes(q, k, v, causal, window, key_lengths)
    attend = attend_to(q, k, v, causal, window, key_lengths, scale, keep)

    def gradients(g: Array, needed: Any) -> Any:
        xp = array_module(q)
        dq, dk, dv = (xp.empty(a.shape, a.dtype) for a in (q, k, v))
        attend.backward(g, dq, dk, dv)
        return dq, dk, dv, *[None] * 5

    return attend.out, gradients


def multi_head_attention_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    causal: bool = False,
    key_lengths: Array | None = None,
    keep: Array | None = None,
) -> Tensor:
    _check_heads(q, k, v, heads)

    def split(x: Tensor) -> Tensor:
        B, T, width = x.shape
        return transpose(reshape(x, (B, T, heads, width // heads)), (0, 2, 1, 3))  # (B, H, T, d)

    out = attention_composed(split(q), split(k), split(v), causal, None, key_lengths, keep=keep)
    return reshape(transpose(out, (0, 2, 1, 3)), (*q.shape[:2], v.shape[2]))


@fused(multi_head_attention_composed)
def multi_head_attention(
    q: Array,
    k: Array,
    v: Array,
    heads: int,
    causal: bool = False,
    key_lengths: Array | None = None,
    keep: Array | None = None,
) -> Any:
    """attention with the heads side by side, as linear maps make them (Vaswani et al. 2017, section 3.2.2).

    q (B, n, H d), k (B, m, H d), v (B, m, H d_v) -> (B, n, H d_v). The heads are views, and the gradients are
    filled through such views: nothing is cut apart or joined.
    """
    _check_heads(q, k, v, heads)
    xp = array_module(q, k, v)
    split = lambda x: x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(
        0, 2, 1, 3
    )  # (B, H, T, d)
    arrays = split(q), split(k), split(v)
    check_shapes(*arrays, causal, None, key_lengths)
    attend = attend_to(*arrays, causal, None, key_lengths, None, keep)

    def gradients(g: Array, needed: Any) -> Any:
        dq, dk, dv = (xp.empty(x.shape, x.dtype) for x in (q, k, v))
        attend.backward(split(g), split(dq), split(dk), split(dv))
        return dq, dk, dv, *[None] * 4

    return attend.out.transpose(0, 2, 1, 3).reshape(*q.shape[:2], v.shape[2]), gradients


def _check_heads(q: Any, k: Any, v: Any, heads: int) -> None:
    fits = len(q.shape) == len(k.shape) == len(v.shape) == 3 and q.shape[0] == k.shape[0] == v.shape[0]
    fits = fits and k.shape[1] == v.shape[1] and q.shape[2] == k.shape[2]
    if not fits or q.shape[2] % heads or v.shape[2] % heads:
        raise ValueError(
            f"multi_head_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: "
            f"they are (batch, queries, {heads} heads * d), (batch, keys, {heads} * d), and (batch, keys, "
            f"{heads} * d_v)"
        )


def self_attention_composed(
    qkv: Tensor, heads: int, causal: bool = False, window: int | None = None, keep: Array | None = None
) -> Tensor:
    B, T, width = qkv.shape
    packed = transpose(reshape(qkv, _packed(qkv.shape, heads)), (2, 0, 3, 1, 4))  # (3, B, H, T, d)
    out = attention_composed(packed[0], packed[1], packed[2], causal, window, keep=keep)  # (B, H, T, d)
    return reshape(transpose(out, (0, 2, 1, 3)), (B, T, width // 3))


@fused(self_attention_composed)
def self_attention(
    qkv: Array, heads: int, causal: bool = False, window: int | None = None, keep: Array | None = None
) -> Any:
    """attention among T positions, from q, k and v side by side as one linear map makes them.

    qkv (B, T, 3 C) -> (B, T, C). The heads are views of qkv, and its gradient is filled through the same
    views, so nothing is cut apart or joined.
    """
    B, T, width = qkv.shape
    split = _packed(qkv.shape, heads)
    q, k, v = qkv.reshape(split).transpose(2, 0, 3, 1, 4)  # each (B, H, T, d)
    check_shapes(q, k, v, causal, window, None)
    attend = attend_to(q, k, v, causal, window, None, None, keep)

    def gradients(g: Array, needed: Any) -> Any:
        dqkv = array_module(qkv).empty(split, qkv.dtype)
        dq, dk, dv = dqkv.transpose(2, 0, 3, 1, 4)
        attend.backward(g.reshape(B, T, heads, split[-1]).transpose(0, 2, 1, 3), dq, dk, dv)
        return dqkv.reshape(qkv.shape), *[None] * 4

    return attend.out.transpose(0, 2, 1, 3).reshape(B, T, width // 3), gradients


def _packed(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """The shape (B, T, 3, heads, d) of qkv (B, T, 3 C)."""
    if len(shape) != 3 or shape[2] % (3 * heads):
        raise ValueError(f"self_attention: qkv {shape} is not (batch, length, 3 * {heads} heads * d)")
    return (*shape[:2], 3, heads, shape[2] // (3 * heads))


def attend_to(
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    key_lengths: Array | None,
    scale: float | None,
    keep: Array | None,
) -> FlashAttend | _Attend:
    """The forward pass on raw arrays, by the kernel of flash.py where that can: `.out`, then `.backward`."""
    if why_not(q, k, v, scale, keep) is None:
        return FlashAttend(q, k, v, causal, window, key_lengths, scale)
    return _Attend(q, k, v, causal, window, key_lengths, scale, keep)


class _Attend:
    """Attention on raw arrays, block by block of queries, so that keys no query sees cost nothing.

    The H / H_kv query heads that share a key head stand side by side in one product. Scores are indexed
    (B, H_kv, keys, queries) and lie in memory with the keys outermost: the maximum and the sum over the keys
    then add whole contiguous rows. The probabilities P = E / l stay unnormalized, E = e^(S - max S), l their
    sums: it is enough to divide the much smaller out and g by l.
    """

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array,
        causal: bool,
        window: int | None,
        key_lengths: Array | None,
        scale: float | None,
        keep: Array | None,
    ) -> None:
        xp = array_module(q, k, v)
        (B, H, n, d), (_, H_kv, m, d_v) = q.shape, v.shape
        self.q, self.k, self.v, self.keep, self.heads = q, k, v, keep, (B, H_kv, H // H_kv)
        self.scale = q.dtype.type(_scale(scale, d))
        self.blocks: list[tuple[slice, slice, Array, Array]] = []  # queries, keys, E and 1 / l of each
        self.out = xp.empty((B, n, H, d_v), q.dtype).transpose(0, 2, 1, 3)  # (B, H, n, d_v)
        saves = is_recording()
        size = _QUERY_BLOCK if xp is np else max(n, 1)
        for start in range(0, n, size):
            queries = slice(start, min(start + size, n))
            keys = _key_range(queries, n, m, causal, window)
            s = self._scores(k[:, :, keys], self._rows(q, queries) * self.scale)
            visible = self._hide(s, queries, keys, m - n, causal, window, key_lengths)
            inverse = _exponentials(s, guarded=visible and (key_lengths is not None or n > m or not s.size))
            kept = s if keep is None else s * self._keep(queries, keys)
            rows = kept.swapaxes(-1, -2) @ v[:, :, keys]  # (B, H_kv, group * queries, d_v)
            rows *= inverse
            self.out[:, :, queries] = rows.reshape(B, H, queries.stop - start, d_v)
            if saves:
                self.blocks.append((queries, keys, s, inverse))

    def _rows(self, x: Array, queries: slice) -> Array:
        """x (B, H, n, d) of these queries as (B, H_kv, group * queries, d)."""
        B, H_kv, group = self.heads
        x = x[:, :, queries]
        return x if group == 1 else x.reshape(B, H_kv, group * x.shape[2], x.shape[3])

    @staticmethod
    def _scores(k: Array, rows: Array) -> Array:
        """k rows^T.   k (B, H_kv, keys, d), rows (B, H_kv, queries, d) -> (B, H_kv, keys, queries).

        The copy of rows, transposed, is repaid at once by the small products.
        """
        xp = array_module(k)
        (B, H_kv, m, _), n = k.shape, rows.shape[2]
        s = xp.empty((m, B, H_kv, n), k.dtype).transpose(1, 2, 0, 3)
        return xp.matmul(k, xp.ascontiguousarray(rows.swapaxes(-1, -2)), out=s)

    def _keep(self, queries: slice, keys: slice) -> Array:
        """The mask of dropout, laid out like the scores."""
        B, H_kv, group = self.heads
        part = self.keep[:, :, queries, keys].swapaxes(-1, -2)  # (B, H, keys, queries)
        m, n = part.shape[2:]
        return part.reshape(B, H_kv, group, m, n).swapaxes(2, 3).reshape(B, H_kv, m, group * n)

    def _hide(
        self, s: Array, queries: slice, keys: slice, offset: int, causal: bool, window: Any, key_lengths: Any
    ) -> bool:
        """Set the scores of keys that a query may not see to -inf; True if there may be such.

        s (B, H_kv, keys, group * queries). In plain causal attention only the last square of a block needs
        it: keys 0 ... always - 1 are seen by all its queries.
        """
        xp = array_module(s)
        always = 0
        if causal and window is None and key_lengths is None:
            always = min(max(queries.start + offset + 1 - keys.start, 0), s.shape[-2])
        masked = slice(keys.start + always, keys.stop)
        if masked.start >= masked.stop:
            return False
        visible = _visible(xp, queries, masked, offset, causal, window, key_lengths)
        if visible is None:
            return False
        hidden = xp.where(visible, s.dtype.type(0), s.dtype.type(-math.inf))
        hidden = xp.ascontiguousarray(hidden.swapaxes(-1, -2))  # (keys, queries), or one for each sequence
        for head in range(self.heads[2]):  # of the group
            width = queries.stop - queries.start
            s[:, :, always:, head * width : (head + 1) * width] += hidden.reshape(-1, 1, *hidden.shape[-2:])
        return True

    def backward(self, g: Array, dq: Array, dk: Array, dv: Array) -> None:
        """Fill dq, dk and dv from g (B, H, n, d_v).

        With g' = g / l:  dv = E g',  dP' = v g'^T,  dS = E * (dP' - rowsum(g' * out)), all (keys, queries);
        the scale of the scores goes into dS.
        """
        xp = array_module(g)
        # The last block comes first and sees the keys up to the last one: it fills, the others add.
        first = self.blocks[-1][1].start if self.blocks else dk.shape[2]
        dk[:, :, :first] = dv[:, :, :first] = 0
        last = True
        while self.blocks:
            queries, keys, e, inverse = self.blocks.pop()
            g_rows = self._rows(g, queries) * inverse
            scaled = g_rows * self.scale
            D = xp.einsum("bhid,bhid->bhi", scaled, self._rows(self.out, queries))[:, :, None, :]
            ds = self._scores(self.v[:, :, keys], scaled)  # dP', (B, H_kv, keys, group * queries)
            kept = e
            if self.keep is not None:
                mask = self._keep(queries, keys)
                ds *= mask
                kept = e * mask
            ds -= D
            ds *= e
            dq[:, :, queries] = (ds.swapaxes(-1, -2) @ self.k[:, :, keys]).reshape(dq[:, :, queries].shape)
            for dx, part in ((dk, ds @ self._rows(self.q, queries)), (dv, kept @ g_rows)):
                if last:
                    dx[:, :, keys] = part
                else:
                    dx[:, :, keys] += part
            last = False


def _exponentials(s: Array, guarded: bool) -> Array:
    """Turn scores (..., keys, queries) into E = e^(S - max S) in place; returns 1 / sums, (..., queries, 1).

    guarded: a query may see nothing; its E is 0, and the inverse is 1 so that its output is 0.
    """
    xp = array_module(s)
    if s.shape[-2] == 0:
        return xp.ones((*s.shape[:-2], s.shape[-1], 1), s.dtype)
    top = s.max(axis=-2, keepdims=True)
    if guarded:
        top = xp.where(xp.isfinite(top), top, s.dtype.type(0))
    s -= top
    xp.exp(s, out=s)
    l = s.sum(axis=-2)[..., None]
    return 1 / (xp.where(l == 0, s.dtype.type(1), l) if guarded else l)


def _scale(scale: float | None, d: int) -> float:
    return 1 / math.sqrt(d) if scale is None else scale


def _key_range(queries: slice, n: int, m: int, causal: bool, window: int | None) -> slice:
    """The keys that any of these queries may see."""
    stop = max(min(queries.stop + m - n, m), 0) if causal else m
    start = max(queries.start + m - n - window + 1, 0) if window is not None else 0
    return slice(min(start, stop), stop)


def _visible(
    xp: Any,
    queries: slice,
    keys: slice,
    offset: int,
    causal: bool,
    window: int | None,
    key_lengths: Array | None,
) -> Array | None:
    """Which key each query sees, (queries, keys) or (B, 1, 1, queries, keys); None for all."""
    position = xp.arange(queries.start, queries.stop)[:, None] + offset
    key = xp.arange(keys.start, keys.stop)[None, :]
    visible = None
    if causal:
        visible = key <= position
    if window is not None:
        visible = visible & (key > position - window)
    if key_lengths is not None:
        inside = key < key_lengths.reshape(-1, 1, 1, 1, 1)
        visible = inside if visible is None else visible & inside
    return visible


def check_shapes(q: Any, k: Any, v: Any, causal: bool, window: int | None, key_lengths: Any) -> None:
    """Raise ValueError, naming the shapes, unless attention is defined for these arguments."""
    fits = len(q.shape) == len(k.shape) == len(v.shape) == 4
    fits = fits and q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]
    if not fits or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit: "
            "they are (batch, heads, queries, d), (batch, kv_heads, keys, d), (batch, kv_heads, keys, d_v)"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention: window={window}: a window is 1 or more, and needs causal=True")
    if key_lengths is not None and tuple(key_lengths.shape) != (q.shape[0],):
        raise ValueError(f"attention: key_lengths {key_lengths.shape} must be one for each of {q.shape[0]}")
