"""Functions on Tensors for building models, `import autograd.functional as F`.

Each runs fused where that pays, and as its composition from primitives after `use_fused(False)`.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

from . import attention as _attention
from . import backend
from .backend import Array, array_module
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
    use_fused,
)
from .fused import embedding_lookup as _embedding_lookup
from .tensor import Tensor

__all__ = [
    "attention", "cross_entropy", "dropout", "embedding", "gelu", "layer_norm", "linear",
    "linear_cross_entropy", "log_softmax", "manual_seed", "relu", "rms_norm", "self_attention", "silu",
    "softmax", "use_fused",
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


def self_attention(qkv: Tensor, heads: int, *, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """attention among T positions, from q, k and v side by side.   qkv (B, T, 3 C) -> (B, T, C)."""
    B, T, _ = qkv.shape
    keep = dropout_mask((B, heads, T, T), dropout, qkv.data) if dropout else None
    return _attention.self_attention(qkv, heads, causal, keep)
