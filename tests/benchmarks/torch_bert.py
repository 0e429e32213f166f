"""The same BERT in PyTorch, written as one writes it there: the other side of the benchmarks."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, visible):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = self.norm_1(x + self.projection(out.transpose(1, 2).reshape(B, T, C)))
        return self.norm_2(x + self.contract(F.gelu(self.expand(x))))


class TorchBERT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.segments, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, 1e-12)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.pooler, self.follows = nn.Linear(width, width), nn.Linear(width, 2)
        self.transform, self.transform_norm = nn.Linear(width, width), nn.LayerNorm(width, 1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def loss(self, inputs, targets):
        (ids, mask, segments), (tokens, follows) = inputs, targets
        x = self.norm(self.tokens(ids) + self.positions.weight[: ids.shape[1]] + self.segments(segments))
        visible = mask.bool()[:, None, None]  # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, visible)
        chosen = tokens != -100  # the others need no scores
        hidden = self.transform_norm(F.gelu(self.transform(x[chosen])))
        loss = F.cross_entropy(F.linear(hidden, self.tokens.weight, self.bias), tokens[chosen])
        return loss + F.cross_entropy(self.follows(torch.tanh(self.pooler(x[:, 0]))), follows)
