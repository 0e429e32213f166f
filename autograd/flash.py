"""Attention on a GPU goes through the FlashAttention kernel of `kernels/`, where that can compute it.

The kernel keeps no N x N matrix: memory grows with the length, not its square. It takes float32 and the
16-bit types up to 128 numbers a head, and no dropout. Everything else, and every CPU, takes the path of
attention.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import kernels
from kernels.flash_attention import shared_limit, shared_needed

from . import fused
from .backend import Array
from .tensor import Tensor

LARGEST_HEAD = 128
_PRECISIONS = (None, "float16", "bfloat16")
_enabled, _precision = True, None


def use_flash(enabled: bool = True, precision: str | None = None) -> None:
    """Whether attention on a GPU may take the kernel (the default), in all threads, and in which precision.

    precision "float16" or "bfloat16": mixed precision. float32 queries, keys, values and gradients are
    rounded to that type on their way into the kernel, whose tensor cores sum in float32, and the results come
    back as float32; all else of the model stays float32. For training take bfloat16 (from CuPy 14 on): it
    keeps float32's range. float16 has three bits more, but loses gradients below 6e-8: nothing scales the
    loss here. None: float32 stays float32, without tensor cores.

    Raises:
        ValueError: another precision.
        RuntimeError: (at the first use) bfloat16, with a CuPy that does not know it.
    """
    global _enabled, _precision
    if precision not in _PRECISIONS:
        raise ValueError(f"use_flash: precision {precision!r}: it is None, 'float16' or 'bfloat16'")
    _enabled, _precision = enabled, precision


def attention_path(q: Any, k: Any, v: Any, *, scale: float | None = None, dropout: float = 0.0) -> str:
    """Says what attention of these arrays or Tensors runs on: "flash kernel, float16", or why not on that."""
    arrays = [x.data if isinstance(x, Tensor) else x for x in (q, k, v)]
    reason = why_not(*arrays, scale, dropout or None)
    if reason:
        return f"array operations: {reason}"
    dtype = arrays[0].dtype
    return f"flash kernel, {_precision if _precision and dtype == np.float32 else dtype}"


def why_not(q: Array, k: Array, v: Array, scale: float | None, keep: Any) -> str | None:
    """Why the kernel does not compute this attention; None if it does."""
    if not on_card(q):
        return "the arrays are not on a GPU"
    if not _enabled:
        return "use_flash(False)"
    if not fused._enabled:
        return "use_fused(False)"
    if keep is not None:
        return "dropout of the probabilities"
    if q.dtype.name not in ("float32", "float16", "bfloat16"):
        return f"the kernel does not take {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q {q.dtype}, k {k.dtype} and v {v.dtype} are not of one type"
    if not q.shape[3] == v.shape[3] <= LARGEST_HEAD:
        return f"heads of {q.shape[3]} and {v.shape[3]} numbers; the kernel takes up to {LARGEST_HEAD}, equal"
    if scale is not None and not scale > 0:
        return f"scale={scale}"
    needed = shared_needed(np.float16 if _precision and q.dtype == np.float32 else q.dtype, q.shape[3])
    if needed > shared_limit(q):
        return f"the kernels need {needed} bytes of shared memory, more than this card has"
    return None


def on_card(x: Array) -> bool:
    return type(x).__module__.partition(".")[0] == "cupy"


class FlashAttend:
    """Attention on raw arrays by the kernel; the interface of attention.py's _Attend."""

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array,
        causal: bool,
        window: int | None,
        key_lengths: Array | None,
        scale: float | None,
    ) -> None:
        self.inputs = tuple(map(_rounded, (q, k, v)))
        self.keywords = {"causal": causal, "window": window, "key_lengths": key_lengths, "scale": scale}
        self.rounded_out, self.logsumexp = kernels.flash_attention(*self.inputs, **self.keywords)
        self.out = self.rounded_out.astype(q.dtype, copy=False)  # (B, H, n, d)

    def backward(self, g: Array, dq: Array, dk: Array, dv: Array) -> None:
        """Fill dq, dk and dv from g (B, H, n, d)."""
        g = g.astype(self.rounded_out.dtype, copy=False)
        arguments = (g, *self.inputs, self.rounded_out, self.logsumexp)
        if dq.dtype == g.dtype:
            kernels.flash_attention_backward(*arguments, **self.keywords, into=(dq, dk, dv))
        else:
            found = kernels.flash_attention_backward(*arguments, **self.keywords)
            dq[...], dk[...], dv[...] = found


def _rounded(x: Array) -> Array:
    """x as the kernel is to take it."""
    if _precision is None or x.dtype != np.float32:
        return x
    if _precision == "float16":
        return x.astype(np.float16)
    from ml_dtypes import bfloat16  # NumPy and CuPy have no such type of their own

    try:
        return x.astype(bfloat16)
    except (TypeError, ValueError, KeyError):  # CuPy 13 has no such dtype
        raise RuntimeError(
            'use_flash(precision="bfloat16") needs CuPy 14 or later, or take precision="float16"'
        ) from None
