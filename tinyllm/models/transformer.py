"""The Transformer (Vaswani et al. 2017, "Attention Is All You Need").

Changed since the translators before it (Bahdanau et al. 2015): no recurrence. There attention joined two
recurrent networks; here it is all that lets positions meet, so all of them are computed at once, and where a
word stands is told by sines and cosines added to it (section 3.5). The encoder reads the source both ways,
the decoder writes the translation left to right and looks at the source in each of its layers (3.1):

    x = sqrt(C) embedding[source] + positions,         y = sqrt(C) embedding[target so far] + positions
    x = norm(x + attention(x))                         y = norm(y + attention(y))                causal
    x = norm(x + feed_forward(x))                      y = norm(y + cross_attention(y, x))
                                                       y = norm(y + feed_forward(y))
    logits = y embedding^T + b                         one embedding for all three uses (3.4)

Published weights are those of Marian, the translator whose models the Opus project trains: the same function
with a bias b and another order of columns in the positions. The paper has no b; here it starts at zero. These
files: tinyllm/marian_files.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn, no_grad
from autograd.backend import Array, array_module
from tinyllm.attention import MultiHeadAttention
from tinyllm.errors import InputError
from tinyllm.marian_files import MarianFiles, marian_options
from tinyllm.pretrained import check_options
from tinyllm.translation import DecoderCache, EncoderDecoder, source_lengths

ACTIVATIONS = {"relu": F.relu, "swish": F.silu, "silu": F.silu}


@dataclass(frozen=True)
class TransformerConfig:
    """The options of a published config.json, with the defaults of the paper's base model (65M)."""

    vocab_size: int = 37000  # byte pairs, shared by both languages (section 5.1)
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    dropout: float = 0.1  # of each sub-layer's output and of embedding + position
    attention_dropout: float = 0.0  # of attention's probabilities
    activation_dropout: float = 0.0  # between the feed-forward's two maps
    activation_function: str = "relu"
    max_position_embeddings: int = 1024
    scale_embedding: bool = True
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    decoder_vocab_size: int | None = None  # if the languages share none
    eos_token_id: int = 0  # ends each source and each translation
    pad_token_id: int = 1  # never written
    decoder_start_token_id: int = 1  # what the decoder reads first

    def __post_init__(self) -> None:
        sides = "{0}_layers {0}_attention_heads {0}_ffn_dim "
        check_options(
            self,
            whole="vocab_size decoder_vocab_size d_model max_position_embeddings "
            + sides.format("encoder")
            + sides.format("decoder"),
            probabilities="dropout attention_dropout activation_dropout",
            flags="scale_embedding share_encoder_decoder_embeddings tie_word_embeddings",
        )
        for heads in (self.encoder_attention_heads, self.decoder_attention_heads):
            if self.d_model % heads:
                raise InputError(
                    f"{heads} heads do not divide the width {self.d_model}: choose a divisor of it"
                )
        if self.activation_function not in ACTIVATIONS:
            raise InputError(
                f"activation_function is {self.activation_function!r}, but must be one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.share_encoder_decoder_embeddings:
            if self.target_vocabulary != self.vocab_size:
                raise InputError(
                    f"decoder_vocab_size is {self.decoder_vocab_size}, but the shared embeddings have "
                    f"vocab_size, {self.vocab_size}"
                )
            if not self.tie_word_embeddings:
                raise InputError(
                    "tie_word_embeddings is False, but embeddings that encoder and decoder share are the "
                    "head's too: set share_encoder_decoder_embeddings to False as well"
                )
        for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id"):
            i = getattr(self, name)
            if type(i) is not int or not 0 <= i < self.target_vocabulary:
                raise InputError(f"{name} is {i!r}, but must be a token id below {self.target_vocabulary}")

    @property
    def target_vocabulary(self) -> int:
        """How many tokens the decoder knows."""
        return self.decoder_vocab_size or self.vocab_size

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """From the contents of a config.json; InputError for an option that we do not implement."""
        return cls(**marian_options(config, cls.__dataclass_fields__.keys()))

    def to_published(self) -> dict[str, Any]:
        """The options for a config.json."""
        options = asdict(self) | {"decoder_vocab_size": self.target_vocabulary}
        return {"architectures": ["MarianMTModel"], "is_encoder_decoder": True, **options}


# Section 5.1 and table 3; and the size of most models of the Opus project.
SIZES = {
    "transformer-base": TransformerConfig(),
    "transformer-big": TransformerConfig(
        d_model=1024, encoder_ffn_dim=4096, decoder_ffn_dim=4096,
        encoder_attention_heads=16, decoder_attention_heads=16, dropout=0.3,
    ),
    "opus-mt-en-de": TransformerConfig(
        58101, activation_function="swish", max_position_embeddings=512,
        pad_token_id=58100, decoder_start_token_id=58100,
    ),
}  # fmt: skip


def learning_rate(step: int, width: int, warmup: int = 4000) -> float:
    """width^-0.5 min(s^-0.5, s warmup^-1.5), with s = step + 1 as steps count from 0 (equation 3).

    Up in a line for `warmup` steps, then down with the root of the steps.
    """
    s = step + 1
    return width**-0.5 * min(s**-0.5, s * warmup**-1.5)


def positions(start: int, T: int, width: int, like: Array) -> Array:
    """sin(t w_i), then cos(t w_i), for t = start ... start + T - 1 and w_i = 10000^(-2 i / width) (3.5).

    -> (T, width), in like's precision and on its device. The paper's formula has sines and cosines by turns,
    its code and the published models all sines first: the same but for the order of the columns.
    """
    xp = array_module(like)
    frequencies = 10000.0 ** (xp.arange((width + 1) // 2) * (-2 / width))
    angles = xp.arange(start, start + T)[:, None] * frequencies  # (T, width / 2)
    return xp.concatenate([xp.sin(angles), xp.cos(angles)], axis=1)[:, :width].astype(like.dtype)


class FeedForward(nn.Module):
    """max(0, x W_1 + b_1) W_2 + b_2 on each position by itself (equation 2), or with swish for the max."""

    def __init__(self, config: TransformerConfig, inner: int) -> None:
        self.expand = nn.Linear(config.d_model, inner)
        self.projection = nn.Linear(inner, config.d_model)
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.dropout(self.activation(self.expand(x))))


class EncoderLayer(nn.Module):
    """Attention among all positions of the source, then the feed-forward; each sum is normalized."""

    def __init__(self, config: TransformerConfig) -> None:
        C, heads = config.d_model, config.encoder_attention_heads
        self.attention = MultiHeadAttention(C, heads, config.attention_dropout)
        self.attention_norm = nn.LayerNorm(C)
        self.feed_forward = FeedForward(config, config.encoder_ffn_dim)
        self.feed_forward_norm = nn.LayerNorm(C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Array | None) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, lengths=lengths)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """Causal attention among the target's positions, attention to the source, then the feed-forward."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        C, heads = config.d_model, config.decoder_attention_heads
        self.attention = MultiHeadAttention(C, heads, config.attention_dropout)
        self.attention_norm = nn.LayerNorm(C)
        self.cross_attention = MultiHeadAttention(C, heads, config.attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(C)
        self.feed_forward = FeedForward(config, config.decoder_ffn_dim)
        self.feed_forward_norm = nn.LayerNorm(C)
        self.dropout = nn.Dropout(config.dropout)
        self.layer = layer

    def forward(
        self, y: Tensor, memory: Tensor, lengths: Array | None, cache: DecoderCache | None = None
    ) -> Tensor:
        y = self.among_targets(y, cache)
        if cache is None:
            read = self.cross_attention(y, memory, lengths)
        else:
            read = self.cross_attention.attend(y, *cache.of_source[self.layer], lengths=cache.lengths)
        y = self.cross_attention_norm(y + self.dropout(read))
        return self.feed_forward_norm(y + self.dropout(self.feed_forward(y)))

    def among_targets(self, y: Tensor, cache: DecoderCache | None = None) -> Tensor:
        """The first sub-layer: what goes on to ask the source."""
        if cache is None:
            read = self.attention(y, causal=True)
        else:
            k, v = cache.extend(self.layer, *self.attention.keys_and_values(y))
            read = self.attention.attend(y, k, v, causal=True)
        return self.attention_norm(y + self.dropout(read))


class Transformer(MarianFiles, EncoderDecoder):
    """Transformer(config, seed): weights drawn from the seed; seed None leaves them zero, to be loaded.

    label_smoothing: of the loss in training (section 5.4); in evaluation the loss is the plain one.
    """

    config_class = TransformerConfig
    positions = staticmethod(positions)  # which some files hold

    def __init__(self, config: TransformerConfig, seed: int | None = 0, label_smoothing: float = 0.1) -> None:
        self.config, self.label_smoothing = config, label_smoothing
        C, V = config.d_model, config.target_vocabulary
        shared, tied = config.share_encoder_decoder_embeddings, config.tie_word_embeddings
        self.source_embedding = nn.Embedding(config.vocab_size, C)
        self.target_embedding = self.source_embedding if shared else nn.Embedding(V, C)
        self.output = self.target_embedding if tied else nn.Linear(C, V, bias=False)
        self.logits_bias = nn.zeros(V)
        self.encoder = [EncoderLayer(config) for _ in range(config.encoder_layers)]
        self.decoder = [DecoderLayer(config, layer) for layer in range(config.decoder_layers)]
        self.dropout = nn.Dropout(config.dropout)
        if seed is not None:
            self._initialize(np.random.default_rng(seed))

    def _initialize(self, rng: np.random.Generator) -> None:
        """Tables and head from a normal distribution of variance 1 / C, the inverse of the scale in front of
        them; the matrices of layers uniform, variance 2 / (inputs + outputs) (Glorot & Bengio 2010, eq. 16).
        The paper does not say; so does its code."""
        for name, parameter in self.named_parameters():
            shape = parameter.shape
            if len(shape) != 2:
                continue
            if name.startswith(("encoder.", "decoder.")):
                values = (2 * rng.random(shape, np.float32) - 1) * np.float32(math.sqrt(6 / sum(shape)))
            else:
                values = rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
            parameter.data = values

    @property
    def context(self) -> int:
        """The most tokens of a source, and of a translation with the start token."""
        return self.config.max_position_embeddings

    def forward(self, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None) -> Tensor:
        """input_ids (B, S), decoder_input_ids (B, T) -> logits (B, T, V): what follows each target token.

        attention_mask (B, S): ones, then zeros where a source is padded; or the sources' lengths (B,). The
        decoder needs none: padding behind a translation is out of sight for all before it.

        Raises:
            InputError: ids that are no batch or more than the context, a mask that does not fit.
            IndexError: an id outside the vocabulary.
        """
        return self.head(self.hidden_states(input_ids, decoder_input_ids, attention_mask))

    def hidden_states(self, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None) -> Tensor:
        """As `forward` -> (B, T, C), the input of the head."""
        input_ids = self._ids(input_ids)
        lengths = source_lengths(attention_mask, input_ids.shape, self.logits_bias.data)
        return self.decode(decoder_input_ids, self.encode(input_ids, lengths), lengths)

    def encode(self, input_ids: Any, lengths: Array | None = None) -> Tensor:
        """input_ids (B, S), of which the first lengths (B,) count -> the memory (B, S, C)."""
        x = self._embedded(self.source_embedding, input_ids, 0)
        for layer in self.encoder:
            x = layer(x, lengths)
        return x

    def decode(
        self,
        decoder_input_ids: Any,
        memory: Tensor,
        lengths: Array | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """decoder_input_ids (B, T), memory (B, S, C) -> (B, T, C). A cache holds what came before them."""
        y = self._embedded(self.target_embedding, decoder_input_ids, cache.length if cache is not None else 0)
        for layer in self.decoder:
            y = layer(y, memory, lengths, cache)
        if cache is not None:
            cache.advance(y.shape[1])
        return y

    @property
    def head_weight(self) -> Tensor:
        """E (V, C): the target's table, or a matrix of its own."""
        return self.output.weight

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V) = hidden E^T + b."""
        return F.linear(hidden, self.head_weight, self.logits_bias)

    def loss(self, inputs: tuple[Any, Any, Any], targets: Any, reduction: str = "mean") -> Tensor:
        """Cross-entropy of the targets (B, T), in nats a token; targets of -100 do not count.

        inputs: the sources (B, S), their lengths (B,) or mask (B, S), and the decoder's input (B, T): start,
        then the targets but the last.
        """
        source, lengths, decoder_input_ids = inputs
        logits = self.forward(source, decoder_input_ids, lengths)
        targets = array_module(logits.data).asarray(targets)
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, targets, -100, smoothing, reduction)

    def memory_keys_and_values(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each decoder layer's cross-attention reads of the memory, computed once for a translation."""
        return [layer.cross_attention.keys_and_values(memory) for layer in self.decoder]

    def cross_attention_weights(
        self, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None
    ) -> list[Tensor]:
        """For each decoder layer how much each target position reads from each source position,
        (B, H, T, S): rows that sum to 1."""
        found = []
        with no_grad():
            input_ids = self._ids(input_ids)
            lengths = source_lengths(attention_mask, input_ids.shape, self.logits_bias.data)
            memory = self.encode(input_ids, lengths)
            y = self._embedded(self.target_embedding, decoder_input_ids, 0)
            for layer in self.decoder:
                found.append(layer.cross_attention.weights(layer.among_targets(y), memory, lengths))
                y = layer(y, memory, lengths)
        return found

    def _embedded(self, embedding: nn.Embedding, ids: Any, start: int) -> Tensor:
        """ids (B, T) -> (B, T, C), with the positions from `start` on added."""
        ids, C = self._ids(ids, start), self.config.d_model
        x = embedding(ids)
        if self.config.scale_embedding:
            x = x * math.sqrt(C)
        return self.dropout(x + Tensor(positions(start, ids.shape[1], C, x.data)))
