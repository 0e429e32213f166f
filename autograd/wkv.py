"""WKV, the attention of RWKV: a mean of all values so far, weighted by their keys and by their age.

    out_t = (sum of e^(k_i - (t-1-i) w) v_i over i < t  +  e^(u + k_t) v_t)
          / (sum of e^(k_i - (t-1-i) w)     over i < t  +  e^(u + k_t))      (Peng et al. 2023, equation 16)

in each channel by itself. From one t to the next both sums fade by e^-w and take in one term, so all that the
future needs to know of the past is a state of fixed size: the sums aa e^pp and bb e^pp, with the running
maximum pp of the exponents taken out, so that nothing overflows (equations 23 to 28).
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np

from .backend import Array, array_module
from .fused import fused
from .primitives import exp, stack
from .tensor import Tensor, is_recording

State = tuple[Array, Array, Array]  # aa, bb, pp, each (B, C)

_BLOCK = 1 << 17  # numbers in a block of time steps; the sums go step by step, the rest block by block
_CLOSE = 20.0  # exponents are close if they differ by no more: rounded, they are off by 1e-6 in float32


def empty_state(k: Array) -> State:
    """The state before the first of the keys k (B, T, C): sums of nothing, pp the logarithm of nothing."""
    xp, shape = array_module(k), (k.shape[0], k.shape[2])
    return xp.zeros(shape, k.dtype), xp.zeros(shape, k.dtype), xp.full(shape, -np.inf, k.dtype)


def wkv_state(w: Array, k: Array, v: Array, state: State | None = None) -> State:
    """The state after all of k and v (B, T, C), given the one before; arrays, outside any graph.

    Equation 16 once more: the sums of e^(k_i - (T-1-i) w) v_i and of e^(k_i - (T-1-i) w), and the past's.
    """
    xp = array_module(w, k, v)
    T = k.shape[1]
    aa, bb, pp = state or empty_state(k)
    exponents = k - xp.arange(T - 1, -1, -1, dtype=k.dtype)[:, None] * w  # (B, T, C)
    past = pp - T * w
    q = xp.maximum(past, exponents.max(axis=1))  # (B, C)
    e1, e2 = xp.exp(past - q), xp.exp(exponents - q[:, None])
    return e1 * aa + (e2 * v).sum(axis=1), e1 * bb + e2.sum(axis=1), q


def wkv_composed(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: State | None = None) -> Tensor:
    check_shapes(w, u, k, v, state)
    xp = array_module(w.data, u.data, k.data, v.data)
    aa, bb, pp = state or empty_state(k.data)
    outs = []
    for t in range(k.shape[1]):  # equations 23 to 28
        k_t, v_t = k[:, t], v[:, t]  # (B, C)
        now = u + k_t
        q = xp.maximum(pp, now.data)  # constants: what is taken out changes no result
        e1, e2 = Tensor(xp.exp(pp - q)), exp(now - q)
        outs.append((e1 * aa + e2 * v_t) / (e1 * bb + e2))
        faded = pp - w
        q = xp.maximum(faded.data, k_t.data)
        e1, e2 = exp(faded - q), exp(k_t - q)
        aa, bb, pp = e1 * aa + e2 * v_t, e1 * bb + e2, q
    return stack(outs, axis=1)  # (B, T, C)


@fused(wkv_composed)
def wkv(w: Array, u: Array, k: Array, v: Array, state: State | None = None) -> Any:
    """The mean of the values so far, equation 16, from nothing or from a state, which is a constant.

    w (C,) of 0 or more, u (C,), k and v (B, T, C) -> (B, T, C). `wkv_state` gives the state for what follows.

    With aa, bb and pp before a token and aa', bb' and pp' after it, and q = max(pp, u + k):

        past = e^(pp - q),        own = e^(u + k - q),     s, r = past, own / (past bb + own)
        fade = e^(pp - w - pp'),  fresh = e^(k - pp'),     pp' = max(pp - w, k)
        out = s aa + r v,         aa' = fade aa + fresh v, bb' = fade bb + fresh

    Backwards in time, with alpha = d(aa) and beta = d(bb):

        alpha = s g + fade alpha',  beta = -s g out + fade beta'
        dv = r g + fresh alpha',    dk = r g (v - out) + fresh (alpha' v + beta')
        du = sum of r g (v - out),  dw = -sum of fade (alpha' aa + beta' bb)

    Step by step go only pp, aa, bb, alpha and beta, each by two operations on a row of B C numbers; the rest
    is done for a block of steps at once.

    Raises:
        ValueError: shapes that do not fit, named; no positions.
    """
    check_shapes(w, u, k, v, state)
    xp = array_module(w, u, k, v)
    B, T, C = k.shape
    w, u = xp.tile(w, B), xp.tile(u, B)
    now = [x.reshape(B * C) for x in state or empty_state(k)]
    out, blocks, saves = xp.empty(k.shape, k.dtype), [], is_recording()
    size = max(1, _BLOCK // (B * C)) if xp is np else T
    for start in range(0, T, size):
        steps = slice(start, start + size)
        rows, now, saved = _forward(w, u, _rows(k[:, steps]), _rows(v[:, steps]), *now)
        out[:, steps] = _unrows(rows, B)
        if saves:
            blocks.append((steps, saved))

    def gradients(g: Array, needed: Any) -> Any:
        dk, dv = xp.empty(k.shape, k.dtype), xp.empty(k.shape, k.dtype)
        dw, du = xp.zeros(B * C, k.dtype), xp.zeros(B * C, k.dtype)
        future = xp.zeros((2, B * C), k.dtype)  # alpha and beta after the last step
        while blocks:
            steps, saved = blocks.pop()
            rows = _backward(_rows(g[:, steps]), saved, future, dw, du)
            dk[:, steps], dv[:, steps] = _unrows(rows[0], B), _unrows(rows[1], B)
            future = rows[2:]
        return dw.reshape(B, C).sum(axis=0), du.reshape(B, C).sum(axis=0), dk, dv, None

    return out, gradients


def _rows(x: Array) -> Array:
    """x (B, T, C) as rows in the order of time, (T, B C)."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], x.shape[0] * x.shape[2])


def _unrows(x: Array, B: int) -> Array:
    """(T, B C) as (B, T, C)."""
    return x.reshape(len(x), B, -1).transpose(1, 0, 2)


def _forward(w: Array, u: Array, k: Array, v: Array, aa: Array, bb: Array, pp: Array) -> Any:
    """out (T, N), the state after it and what `_backward` needs, of rows k and v (T, N), N = B C."""
    xp = array_module(k)
    close = _close_weights(w, u, k, bb, pp) if len(k) > 1 else None
    scale, past, own, fade, fresh, pp = close or _weights(w, u, k, pp)
    aa, bb = _scan(scale * aa, fade, fresh * v), _scan(scale * bb, fade, fresh)  # (T + 1, N)
    total = past * bb[:-1]
    total += own
    s = past / total
    r = xp.divide(own, total, out=total)
    out = s * aa[:-1]
    out += r * v
    return out, (aa[-1], bb[-1], pp), (v, scale, fade, fresh, aa, bb, s, r, out)


def _weights(w: Array, u: Array, k: Array, pp: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
    """A scale of 1, then past, own, fade and fresh (T, N), and the last pp (N,): no exponent is above 0."""
    xp = array_module(k)
    tops, fade = xp.empty((len(k) + 1, k.shape[1]), k.dtype), xp.empty(k.shape, k.dtype)
    tops[0] = pp
    for k_t, faded, top in zip(k, fade, tops[1:]):
        xp.subtract(pp, w, out=faded)
        pp = xp.maximum(faded, k_t, out=top)
    fade -= tops[1:]
    own = k + u
    q = xp.maximum(tops[:-1], own)
    own -= q
    exponents = tops[:-1] - q, own, fade, k - tops[1:]
    return k.dtype.type(1), *(xp.exp(x, out=x) for x in exponents), pp


def _close_weights(w: Array, u: Array, k: Array, bb: Array, pp: Array) -> Any:
    """The same with one pp for all steps; None where a key lies too far below it, or u too far from 0.

    It saves three exponentials of four and the running maximum: past is 1, and fade e^-w. The sums before the
    block have another pp, hence the scale, e^(their pp - pp).
    """
    xp = array_module(k)
    before = pp + xp.log(xp.maximum(bb, xp.finfo(k.dtype).tiny))  # the logarithm of bb e^pp
    top = xp.maximum(before, k.max(axis=0))
    if not max(float((top - k.min(axis=0)).max()), float(abs(u).max())) <= _CLOSE:
        return None
    fresh = k - top
    xp.exp(fresh, out=fresh)
    fade = xp.broadcast_to(xp.exp(-w), k.shape)
    return xp.exp(pp - top), k.dtype.type(1), fresh * xp.exp(u), fade, fresh, top


def _backward(g: Array, saved: Any, future: Any, dw: Array, du: Array) -> tuple[Array, Array, Array, Array]:
    """dk, dv (T, N), alpha, beta (N,) before the block; adds to dw and du (N,). Spends what was saved."""
    xp = array_module(g)
    v, scale, fade, fresh, aa, bb, s, r, out = saved
    s *= g
    r *= g
    faded = xp.empty((2, *g.shape), g.dtype)
    alpha = _scan(future[0], fade[::-1], s[::-1], faded[0, ::-1])[::-1]  # (T + 1, N)
    s *= out
    minus_beta = _scan(-future[1], fade[::-1], s[::-1], faded[1, ::-1])[::-1]
    first = alpha[0] * scale, -minus_beta[0] * scale
    alpha, minus_beta = alpha[1:], minus_beta[1:]
    direct = xp.subtract(v, out, out=out)
    direct *= r
    du += direct.sum(axis=0)
    alpha_fresh = fresh * alpha
    r += alpha_fresh  # dv
    dk = xp.multiply(alpha_fresh, v, out=alpha_fresh)
    dk += direct
    dk -= xp.multiply(fresh, minus_beta, out=fresh)
    dw -= xp.einsum("ti,ti->i", faded[0], aa[:-1])
    dw += xp.einsum("ti,ti->i", faded[1], bb[:-1])
    return dk, r, *first


def _scan(first: Array, fade: Array, new: Array, faded: Array | None = None) -> Array:
    """x_(t+1) = fade_t x_t + new_t from x_0 = first.   fade, new (T, N) -> (T + 1, N).

    The products fade_t x_t stay in `faded`, if it is given.
    """
    xp = array_module(fade)
    out = xp.empty((len(fade) + 1, fade.shape[1]), fade.dtype)
    last, out[0] = first, first
    for fade_t, new_t, x, product in zip(fade, new, out[1:], repeat(None) if faded is None else faded):
        product = xp.multiply(last, fade_t, out=x if product is None else product)
        last = xp.add(product, new_t, out=x)
    return out


def check_shapes(w: Any, u: Any, k: Any, v: Any, state: State | None) -> None:
    """Raise ValueError, naming the shapes, unless WKV is defined for these arguments."""
    fits = len(k.shape) == 3 and k.shape == v.shape and w.shape == u.shape == k.shape[2:]
    if not fits or k.shape[1] == 0:
        raise ValueError(
            f"wkv: w {w.shape}, u {u.shape}, k {k.shape}, v {v.shape} do not fit: "
            "they are (C,), (C,), (B, T, C) and (B, T, C), with a length T of 1 or more"
        )
    if state is not None and any(x.shape != (k.shape[0], k.shape[2]) for x in state):
        raise ValueError(f"wkv: a state of shapes {[x.shape for x in state]} does not fit k {k.shape}")
