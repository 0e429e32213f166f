"""Attention as several models have it, its q, k and v from one linear map (the GPTs) or from one each."""

from __future__ import annotations

from typing import Any

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn, no_grad
from autograd.backend import Array, array_module, is_array, to_host
from tinyllm.errors import InputError
from tinyllm.generation import KeyValueCache


class SelfAttention(nn.Module):
    """Causal self-attention: each position reads from itself and the positions before it.

    For each head  softmax(q k^T / sqrt(d)) v  over those positions; `autograd.attention.attention_composed`
    spells it out. With a cache, q holds the new positions only, k and v all so far.
    """

    window: int | None = None  # how many positions it sees, itself among them; None: all (GPT-3 narrows some)

    def __init__(self, width: int, heads: int, layer: int, dropout: float) -> None:
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.heads, self.layer, self.dropout = heads, layer, dropout

    def forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        qkv = self.query_key_value(x)  # (B, T, 3 C)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            out = F.self_attention(qkv, self.heads, causal=True, window=self.window, dropout=dropout)
            return self.projection(out)
        B, T, C = x.shape
        q, k, v = qkv.reshape(B, T, 3, self.heads, C // self.heads).transpose(2, 0, 3, 1, 4)  # (B, H, T, d)
        k, v = cache.extend(self.layer, k, v)
        out = F.attention(q, k, v, causal=True, window=self.window)
        return self.projection(out.transpose(0, 2, 1, 3).reshape(B, T, C))


class MultiHeadAttention(nn.Module):
    """Attention from the positions of x to those of a memory, or of x itself (Vaswani et al. 2017, 3.2.2).

        head_i = softmax(q_i k_i^T / sqrt(d)) v_i,   q = x W_q,  k = memory W_k,  v = memory W_v, with biases
        out    = (head_1, ..., head_H) W_o

    causal: position i of n in x sees the memory up to position i + m - n. lengths (B,): of each memory only
    the first so many positions are seen.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(
        self, x: Tensor, memory: Tensor | None = None, lengths: Array | None = None, causal: bool = False
    ) -> Tensor:
        """x (B, n, C), memory (B, m, C) -> (B, n, C)."""
        memory = x if memory is None else memory
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        dropout = self.dropout if self.training else 0.0
        return self.projection(
            F.multi_head_attention(q, k, v, self.heads, causal=causal, key_lengths=lengths, dropout=dropout)
        )

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory (B, m, C) -> what a cache keeps of it, keys and values (B, H, m, d), for `attend`."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, lengths: Array | None = None, causal: bool = False
    ) -> Tensor:
        """As `forward`, without dropout, where the memory's keys and values are at hand."""
        out = F.attention(self._split(self.query(x)), k, v, causal=causal, key_lengths=lengths)
        return self.projection(out.transpose(0, 2, 1, 3).reshape(x.shape))

    def weights(
        self, x: Tensor, memory: Tensor | None = None, lengths: Array | None = None, causal: bool = False
    ) -> Tensor:
        """How much each position of x reads from each of the memory, (B, H, n, m): rows that sum to 1."""
        memory = x if memory is None else memory
        with no_grad():
            q, k = self._split(self.query(x)), self._split(self.key(memory))
            return F.attention_weights(q, k, causal=causal, key_lengths=lengths)

    def _split(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, H, T, d)."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)


def lengths_of(attention_mask: Any, like: Array) -> Array | None:
    """A mask (B, T) of ones, and zeros for padding at the end -> lengths (B,) on like's device; None: all.

    Raises:
        InputError: a mask of another kind, or with a row of zeros alone.
    """
    if attention_mask is None:
        return None
    mask = attention_mask.data if isinstance(attention_mask, Tensor) else attention_mask
    mask = to_host(mask) if is_array(mask) else np.asarray(mask)
    if mask.ndim != 2 or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"attention_mask is (batch, length) of zeros and ones, not {mask.shape} of {mask.dtype}"
        )
    lengths = mask.sum(axis=1).astype(np.int64)
    if not lengths.all() or (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any():
        raise InputError(
            "attention_mask has a row of zeros alone, or zeros before ones: put the padding at the end"
        )
    return None if (lengths == mask.shape[1]).all() else array_module(like).asarray(lengths)
