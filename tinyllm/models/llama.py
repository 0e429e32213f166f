"""LLaMA (Touvron et al. 2023a, "LLaMA: Open and Efficient Foundation Language Models") and LLaMA 2 (2023b).

Changed since GPT-3 (LLaMA, section 2.2): RMSNorm in place of LayerNorm; SwiGLU in place of GELU; no position
embedding, but queries and keys that are turned by their position in every layer; no biases, no dropout, and
an output head of its own. LLaMA 2 (section 2.2): a context of 4,096, and in the largest model fewer heads of
keys and values than of queries, each shared by a group (Ainslie et al. 2023).

    h_0     = token_embedding[ids]
    h'_l    = h_(l-1) + attention(norm_1(h_(l-1)))
    h_l     = h'_l    + mlp(norm_2(h'_l))                       l = 1 ... num_hidden_layers
    logits  = norm(h_L) output^T
    mlp(x)  = (silu(x W_gate^T) * (x W_expand^T)) W_projection^T

Today's small models of other names are LLaMAs too, with what later configs added: `rope_scaling`, a head of
any size, biases, a tied head.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn
from autograd.backend import Array, array_module
from tinyllm.errors import InputError
from tinyllm.model import CausalModel
from tinyllm.pretrained import check_options, refuse_unknown

# The kinds of rope_scaling, and the numbers that each needs; see `rope_frequencies`.
ROPE_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class LLaMAConfig:
    """The options of a published config.json, with the defaults of the smallest LLaMA (7B)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008  # width of the hidden layer of the MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as queries have
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": one of ROPE_SCALINGS, and its numbers}
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False  # the output head is the token embedding
    initializer_range: float = 0.02

    architecture: ClassVar[str] = "LlamaForCausalLM"
    implemented: ClassVar[dict[str, Collection[Any]]] = {  # options that are no field -> the values we allow
        "model_type": ("llama",),
        "hidden_act": ("silu", "swish"),
        "pretraining_tp": (1, None),
        "rope_interleaved": (False,),
        "is_llama_config": (True,),
    }
    harmless: ClassVar[frozenset[str]] = frozenset(  # that say nothing about what the model computes
        ("max_sequence_length", "transformers.js_config", "unsloth_version", "unsloth_fixed")
    )

    def __post_init__(self) -> None:
        check_options(
            self,
            whole="vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings",
            above_zero="rms_norm_eps rope_theta initializer_range",
            probabilities="attention_dropout",
            flags="attention_bias mlp_bias tie_word_embeddings",
        )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"{self.num_attention_heads} heads do not divide the width {self.hidden_size}: choose a "
                "divisor of it, or give head_dim"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise InputError(
                f"{self.key_value_heads} heads of keys and values do not divide {self.num_attention_heads} "
                "heads of queries: choose a divisor"
            )
        if self.head_size % 2:
            raise InputError(
                f"a head has {self.head_size} dimensions, which are turned in pairs: choose an even number"
            )
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)
            if self.rope_scaling["rope_type"] == "default":  # one spelling of each model
                object.__setattr__(self, "rope_scaling", None)

    @property
    def head_size(self) -> int:
        """The dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """How many heads the keys and values have."""
        return self.num_key_value_heads or self.num_attention_heads

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> LLaMAConfig:
        """From the contents of a config.json; InputError for an option that we do not implement."""
        names = {field.name for field in fields(cls)} - cls.implemented.keys()
        refuse_unknown(config, read={*names, "rope_parameters", *cls.harmless}, only=cls.implemented)
        return cls(**{name: config[name] for name in names if name in config} | read_rope(config))

    def to_published(self) -> dict[str, Any]:
        """The options for a config.json, in the spelling that transformers 4 and 5 both read."""
        options = {name: value for name, value in asdict(self).items() if value is not None}
        return {"architectures": [self.architecture], "hidden_act": "silu", **options}


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling of a config.json: by these names as transformers 4 writes them, or together
    in rope_parameters, as version 5 does. InputError if the two contradict each other."""
    given = {}
    for name in ("rope_scaling", "rope_parameters"):
        options = config.get(name)
        if options is not None and not isinstance(options, dict):
            raise InputError(f"{name} is {options!r}, but must be an object or null")
        if options:
            options = dict(options)
            kind = options.pop("type", None)  # the name of rope_type in old files
            options.setdefault("rope_type", kind or "default")
            if kind is not None and kind != options["rope_type"]:
                raise InputError(f"{name} has type {kind!r} and rope_type {options['rope_type']!r}: which?")
            given[name] = options
    thetas = [options.pop("rope_theta") for options in given.values() if "rope_theta" in options]
    thetas += [config["rope_theta"]] if "rope_theta" in config else []
    scalings = list(given.values())
    if any(theta != thetas[0] for theta in thetas) or any(scaling != scalings[0] for scaling in scalings):
        raise InputError("rope_theta, rope_scaling and rope_parameters contradict each other: leave one out")
    theta = {"rope_theta": thetas[0]} if thetas else {}
    return {**theta, "rope_scaling": scalings[0] if scalings else None}


def _check_rope_scaling(scaling: Any) -> None:
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else scaling
    numbers = ROPE_SCALINGS.get(kind) if isinstance(kind, str) else None
    if numbers is None:
        known = ", ".join(ROPE_SCALINGS)
        raise InputError(f"rope_scaling has rope_type {kind!r}, and implemented are {known}")
    if scaling.keys() != {"rope_type", *numbers}:
        found = ", ".join(sorted(scaling.keys() - {"rope_type"})) or "nothing"
        needed = ", ".join(sorted(numbers)) or "nothing"
        raise InputError(f"rope_scaling of type {kind} needs {needed}, and has {found}")
    for name in numbers:
        _check_number(f"{name} in rope_scaling", scaling[name])
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError("rope_scaling has a low_freq_factor that is not below its high_freq_factor")


def _check_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise InputError(f"{name} is {value!r}, but must be a number above 0")


# Touvron et al. 2023a, table 2, and 2023b, table 1; the rest is from the configs of the published weights.
SIZES = {
    "llama-7b": LLaMAConfig(),
    "llama-13b": LLaMAConfig(32000, 5120, 13824, 40, 40),
    "llama-33b": LLaMAConfig(32000, 6656, 17920, 60, 52),
    "llama-65b": LLaMAConfig(32000, 8192, 22016, 80, 64, rms_norm_eps=1e-5),
    "llama-2-7b": LLaMAConfig(32000, 4096, 11008, 32, 32, None, None, 4096, 1e-5),
    "llama-2-13b": LLaMAConfig(32000, 5120, 13824, 40, 40, None, None, 4096, 1e-5),
    "llama-2-70b": LLaMAConfig(32000, 8192, 28672, 80, 64, 8, None, 4096, 1e-5),
}


def rope_frequencies(config: LLaMAConfig) -> np.ndarray:
    """The angles (d/2,) by which the points of a head turn from one position to the next.

    theta^(-2i/d) for i = 0 ... d/2 - 1 (Su et al. 2021, section 3.2.2): the first goes round in 2 pi
    positions, the last in nearly 2 pi theta. rope_scaling slows them where training texts were shorter:
        linear   all by the factor (Chen et al. 2023)
        llama3   by the factor those that turn less than low_freq_factor times in the original context; not at
                 all those that turn more than high_freq_factor times; the others by something between
        dynamic  beyond max_position_embeddings only, where we stop: up to there nothing changes

    Rounded to float32 where that was done when the published models were trained: at position 4,000 it moves
    an angle by 1e-4.
    """
    d = config.head_size
    exponents = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
    frequencies = 1 / (config.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        frequencies /= scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    return frequencies


class Attention(nn.Module):
    """Causal self-attention in which queries and keys carry their positions; groups of heads share keys.

    `autograd.rotary.rotary_attention_composed` spells it out. A cache holds keys that are turned already: the
    angle between a query and a key depends on their distance alone, so no key has to be turned again.
    """

    window: int | None = None  # how many positions it sees, itself among them; None: all (Mistral narrows it)

    def __init__(self, config: LLaMAConfig, layer: int) -> None:
        C, d, bias = config.hidden_size, config.head_size, config.attention_bias
        H, H_kv = config.num_attention_heads, config.key_value_heads
        self.query = nn.Linear(C, H * d, bias)
        self.key = nn.Linear(C, H_kv * d, bias)
        self.value = nn.Linear(C, H_kv * d, bias)
        self.projection = nn.Linear(H * d, C, bias)
        self.layer, self.head_size, self.dropout = layer, d, config.attention_dropout

    def forward(self, x: Tensor, cos: Array, sin: Array, cache: Any) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, H d), (B, T, H_kv d) twice
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            out = F.rotary_attention(q, k, v, cos, sin, window=self.window, dropout=dropout)
            return self.projection(out)
        q, k, v = map(self._heads, (F.rotary(q, cos, sin), F.rotary(k, cos, sin), v))
        k, v = cache.extend(self.layer, k, v)
        out = F.attention(q, k, v, causal=True, window=self.window)  # (B, H, T, d)
        return self.projection(out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))

    def _heads(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        return x.reshape(B, T, width // self.head_size, self.head_size).transpose(0, 2, 1, 3)  # (B, H, T, d)


class MLP(nn.Module):
    """(silu(gate) * expanded) projected back: the gate decides how much of each hidden number passes."""

    def __init__(self, config: LLaMAConfig) -> None:
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = nn.Linear(C, inner, bias)
        self.expand = nn.Linear(C, inner, bias)
        self.projection = nn.Linear(inner, C, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(F.swiglu(self.gate(x), self.expand(x)))


class Block(nn.Module):
    """Attention, then MLP, each reading a normalized copy of the residual stream and adding to it."""

    def __init__(self, config: LLaMAConfig, layer: int) -> None:
        self.norm_1 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.norm_2 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Array, sin: Array, cache: Any) -> Tensor:
        x = x + self.attention(self.norm_1(x), cos, sin, cache)
        return x + self.mlp(self.norm_2(x))


class LLaMA(CausalModel):
    """LLaMA(config, seed): weights drawn from the seed; seed None leaves them zero, to be loaded."""

    model_type = "llama"
    config_class = LLaMAConfig
    published_names = {
        "token_embedding": "model.embed_tokens",
        "blocks.{}.norm_1": "model.layers.{}.input_layernorm",
        "blocks.{}.attention.query": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.attention.key": "model.layers.{}.self_attn.k_proj",
        "blocks.{}.attention.value": "model.layers.{}.self_attn.v_proj",
        "blocks.{}.attention.projection": "model.layers.{}.self_attn.o_proj",
        "blocks.{}.norm_2": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
        "blocks.{}.mlp.expand": "model.layers.{}.mlp.up_proj",
        "blocks.{}.mlp.projection": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "output": "lm_head",
    }
    ignored = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|lm_head\.weight"  # the latter if tied

    def __init__(self, config: LLaMAConfig, seed: int | None = 0) -> None:
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.output.weight = self.token_embedding.weight
        if seed is not None:
            self._initialize(np.random.default_rng(seed))

    def _initialize(self, rng: np.random.Generator) -> None:
        """Matrices from a normal distribution."""
        for parameter in self.parameters():
            if parameter.ndim == 2:
                std = np.float32(self.config.initializer_range)
                parameter.data = rng.standard_normal(parameter.shape, np.float32) * std

    @property
    def context(self) -> int:
        return self.config.max_position_embeddings

    @functools.cached_property
    def frequencies(self) -> np.ndarray:
        """See `rope_frequencies`. Not before they are asked for: then the weights have confirmed head_dim."""
        return rope_frequencies(self.config)

    @property
    def head_weight(self) -> Tensor:
        return self.output.weight

    def hidden_states(self, input_ids: Any, cache: Any = None) -> Tensor:
        """input_ids (B, T) -> (B, T, C), the input of the head. A cache holds what came before them.

        Raises:
            InputError: more positions than the context.
            IndexError: an id outside the vocabulary.
        """
        ids, start = self._read(input_ids, cache)
        T = ids.shape[1]
        x = self.token_embedding(ids)  # (B, T, C)
        cos, sin = self._rotation(start, T)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def _rotation(self, start: int, T: int) -> tuple[Array, Array]:
        """cos and sin (T, d/2) of the angles at T positions from `start` on."""
        weight = self.token_embedding.weight.data
        xp = array_module(weight)
        positions = xp.arange(start, start + T, dtype=self.frequencies.dtype)
        angles = positions[:, None] * xp.asarray(self.frequencies)
        return xp.cos(angles).astype(weight.dtype), xp.sin(angles).astype(weight.dtype)
