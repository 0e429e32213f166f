"""BERT (Devlin et al. 2019, "Pre-training of Deep Bidirectional Transformers for Language Understanding").

Changed since GPT-1 (section 3): no causal mask, every position sees both sides. Then the next token is no
riddle, so the model fills in masked tokens instead, and tells whether the second of two texts followed the
first. A segment embedding tells the two apart; [CLS] stands before them and collects what concerns both.

    h_0     = norm(token_embedding[ids] + position_embedding[0 ... T-1] + segment_embedding[segments])
    h'_l    = norm_1(h_(l-1) + attention(h_(l-1)))
    h_l     = norm_2(h'_l    + mlp(h'_l))                       l = 1 ... num_hidden_layers
    pooled  = tanh(h_L[0] W_p^T + b_p)                          at [CLS]
    tokens  = norm(gelu(h_L W_t^T + b_t)) token_embedding^T + b
    follows = pooled W_n^T + b_n                                class 0: it did, 1: it did not

The tasks: bert_tasks.py. The published files: tinyllm/bert_files.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn, no_grad
from autograd.backend import Array, array_module
from tinyllm.attention import MultiHeadAttention, lengths_of
from tinyllm.bert_files import (
    ARCHITECTURES,
    HEADS,
    BERTFiles,
    architecture_of,
    bert_options,
    published_options,
)
from tinyllm.checkpoints import resolve
from tinyllm.errors import InputError
from tinyllm.pretrained import check_options, read_config

TASKS: dict[str, Any] = {}  # architecture -> the class of its task, filled by bert_tasks.py


@dataclass(frozen=True)
class BERTConfig:
    """The options of a published config.json, with the defaults of the paper's BASE (110M).

    heads: those of HEADS that the model has; the ones that its architecture needs are added. labels: the
    names of a task's classes, published as id2label, which is all that tells their number.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | None = None  # before a task's head; None means hidden_dropout_prob
    architecture: str = "BertForPreTraining"
    heads: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_options(
            self,
            whole="vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
            "max_position_embeddings type_vocab_size",
            above_zero="initializer_range layer_norm_eps",
            probabilities="hidden_dropout_prob attention_probs_dropout_prob classifier_dropout",
        )
        C, H = self.hidden_size, self.num_attention_heads
        if C % H:
            raise InputError(f"{H} heads do not divide the width {C}: choose a divisor of it")
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise InputError(f"the architecture {self.architecture!r} is not one of ours: {known}")
        wanted = {*ARCHITECTURES[self.architecture], *self.heads}
        wanted |= {"pooler"} if "next_sentence" in wanted else set()
        if not wanted <= HEADS.keys():
            raise InputError(f"heads are some of {', '.join(HEADS)}, not {', '.join(self.heads)}")
        object.__setattr__(self, "heads", tuple(head for head in HEADS if head in wanted))

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> BERTConfig:
        """From the contents of a config.json; InputError for an option that we do not implement."""
        return cls(**bert_options(config, cls.__dataclass_fields__.keys()))

    def to_published(self) -> dict[str, Any]:
        """The options for a config.json."""
        return published_options(asdict(self))


# Section 3, "Model Architecture"; the published files fix the vocabularies.
SIZES = {
    "bert-base-uncased": BERTConfig(),
    "bert-large-uncased": BERTConfig(30522, 1024, 24, 16, 4096),
}


class MLP(nn.Module):
    """Two linear maps, with GELU in its exact form between them, on each position by itself."""

    def __init__(self, config: BERTConfig) -> None:
        self.expand = nn.Linear(config.hidden_size, config.intermediate_size)
        self.projection = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(F.gelu(self.expand(x), "none"))


class Block(nn.Module):
    """Attention over all positions, then MLP, each added to its own input; the sum is normalized."""

    def __init__(self, config: BERTConfig) -> None:
        C, eps = config.hidden_size, config.layer_norm_eps
        self.attention = MultiHeadAttention(
            C, config.num_attention_heads, config.attention_probs_dropout_prob
        )
        self.norm_1 = nn.LayerNorm(C, eps)
        self.mlp = MLP(config)
        self.norm_2 = nn.LayerNorm(C, eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, lengths: Array | None) -> Tensor:
        x = self.norm_1(x + self.dropout(self.attention(x, lengths=lengths)))
        return self.norm_2(x + self.dropout(self.mlp(x)))


class MaskedLM(nn.Module):
    """The scores of all tokens at a position: one more layer, then the token embedding, and a bias."""

    def __init__(self, config: BERTConfig) -> None:
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.zeros(config.vocab_size)

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """hidden (..., C), table (V, C) -> (..., V)."""
        return F.linear(self.norm(F.gelu(self.transform(hidden), "none")), table, self.bias)


class Output(NamedTuple):
    """What BERT gives; None where a model has no such head."""

    last_hidden_state: Tensor  # (B, T, C)
    pooler_output: Tensor | None = None  # (B, C)
    prediction_logits: Tensor | None = None  # (B, T, V)
    seq_relationship_logits: Tensor | None = None  # (B, 2): it followed, it did not
    logits: Tensor | None = None  # of a task's head


class BERT(BERTFiles):
    """BERT(config, seed): weights drawn from the seed; seed None leaves them zero, to be loaded."""

    config_class = BERTConfig

    def __init__(self, config: BERTConfig, seed: int | None = 0) -> None:
        if TASKS.get(config.architecture, BERT) is not type(self):
            raise InputError(
                f"a config of the architecture {config.architecture} makes no {type(self).__name__}: "
                f"{type(self).__name__}.on(bert, ...) puts a task's head on a model"
            )
        C, self.config = config.hidden_size, config
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, C)
        self.segment_embedding = nn.Embedding(config.type_vocab_size, C)
        self.norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.blocks = [Block(config) for _ in range(config.num_hidden_layers)]
        self.pooler = nn.Linear(C, C) if "pooler" in config.heads else None
        self.masked_lm = MaskedLM(config) if "masked_lm" in config.heads else None
        self.next_sentence = nn.Linear(C, 2) if "next_sentence" in config.heads else None
        self._add_head()
        if seed is not None:
            rng, std = np.random.default_rng(seed), np.float32(config.initializer_range)
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.data = rng.standard_normal(parameter.shape, np.float32) * std

    def _add_head(self) -> None:
        """Make the head of a task."""

    @property
    def context(self) -> int:
        return self.config.max_position_embeddings

    @property
    def vocabulary_size(self) -> int:
        return self.config.vocab_size

    def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Output:
        """input_ids (B, T), and of that shape: attention_mask, 1 and for the padding at the end 0 (None: no
        padding); token_type_ids, the segments (None: all 0).

        Raises:
            InputError: more positions than the context, or a mask of another kind.
            IndexError: an id outside the vocabulary, or a segment that there is not.
        """
        hidden = self.hidden_states(input_ids, attention_mask, token_type_ids)
        pooled = None if self.pooler is None else self._pool(hidden)
        return Output(
            hidden,
            pooled,
            None if self.masked_lm is None else self.masked_lm(hidden, self.token_embedding.weight),
            None if self.next_sentence is None else self.next_sentence(pooled),
        )

    def hidden_states(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Tensor:
        """The last layer, (B, T, C); arguments as for the model. What stands at padding means nothing."""
        x, lengths = self._embed(input_ids, attention_mask, token_type_ids)
        for block in self.blocks:
            x = block(x, lengths)
        return x

    def attention_weights(
        self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None
    ) -> list[Tensor]:
        """How much each position reads from each, layer by layer: (B, H, T, T), rows that sum to 1."""
        found = []
        with no_grad():
            x, lengths = self._embed(input_ids, attention_mask, token_type_ids)
            for block in self.blocks:
                found.append(block.attention.weights(x, lengths=lengths))
                x = block(x, lengths)
        return found

    def _embed(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> tuple[Tensor, Array | None]:
        """h_0 (B, T, C), and the lengths (B,) of what is no padding, or None."""
        ids = self._ids(input_ids)
        read = lambda given: array_module(ids).asarray(given.data if isinstance(given, Tensor) else given)
        for name, array in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if array is not None and read(array).shape != ids.shape:
                raise InputError(f"{name} has the shape {read(array).shape}, and the token ids {ids.shape}")
        segments = self.segment_embedding
        segment = segments.weight[:1] if token_type_ids is None else segments(read(token_type_ids))
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]] + segment  # (B, T, C)
        return self.dropout(self.norm(x)), lengths_of(attention_mask, ids)

    def _pool(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, C) -> (B, C), from [CLS]."""
        return self.pooler(hidden[:, 0]).tanh()

    def loss(self, inputs: Any, targets: Any, reduction: str = "mean") -> Any:
        """Cross-entropy in nats; targets of -100 do not count.

        inputs: ids (B, T), or a tuple of what the model takes: (ids, attention_mask, token_type_ids).
        targets: (B, T), the token that stood at each masked position; or a tuple of these and (B,), 0 where
        the second text followed the first and 1 where not: then there are two losses, whose sum is what
        pre-training minimizes (section A.2).
        """
        hidden = self.hidden_states(*parts(inputs))
        tokens, *follows = (array_module(hidden.data).asarray(part) for part in parts(targets))
        if self.masked_lm is None or (follows and self.next_sentence is None):
            raise InputError(f"a {self.config.architecture} has no head for these targets")
        rows, places = (tokens != -100).nonzero()  # a seventh of all: the others need no scores
        logits = self.masked_lm(hidden[rows, places], self.token_embedding.weight)  # (masked, V)
        loss = F.cross_entropy(logits, tokens[rows, places], reduction=reduction)
        if not follows:
            return loss
        logits = self.next_sentence(self._pool(hidden))
        return loss, F.cross_entropy(logits, follows[0], reduction=reduction)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: Any = np.float32) -> Any:
        """As `PretrainedModel.from_pretrained`; a folder of a task gives the class of that task."""
        architecture = architecture_of(read_config(resolve(folder)))
        kind = TASKS.get(architecture, BERT)
        if not issubclass(kind, cls):
            raise InputError(
                f"{folder} holds a {architecture}, which is no {cls.__name__}: load it with "
                f"tinyllm.from_pretrained, and {cls.__name__}.on(model, ...) gives it the new head"
            )
        return super(BERT, kind).from_pretrained(folder, dtype)


def parts(of: Any) -> tuple:
    """A tuple of arrays as it is, one array as a tuple of one."""
    return of if isinstance(of, tuple) else (of,)
