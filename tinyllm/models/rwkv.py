"""RWKV, version 4 (Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era").

Changed since GPT (section "RWKV"): no attention and no positions. A token meets the past in two ways only:
everything reads a mixture of it and the token before, and WKV is a running mean of all values so far, in
which each channel forgets at a speed of its own. Both can be computed for a whole text at once, to train, and
token by token from a state of fixed size, to write. What passes is decided by gates; GELU is a squared ReLU.

    h_0     = embedding_norm(token_embedding[ids])
    h'_l    = h_(l-1) + time_mix(norm_1(h_(l-1)))
    h_l     = h'_l    + channel_mix(norm_2(h'_l))                l = 1 ... num_hidden_layers
    logits  = norm(h_L) output^T

    time_mix(x)     = (sigmoid(r) * WKV(w, u, k, v)) W_output^T   r, k, v linear in mu x_t + (1 - mu) x_(t-1)
    channel_mix(x)  = sigmoid(r) * (max(k, 0)^2 W_value^T)        r, k    linear in mu x_t + (1 - mu) x_(t-1)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import autograd.functional as F
from autograd import Tensor, concatenate, exp, is_recording, maximum, nn, sigmoid
from autograd.backend import Array, array_module
from tinyllm.errors import InputError
from tinyllm.model import CausalModel
from tinyllm.pretrained import check_options, refuse_unknown


@dataclass(frozen=True)
class RWKVConfig:
    """The options of a published config.json, with the defaults of the 7B model."""

    vocab_size: int = 50277
    context_length: int = 1024  # of the texts that it was trained on; it reads longer ones all the same
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    attention_hidden_size: int | None = None  # width of time mixing; None means hidden_size
    intermediate_size: int | None = None  # width of the hidden layer of channel mixing; None: 4 hidden_size
    layer_norm_epsilon: float = 1e-5
    rescale_every: int = 6  # layers after which the stream is halved in evaluation; 0 or less: never
    tie_word_embeddings: bool = False  # the output head is the token embedding

    def __post_init__(self) -> None:
        check_options(
            self,
            whole="vocab_size context_length hidden_size num_hidden_layers attention_hidden_size "
            "intermediate_size",
            above_zero="layer_norm_epsilon",
            flags="tie_word_embeddings",
        )
        if type(self.rescale_every) is not int:
            raise InputError(f"rescale_every is {self.rescale_every!r}, but must be a whole number; 0: never")

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> RWKVConfig:
        """From the contents of a config.json; InputError for an option that we do not implement."""
        fields = cls.__dataclass_fields__.keys()
        refuse_unknown(config, read=fields, only={"model_type": ["rwkv"]})
        return cls(**{name: config[name] for name in fields if name in config})

    def to_published(self) -> dict[str, Any]:
        """The options for a config.json."""
        return {"architectures": ["RwkvForCausalLM"], **asdict(self)}


# Peng et al. 2023, table 2.
SIZES = {
    "rwkv-4-169m": RWKVConfig(hidden_size=768, num_hidden_layers=12),
    "rwkv-4-430m": RWKVConfig(hidden_size=1024, num_hidden_layers=24),
    "rwkv-4-1b5": RWKVConfig(hidden_size=2048, num_hidden_layers=24),
    "rwkv-4-3b": RWKVConfig(hidden_size=2560, num_hidden_layers=32),
    "rwkv-4-7b": RWKVConfig(),
    "rwkv-4-14b": RWKVConfig(hidden_size=5120, num_hidden_layers=40),
}


class RecurrentState:
    """All that the model remembers of what it has read: as much after a million tokens as after one.

    For each layer the last input of time mixing and that of channel mixing, and WKV's three numbers for each
    channel. Generation uses it as it uses a `generation.KeyValueCache`.
    """

    def __init__(self) -> None:
        self.length = 0
        self._arrays: dict[str, tuple[Array, ...]] = {}

    def get(self, name: str) -> tuple[Array, ...] | None:
        """The arrays (B, ...) that were put under this name; None before the first token."""
        return self._arrays.get(name)

    def put(self, name: str, *arrays: Array) -> None:
        """Remember these arrays, and forget those that had the name before."""
        self._arrays[name] = arrays

    def advance(self, T: int) -> None:
        """All layers have seen T more positions."""
        self.length += T

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch, in this order; a row may be taken several times."""
        self._arrays = {name: tuple(a[rows] for a in arrays) for name, arrays in self._arrays.items()}

    @property
    def nbytes(self) -> int:
        """The memory that it holds."""
        return sum(a.nbytes for arrays in self._arrays.values() for a in arrays)


class TokenShift(nn.Module):
    """What the two kinds of mixing have in common: at each position the one before is to be had.

    Equations 11 to 15: a linear map reads mu x_t + (1 - mu) x_(t-1), mu for each channel; before the first
    token stands zero.
    """

    def __init__(self, layer: int) -> None:
        self.name = f"{type(self).__name__} {layer}"  # in the state

    def shifted(self, x: Tensor, state: RecurrentState | None) -> Tensor:
        """x_(t-1) at t.   x (B, T, C) -> (B, T, C); the state remembers the last of x for the next call."""
        B, T, C = x.shape
        first = state.get(self.name) if state is not None else None
        first = array_module(x.data).zeros((B, C), x.dtype) if first is None else first[0]
        if state is not None:
            if is_recording() and x.requires_grad:
                raise RuntimeError("a state keeps no graph: use it inside no_grad()")
            state.put(self.name, x.data[:, -1].copy())
        return concatenate([Tensor(first[:, None]), x[:, : T - 1]], axis=1)


def mixed(x: Tensor, before: Tensor, mu: Tensor) -> Tensor:
    """mu x + (1 - mu) before, all (B, T, C) but mu (C,)."""
    return before + (x - before) * mu


class TimeMix(TokenShift):
    """The past, in place of attention: (sigmoid(r) * WKV(w, u, k, v)) W_output^T   (equations 11 to 17).

    `autograd.wkv` has the formula of WKV. Its decay is w = e^time_decay, above 0 whatever is learned; the
    bonus u, for the token itself, is time_first.
    """

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__(layer)
        C, A = config.hidden_size, config.attention_hidden_size or config.hidden_size
        self.time_decay, self.time_first = nn.zeros(A), nn.zeros(A)
        self.time_mix_key, self.time_mix_value, self.time_mix_receptance = (nn.zeros(C) for _ in range(3))
        self.key, self.value, self.receptance = (nn.Linear(C, A, bias=False) for _ in range(3))
        self.output = nn.Linear(A, C, bias=False)

    def forward(self, x: Tensor, state: RecurrentState | None) -> Tensor:
        before = self.shifted(x, state)
        k = self.key(mixed(x, before, self.time_mix_key))  # (B, T, A)
        v = self.value(mixed(x, before, self.time_mix_value))
        r = self.receptance(mixed(x, before, self.time_mix_receptance))
        w, past = exp(-maximum(-self.time_decay, -80.0)), None  # e^80 forgets at once; e^89 overflows
        if state is not None:
            past = state.get(f"WKV {self.name}")
            state.put(f"WKV {self.name}", *F.wkv_state(w.data, k.data, v.data, past))
        return self.output(sigmoid(r) * F.wkv(w, self.time_first, k, v, past))


class ChannelMix(TokenShift):
    """Each position by itself, but for the shift: sigmoid(r) * (max(k, 0)^2 W_value^T)   (equation 18)."""

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__(layer)
        C, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
        self.time_mix_key, self.time_mix_receptance = nn.zeros(C), nn.zeros(C)
        self.key = nn.Linear(C, inner, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(inner, C, bias=False)

    def forward(self, x: Tensor, state: RecurrentState | None) -> Tensor:
        before = self.shifted(x, state)
        k = F.relu(self.key(mixed(x, before, self.time_mix_key)))  # (B, T, inner)
        r = self.receptance(mixed(x, before, self.time_mix_receptance))
        return sigmoid(r) * self.value(k * k)


class Block(nn.Module):
    """Time mixing, then channel mixing, each reading a normalized copy of the stream and adding to it.

    In evaluation the stream is halved after every `rescale_every` blocks, so that it stays within 16 bits.
    What later blocks add is halved as often, so the norms see what they saw, but for their epsilon. The
    authors' program halves the weights of `output` and `value`. We halve what comes out of them: the same to
    the last bit, for halving is exact, and the weights stay as they are stored.
    """

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        self.norm_1 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.time_mix = TimeMix(config, layer)
        self.norm_2 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.channel_mix = ChannelMix(config, layer)
        every = config.rescale_every
        self.halvings = layer // every if every > 0 else 0  # before this block
        self.halves = every > 0 and (layer + 1) % every == 0

    def forward(self, x: Tensor, state: RecurrentState | None) -> Tensor:
        x = x + self._rescaled(self.time_mix(self.norm_1(x), state))
        x = x + self._rescaled(self.channel_mix(self.norm_2(x), state))
        return x * 0.5 if self.halves and not self.training else x

    def _rescaled(self, x: Tensor) -> Tensor:
        return x if self.training or not self.halvings else x * 0.5**self.halvings


class RWKV(CausalModel):
    """RWKV(config, seed): weights drawn from the seed; seed None leaves them zero, to be loaded."""

    model_type = "rwkv"
    config_class = RWKVConfig
    published_prefix = "rwkv."
    published_names = {
        "token_embedding": "embeddings",
        "embedding_norm": "blocks.0.pre_ln",
        "blocks.{}.norm_1": "blocks.{}.ln1",
        "blocks.{}.time_mix": "blocks.{}.attention",  # its vectors: time_decay and so on, as we call them
        "blocks.{}.time_mix.key": "blocks.{}.attention.key",
        "blocks.{}.time_mix.value": "blocks.{}.attention.value",
        "blocks.{}.time_mix.receptance": "blocks.{}.attention.receptance",
        "blocks.{}.time_mix.output": "blocks.{}.attention.output",
        "blocks.{}.norm_2": "blocks.{}.ln2",
        "blocks.{}.channel_mix": "blocks.{}.feed_forward",
        "blocks.{}.channel_mix.key": "blocks.{}.feed_forward.key",
        "blocks.{}.channel_mix.receptance": "blocks.{}.feed_forward.receptance",
        "blocks.{}.channel_mix.value": "blocks.{}.feed_forward.value",
        "norm": "ln_out",
    }
    published_head = "head.weight"
    ignored = r"head\.weight"  # if it is tied

    def __init__(self, config: RWKVConfig, seed: int | None = 0) -> None:
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.blocks = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        self.norm = nn.LayerNorm(config.hidden_size, 1e-5)  # whatever the config says of the other norms
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.output.weight = self.token_embedding.weight
        if seed is not None:
            self._initialize(np.random.default_rng(seed))

    def published_name(self, name: str) -> str:
        return self.published_head if name == "output.weight" else super().published_name(name)

    def published_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, 1, *shape) if "time_mix_" in name else super().published_shape(name, shape)

    def _initialize(self, rng: np.random.Generator) -> None:
        """The paper's appendices on parameter initialization and small embeddings, with the authors' program
        where they leave a number out.

        Most matrices are zero: those before a gate, those that write to the stream, the keys of time mixing.
        So a block begins by adding nothing. The others are orthogonal. Embeddings are tiny, and a norm
        follows: a first step of the optimizer turns them far, where it would hardly move large ones.
        """
        embedding = self.token_embedding.weight
        embedding.data = rng.uniform(-1e-4, 1e-4, embedding.shape).astype(np.float32)
        if not self.config.tie_word_embeddings:
            self.output.weight.data = _orthogonal(rng, *self.output.weight.shape, gain=0.5)
        for layer, block in enumerate(self.blocks):
            _initialize_time(block, layer, len(self.blocks))
            for linear in (block.time_mix.value, block.channel_mix.key):
                linear.weight.data = _orthogonal(rng, *linear.weight.shape)

    @property
    def context(self) -> int:
        """No limit: no weight belongs to a position, and the state does not grow. So generation never has to
        cut off the beginning of a text."""
        return sys.maxsize

    def new_cache(self, capacity: int) -> RecurrentState:
        """An empty state, for any number of positions."""
        return RecurrentState()

    @property
    def head_weight(self) -> Tensor:
        return self.output.weight

    def hidden_states(self, input_ids: Any, cache: RecurrentState | None = None) -> Tensor:
        """input_ids (B, T) -> (B, T, C), the input of the head. A state holds what came before them.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        ids, _ = self._read(input_ids, cache)
        x = self.embedding_norm(self.token_embedding(ids))  # (B, T, C)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)


def _initialize_time(block: Block, layer: int, layers: int) -> None:
    """Decays, bonuses and mixtures of one of the layers 0 ... layers - 1, each channel its own.

    The first channels forget in 150 steps, the last at once, and deeper layers have more of the slow ones.
    The first channels see the token before alone, the last hardly see it, and deeper layers see less of it.
    """
    depth, rest = layer / max(layers - 1, 1), 1 - layer / layers  # 0 to 1; 1 to almost 0
    time, channel = block.time_mix, block.channel_mix
    A, C = time.time_decay.size, time.time_mix_key.size
    i = np.arange(A)
    x = np.arange(C) / C
    values = {
        time.time_decay: -5 + 8 * (i / max(A - 1, 1)) ** (0.7 + 1.3 * depth),
        time.time_first: math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
        time.time_mix_key: x**rest,
        time.time_mix_value: x**rest + 0.3 * depth,
        time.time_mix_receptance: x ** (0.5 * rest),
        channel.time_mix_key: x**rest,
        channel.time_mix_receptance: x**rest,
    }
    for parameter, value in values.items():
        parameter.data = value.astype(np.float32)


def _orthogonal(rng: np.random.Generator, rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
    """A random (rows, columns) whose columns, or rows if they are fewer, are orthogonal (Saxe et al. 2014).

    Scaled so that the numbers that come out are on average as large as those that go in.
    """
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns)), np.float32))
    q *= np.sign(np.diagonal(r))  # else not every rotation were equally likely
    q *= np.float32(gain * math.sqrt(max(rows / columns, 1)))
    return np.ascontiguousarray(q if rows >= columns else q.T)
