"""GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training").

Changed since the Transformer (section 3.1): only its decoder is left, without an encoder to attend to;
positions are learned; the MLP has GELU. It learns the next word of plain text (L1), and then, with a linear
head and three special tokens added, a task (L2):

    h_0     = token_embedding[ids] + position_embedding[0 ... T-1]
    h'_l    = norm_1(h_(l-1) + attention(h_(l-1)))
    h_l     = norm_2(h'_l    + mlp(h'_l))                       l = 1 ... n_layer
    logits  = h_L token_embedding^T                             the next word
    classes = h_L[the extract token] W_y^T                      the task
    L3      = L2 + lambda L1                                    fine-tuning, equation 5
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn
from autograd.backend import Array, array_module
from tinyllm.attention import SelfAttention
from tinyllm.errors import InputError
from tinyllm.generation import KeyValueCache
from tinyllm.model import CausalModel
from tinyllm.pretrained import check_options, refuse_unknown


@dataclass(frozen=True)
class GPT1Config:
    """The options of a published config.json, with the defaults of the published model (117M)."""

    vocab_size: int = 40478  # 40,000 merges and the 478 characters that they start from
    n_positions: int = 512
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_options(
            self,
            whole="vocab_size n_positions n_embd n_layer n_head",
            above_zero="layer_norm_epsilon initializer_range",
            probabilities="resid_pdrop embd_pdrop attn_pdrop",
        )
        if self.n_embd % self.n_head:
            raise InputError(
                f"{self.n_head} heads do not divide the width {self.n_embd}: choose a divisor of it"
            )

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> GPT1Config:
        """From the contents of a config.json; InputError for an option that we do not implement."""
        fields = cls.__dataclass_fields__.keys()
        only = {
            "model_type": ["openai-gpt"],
            "afn": ["gelu"],  # the tanh form, whatever the name means elsewhere
            "tie_word_embeddings": [True],
            "n_ctx": [config.get("n_positions", cls.n_positions)],
            "n_special": [0],
            "predict_special_tokens": [True, False],  # of which there are none
        }
        refuse_unknown(config, read=fields, only=only)
        return cls(**{name: config[name] for name in fields if name in config})

    def to_published(self) -> dict[str, Any]:
        """The options for a config.json."""
        return {"architectures": ["OpenAIGPTLMHeadModel"], "afn": "gelu", **asdict(self)}


# Section 4.1; the released weights fix the vocabulary.
SIZES = {"openai-gpt": GPT1Config()}


class MLP(nn.Module):
    """Two linear maps, with GELU between them, on each position by itself."""

    def __init__(self, config: GPT1Config) -> None:
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(F.gelu(self.expand(x), "tanh"))


class Block(nn.Module):
    """Attention, then MLP, each added to its own input; the sum is normalized."""

    def __init__(self, config: GPT1Config, layer: int) -> None:
        self.attention = SelfAttention(config.n_embd, config.n_head, layer, config.attn_pdrop)
        self.norm_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.norm_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = self.norm_1(x + self.dropout(self.attention(x, cache)))
        return self.norm_2(x + self.dropout(self.mlp(x)))


class GPT1(CausalModel):
    """GPT1(config, seed): weights drawn from the seed; seed None leaves them zero, to be loaded."""

    model_type = "openai-gpt"
    config_class = GPT1Config
    published_prefix = "transformer."
    published_names = {
        "token_embedding": "tokens_embed",
        "position_embedding": "positions_embed",
        "blocks.{}.attention.query_key_value": "h.{}.attn.c_attn",
        "blocks.{}.attention.projection": "h.{}.attn.c_proj",
        "blocks.{}.norm_1": "h.{}.ln_1",
        "blocks.{}.mlp.expand": "h.{}.mlp.c_fc",
        "blocks.{}.mlp.projection": "h.{}.mlp.c_proj",
        "blocks.{}.norm_2": "h.{}.ln_2",
    }
    transposed = frozenset(name for name in published_names if "attention." in name or "mlp." in name)
    # Buffers: each layer's mask, and the numbers 0, 1, 2, ...; the tied head.
    ignored = r"transformer\.h\.\d+\.attn\.bias|(transformer\.)?position_ids|lm_head\.weight"

    def __init__(self, config: GPT1Config, seed: int | None = 0) -> None:
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.blocks = [Block(config, layer) for layer in range(config.n_layer)]
        if seed is not None:
            rng = np.random.default_rng(seed)
            for parameter in self.parameters():
                if parameter.ndim == 2:  # section 4.1: norms everywhere make N(0, 0.02) good enough
                    parameter.data = _normal(rng, parameter.shape, config.initializer_range)

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
        return x

    def extended(self, count: int, rng: np.random.Generator) -> GPT1:
        """A copy that knows `count` more tokens, ids V ... V + count - 1, with embeddings drawn from rng."""
        table = self.token_embedding.weight
        new = _normal(rng, (count, self.config.n_embd), self.config.initializer_range)
        rows = np.concatenate([table.numpy(), new.astype(table.dtype)])
        model = GPT1(replace(self.config, vocab_size=len(rows)), seed=None).to(table.device, table.dtype)
        model.load_state_dict(self.state_dict() | {"token_embedding.weight": rows})
        return model


def _normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) * np.float32(std)


# Fine-tuning. An example is one or more sequences of tokens, all that a task needs to be put in words.
Sequences = list[list[int]]


class SpecialTokens(NamedTuple):
    """The ids of the three tokens that fine-tuning adds, and the input transformations of section 3.3.

    Texts are rows of tokens. A sequence begins with start, has delimiter between its parts, and ends with
    extract, at which the model's answer is read off.
    """

    start: int
    delimiter: int
    extract: int

    def classification(self, text: Sequence[int]) -> Sequences:
        """start text extract"""
        return [[self.start, *text, self.extract]]

    def entailment(self, premise: Sequence[int], hypothesis: Sequence[int]) -> Sequences:
        """start premise delimiter hypothesis extract"""
        return [[self.start, *premise, self.delimiter, *hypothesis, self.extract]]

    def similarity(self, first: Sequence[int], second: Sequence[int]) -> Sequences:
        """Neither text comes first by nature: both orders, as two sequences."""
        return self.entailment(first, second) + self.entailment(second, first)

    def multiple_choice(self, context: Sequence[int], answers: Sequence[Sequence[int]]) -> Sequences:
        """start context delimiter answer extract, a sequence for each answer.

        For questions about a document the context is the document followed by the question.
        """
        return [sequence for answer in answers for sequence in self.entailment(context, answer)]

    def batch(self, examples: Sequence[Sequences]) -> np.ndarray:
        """(B, S, T) ids: B examples of S sequences each. What follows a sequence's extract is padding.

        Raises:
            InputError: no examples, or examples with different numbers of sequences.
        """
        counts = sorted({len(example) for example in examples})
        if len(counts) != 1 or not counts[0]:
            raise InputError(f"a batch needs examples of equally many sequences, and these have {counts}")
        T = max(len(sequence) for example in examples for sequence in example)
        ids = np.full((len(examples), counts[0], T), self.extract)
        for rows, example in zip(ids, examples):
            for row, sequence in zip(rows, example):
                row[: len(sequence)] = sequence
        return ids


class Classifier(nn.Module):
    """A copy of a pre-trained model with a linear head for classes, to be fine-tuned as a whole (3.2).

    New are the head W_y and three rows of the token embedding, those of `special`; no task adds more. Where
    an example has several sequences, as in similarity, the sum of their representations is classified.

    auxiliary: lambda, the weight of L1; dropout: of what the head reads (section 4.1).

    Raises:
        InputError: the model has adapters that are not merged.
    """

    def __init__(
        self, model: GPT1, classes: int, auxiliary: float = 0.5, dropout: float = 0.1, seed: int = 0
    ) -> None:
        if any(name.endswith(".lora_A") for name in model.state_dict()):
            raise InputError("the model has adapters: merge and remove the adapters first (tinyllm.lora)")
        rng, V, table = np.random.default_rng(seed), model.vocabulary_size, model.token_embedding.weight
        self.special = SpecialTokens(V, V + 1, V + 2)
        self.model = model.extended(len(self.special), rng)
        self.head = nn.Linear(model.config.n_embd, classes, bias=False)
        self.head.weight.data = _normal(rng, self.head.weight.shape, model.config.initializer_range)
        self.head.to(table.device, table.dtype)
        self.dropout, self.auxiliary = nn.Dropout(dropout), auxiliary

    def forward(self, input_ids: Any) -> Tensor:
        """input_ids (B, S, T), as `special.batch` makes them -> logits (B, classes).

        Raises:
            InputError: a sequence without its extract token, or longer than the model's context.
        """
        sequences, ends, S = self._sequences(input_ids)
        return self._answer(self.model.hidden_states(sequences), ends, S)

    def loss(self, input_ids: Any, targets: Any, reduction: str = "mean") -> Tensor:
        """L3 = L2 + lambda L1 (equation 5) of examples (B, S, T) with targets (B,); -100 does not count.

        L2 is the cross-entropy of the classes. L1 is that of all tokens after the start up to the extract,
        in nats a token: the mean over a sequence, then over an example's sequences, so that a long text
        weighs no more than a short one. "mean" divides by the number of examples that count.
        """
        sequences, ends, S = self._sequences(input_ids)
        targets = array_module(sequences).asarray(targets)
        counts = targets != -100
        hidden = self.model.hidden_states(sequences)
        loss = F.cross_entropy(self._answer(hidden, ends, S), targets, reduction="sum")
        if self.auxiliary:
            weights = counts.repeat(S) / (S * ends)  # of a token in each sequence
            loss = loss + self.auxiliary * self._language_loss(hidden, sequences, ends, weights)
        return loss / max(int(counts.sum()), 1) if reduction == "mean" else loss

    def _sequences(self, input_ids: Any) -> tuple[Array, Array, int]:
        """(B, S, T) -> all sequences (B S, T), the place (B S,) of each one's first extract token, and S."""
        ids = array_module(self.head.weight.data).asarray(input_ids)
        if ids.ndim != 3:
            raise InputError(f"examples have the shape (batch, sequences, length), and these {ids.shape}")
        sequences = ids.reshape(-1, ids.shape[-1])
        ends = (sequences == self.special.extract).argmax(axis=1)  # 0 where there is none
        if not (ends > 0).all():
            raise InputError("a sequence is a start, a text, and the extract token, which one here lacks")
        return sequences, ends, ids.shape[1]

    def _read(self, hidden: Tensor, ends: Array, S: int) -> Tensor:
        """hidden (B S, T, C) -> the representations (B, S, C) at the extract tokens."""
        read = hidden[array_module(ends).arange(len(ends)), ends]
        return self.dropout(read.reshape(-1, S, hidden.shape[-1]))

    def _answer(self, hidden: Tensor, ends: Array, S: int) -> Tensor:
        """hidden (B S, T, C) -> logits (B, classes)."""
        return self.head(self._read(hidden, ends, S).sum(axis=1))

    def _language_loss(self, hidden: Tensor, sequences: Array, ends: Array, weights: Array) -> Tensor:
        """The sum of weights[n] * -log P(token) over the tokens of each sequence n up to its extract."""
        xp = array_module(sequences)
        rows, places = (xp.arange(sequences.shape[1]) < ends[:, None]).nonzero()
        log_p = F.log_softmax(self.model.head(hidden[rows, places]))  # (tokens, V)
        log_p = log_p[xp.arange(len(rows)), sequences[rows, places + 1]]
        return -(log_p * Tensor(weights[rows].astype(log_p.dtype))).sum()


class MultipleChoice(Classifier):
    """A Classifier whose classes are an example's S sequences: each answer gets one score (3.3)."""

    def __init__(self, model: GPT1, auxiliary: float = 0.5, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__(model, 1, auxiliary, dropout, seed)

    def _answer(self, hidden: Tensor, ends: Array, S: int) -> Tensor:
        """hidden (B S, T, C) -> logits (B, S)."""
        return self.head(self._read(hidden, ends, S))[:, :, 0]
