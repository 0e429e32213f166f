"""The same LLaMA in PyTorch, written as one writes it there: the other side of the benchmarks."""

import torch
import torch.nn.functional as F
from torch import nn


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.head = width // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.query, self.projection = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(width, kv_heads * self.head, bias=False) for _ in range(2))
        self.gate, self.expand = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.contract = nn.Linear(inner, width, bias=False)

    def forward(self, x, cos, sin, past=None):
        B, T, C = x.shape
        y = self.norm_1(x)
        q, k, v = (f(y).view(B, T, -1, self.head).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if past is not None:  # preallocated keys and values, and how many are filled
            keys, values, start = past
            keys[:, :, start : start + T], values[:, :, start : start + T] = k, v
            k, v = keys[:, :, : start + T], values[:, :, : start + T]
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=grouped)
        x = x + self.projection(out.transpose(1, 2).reshape(B, T, C))
        y = self.norm_2(x)
        return x + self.contract(F.silu(self.gate(y)) * self.expand(y))


class TorchLLaMA(nn.Module):
    def __init__(
        self, vocabulary: int, context: int, width: int, layers: int, heads: int, kv_heads: int, inner: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, inner) for _ in range(layers))
        self.norm, self.output = nn.RMSNorm(width, 1e-6), nn.Linear(width, vocabulary, bias=False)
        d = width // heads
        angles = torch.outer(torch.arange(context).float(), 1e4 ** (-torch.arange(0, d, 2) / d))
        angles = torch.cat((angles, angles), dim=-1)  # (context, d)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids, caches=None, start=0, last=False):
        x = self.tokens(ids)
        end = start + ids.shape[1]
        cos, sin = self.cos[start:end], self.sin[start:end]
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if caches is None else (*caches[i], start))
        x = self.norm(x)
        return self.output(x[:, -1:] if last else x)
