"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Changed since GPT-1 (section 2.3): layer normalization moves to the input of each sub-block, another one
follows the last block, the weights that feed the residual stream start smaller by 1/sqrt(2 n_layer), the
vocabulary grows to 50,257 byte pairs, the context to 1,024.

    h_0     = token_embedding[ids] + position_embedding[0 ... T-1]
    h'_l    = h_(l-1) + attention(norm_1(h_(l-1)))
    h_l     = h'_l    + mlp(norm_2(h'_l))                       l = 1 ... n_layer
    logits  = norm(h_L) token_embedding^T
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn
from tinyllm.attention import SelfAttention
from tinyllm.errors import InputError
from tinyllm.generation import KeyValueCache
from tinyllm.model import CausalModel
from tinyllm.pretrained import check_options, refuse_unknown


@dataclass(frozen=True)
class GPT2Config:
    """The options of a published config.json, with the defaults of the smallest model (124M)."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the hidden layer of the MLP; None means 4 n_embd
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_options(
            self,
            whole="vocab_size n_positions n_embd n_layer n_head n_inner",
            above_zero="layer_norm_epsilon initializer_range",
            probabilities="resid_pdrop embd_pdrop attn_pdrop",
        )
        if self.n_embd % self.n_head:
            raise InputError(
                f"{self.n_head} heads do not divide the width {self.n_embd}: choose a divisor of it"
            )

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> GPT2Config:
        """From the contents of a config.json; InputError for an option that we do not implement."""
        fields = cls.__dataclass_fields__.keys()
        only = {
            "model_type": ["gpt2"],
            "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
            "scale_attn_weights": [True],
            "scale_attn_by_inverse_layer_idx": [False],
            "reorder_and_upcast_attn": [False],
            "tie_word_embeddings": [True],
            "n_ctx": [config.get("n_positions", cls.n_positions)],
            "is_decoder": [True, False],  # it is one
            "n_special": [0],
            "predict_special_tokens": [True, False],  # of which there are none
        }
        refuse_unknown(config, read=fields, only=only)
        return cls(**{name: config[name] for name in fields if name in config})

    def to_published(self) -> dict[str, Any]:
        """The options for a config.json."""
        return {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", **asdict(self)}


# Radford et al. 2019, table 2. The counts printed there were corrected later to 124M, 355M, 774M and 1558M.
SIZES = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}


class MLP(nn.Module):
    """Two linear maps, with GELU between them, on each position by itself."""

    def __init__(self, config: GPT2Config) -> None:
        inner = config.n_inner or 4 * config.n_embd
        self.expand = nn.Linear(config.n_embd, inner)
        self.projection = nn.Linear(inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(F.gelu(self.expand(x), "tanh"))


class Block(nn.Module):
    """Attention, then MLP, each reading a normalized copy of the residual stream and adding to it."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        self.norm_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attention = SelfAttention(config.n_embd, config.n_head, layer, config.attn_pdrop)
        self.norm_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x), cache))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class GPT2(CausalModel):
    """GPT2(config, seed): weights drawn from the seed; seed None leaves them zero, to be loaded."""

    model_type = "gpt2"
    config_class = GPT2Config
    published_prefix = "transformer."
    published_names = {
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "blocks.{}.norm_1": "h.{}.ln_1",
        "blocks.{}.attention.query_key_value": "h.{}.attn.c_attn",
        "blocks.{}.attention.projection": "h.{}.attn.c_proj",
        "blocks.{}.norm_2": "h.{}.ln_2",
        "blocks.{}.mlp.expand": "h.{}.mlp.c_fc",
        "blocks.{}.mlp.projection": "h.{}.mlp.c_proj",
        "norm": "ln_f",
    }
    transposed = frozenset(name for name in published_names if "attention." in name or "mlp." in name)
    ignored = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight"  # buffers; the tied head

    def __init__(self, config: GPT2Config, seed: int | None = 0) -> None:
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.blocks = [Block(config, layer) for layer in range(config.n_layer)]
        self.norm = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        if seed is not None:
            self._initialize(np.random.default_rng(seed))

    def _initialize(self, rng: np.random.Generator) -> None:
        """Matrices from a normal distribution; each projection onto the residual stream, of which there are
        two a block, smaller by 1/sqrt(2 n_layer), so that the stream's variance does not grow with depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = self.config.initializer_range
                if name.endswith("projection.weight"):
                    std /= math.sqrt(2 * self.config.n_layer)
                parameter.data = rng.standard_normal(parameter.shape, np.float32) * np.float32(std)

    @property
    def context(self) -> int:
        return self.config.n_positions

    def hidden_states(self, input_ids: Any, cache: KeyValueCache | None = None) -> Tensor:
        """input_ids (B, T) -> (B, T, C), the input of the head. A cache holds what came before them.

        Raises:
            InputError: more positions than the context.
            IndexError: an id outside the vocabulary.
        """
        ids, start = self._read(input_ids, cache)
        T = ids.shape[1]
        x = self.token_embedding(ids) + self.position_embedding.weight[start : start + T]  # (B, T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)
