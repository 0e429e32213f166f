"""Self-attention as GPT-1, GPT-2 and GPT-3 have it: q, k and v from one linear map, positions elsewhere."""

from __future__ import annotations

import autograd.functional as F
from autograd import Tensor, nn
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
        self.heads, self.layer, self.p = heads, layer, dropout

    def forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        qkv = self.query_key_value(x)  # (B, T, 3 C)
        if cache is None:
            dropout = self.p if self.training else 0.0
            out = F.self_attention(qkv, self.heads, causal=True, window=self.window, dropout=dropout)
            return self.projection(out)
        B, T, C = x.shape
        q, k, v = qkv.reshape(B, T, 3, self.heads, C // self.heads).transpose(2, 0, 3, 1, 4)  # (B, H, T, d)
        k, v = cache.extend(self.layer, k, v)
        out = F.attention(q, k, v, causal=True, window=self.window)
        return self.projection(out.transpose(0, 2, 1, 3).reshape(B, T, C))
