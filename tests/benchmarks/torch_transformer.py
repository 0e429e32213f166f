"""The same Transformer in PyTorch, written as one writes it there: the other side of the benchmarks."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, memory, mask=None, causal=False):
        split = lambda y: y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)
        q, k, v = split(self.query(x)), split(self.key(memory)), split(self.value(memory))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(out.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, cross: bool) -> None:
        super().__init__()
        self.attention, self.norm_1 = Attention(width, heads), nn.LayerNorm(width)
        if cross:
            self.cross, self.norm_2 = Attention(width, heads), nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm_3 = nn.LayerNorm(width)

    def forward(self, x, mask, memory=None):
        """An encoder's layer, or with a memory a decoder's; the mask is that of the source."""
        if memory is None:
            x = self.norm_1(x + self.attention(x, x, mask))
        else:
            x = self.norm_1(x + self.attention(x, x, causal=True))
            x = self.norm_2(x + self.cross(x, memory, mask))
        return self.norm_3(x + self.contract(F.relu(self.expand(x))))


class TorchTransformer(nn.Module):
    def __init__(
        self, vocabulary: int, context: int, width: int, layers: int, heads: int, inner: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.encoder = nn.ModuleList(Layer(width, heads, inner, cross=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(width, heads, inner, cross=True) for _ in range(layers))
        angles = torch.arange(context)[:, None] * 10000 ** (-2 * torch.arange(width // 2) / width)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))

    def forward(self, source, lengths, target):
        embedded = lambda ids: (
            self.tokens(ids) * math.sqrt(self.tokens.embedding_dim) + self.positions[: ids.shape[1]]
        )
        mask = (torch.arange(source.shape[1]) < lengths[:, None])[:, None, None]  # (B, 1, 1, S)
        x, y = embedded(source), embedded(target)
        for layer in self.encoder:
            x = layer(x, mask)
        for layer in self.decoder:
            y = layer(y, mask, x)
        return F.linear(y, self.tokens.weight, self.bias)
