"""Functions on Tensors for building models, `import autograd.functional as F`.

Each runs fused where that pays, and as its composition from primitives after `use_fused(False)`.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

from . import attention as _attention
from . import backend
from .attention import attention_weights
from .backend import Array, array_module
from .flash import attention_path, use_flash
from .fused import (
    cross_entropy,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    log_softmax,
    relu,
    rms_norm,
    silu,
    softmax,
    swiglu,
    use_fused,
)
from .fused import embedding_lookup as _embedding_lookup
from .rotary import rotary
from .rotary import rotary_attention as _rotary_attention
from .tensor import Tensor
from .wkv import wkv, wkv_state

__all__ = [
    "attention", "attention_path", "attention_weights", "cross_entropy", "dropout", "embedding", "gelu",
    "layer_norm", "linear", "linear_cross_entropy", "log_softmax", "manual_seed", "multi_head_attention",
    "relu", "rms_norm", "rotary", "rotary_attention", "self_attention", "silu", "softmax", "swiglu",
    "use_flash", "use_fused", "wkv", "wkv_state",
]  # fmt: skip

_local = threading.local()
_unseeded = itertools.count()


def manual_seed(seed: int | tuple[int, ...]) -> None:
    """Start this thread's random numbers, those of dropout, anew from the seed."""
    _local.seed, _local.generators = seed, {}


def _generator(device: str) -> Any:
    """This thread's generator on the device."""
    if not hasattr(_local, "generators"):
        manual_seed((0, next(_unseeded)))  # threads must not drop the same values
    if device not in _local.generators:
        _local.generators[device] = backend.generator(_local.seed, device)
    return _local.generators[device]


def dropout_mask(shape: tuple[int, ...], p: float, like: Array) -> Array:
    """1 / (1 - p) with probability 1 - p, else 0, in like's precision and on its device."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p={p} is not a probability below 1")
    uniform = _generator(backend.device_of(like)).random(shape, dtype="float32")
    return (uniform >= p).astype(like.dtype) * like.dtype.type(1 / (1 - p))


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """out = x * mask, the mask 0 with probability p, else 1 / (1 - p); x itself unless training.

    The expected value stays x (Srivastava et al. 2014, section 10).
    """
    return x * Tensor(dropout_mask(x.shape, p, x.data)) if training and p else x


def embedding(ids: Any, table: Tensor) -> Tensor:
    """out = table[ids].   ids (...) of integers, table (V, C) -> (..., C).

    Raises:
        IndexError: an id is not a row of the table.
    """
    ids = ids.data if isinstance(ids, Tensor) else ids
    return _embedding_lookup(array_module(table.data).asarray(ids), table)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    key_lengths: Array | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T * scale) v over the visible keys: the one door to attention; see `attention.py`.

    q (B, H, n, d), k (B, H_kv, m, d), v (B, H_kv, m, d_v) -> (B, H, n, d_v); scale defaults to 1/sqrt(d).
    causal: query i of n sees the keys up to i + m - n; window: of those only the last `window`;
    key_lengths (B,): of those only the first so many; dropout: of the probabilities.

    Raises:
        ValueError: shapes that do not fit, named.
    """
    keep = dropout_mask((*q.shape[:3], k.shape[2]), dropout, q.data) if dropout else None
    return _attention.attention(q, k, v, causal, window, key_lengths, scale, keep)


def multi_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    causal: bool = False,
    key_lengths: Array | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """attention with the heads side by side, as linear maps make them.

    q (B, n, H d), k (B, m, H d), v (B, m, H d_v) -> (B, n, H d_v). causal, key_lengths, dropout: as in
    `attention`.

    Raises:
        ValueError: shapes that do not fit, named.
    """
    keep = dropout_mask((q.shape[0], heads, q.shape[1], k.shape[1]), dropout, q.data) if dropout else None
    return _attention.multi_head_attention(q, k, v, heads, causal, key_lengths, keep)


def self_attention(
    qkv: Tensor, heads: int, *, causal: bool = False, window: int | None = None, dropout: float = 0.0
) -> Tensor:
    """attention among T positions, from q, k and v side by side.   qkv (B, T, 3 C) -> (B, T, C).

    causal, window, dropout: as in `attention`.
    """
    B, T, _ = qkv.shape
    keep = dropout_mask((B, heads, T, T), dropout, qkv.data) if dropout else None
    return _attention.self_attention(qkv, heads, causal, window, keep)


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Array,
    sin: Array,
    *,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention among T positions, with q and k turned by `rotary` first; see `rotary.py`.

    q (B, T, H d), k and v (B, T, H_kv d), cos and sin (T, d/2) -> (B, T, H d).
    window, dropout: as in `attention`.

    Raises:
        ValueError: shapes that do not fit, named.
    """
    keep = None
    if dropout:
        B, T, width = q.shape
        keep = dropout_mask((B, width // (2 * cos.shape[1]), T, T), dropout, q.data)
    return _rotary_attention(q, k, v, cos, sin, window, keep)
