"""Bigram (Shannon 1948, "A Mathematical Theory of Communication", section 3).

The first model of the row: the next token depends on the last one alone, the "second-order approximation to
English". All that it knows is one table, for each token a row of scores of what may follow.

    p(b | a) = softmax(table[a])[b]
    loss     = mean over the pairs (a, b) of the text of  -log p(b | a)

Two ways fill the table. `Bigram.from_counts` reads it off the text:

    p(b | a) = (count[a, b] + smoothing) / (sum of count[a, :] + smoothing V)

and gradient descent on the loss finds it from any start:

    d loss / d table[a, b] = n_a / N (p(b | a) - count[a, b] / n_a),    n_a = sum of count[a, :], N pairs

which is zero at the counts' own frequencies, smoothing 0, and nowhere else: the loss is convex in the table.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn
from autograd.backend import Array, array_module
from tinyllm.errors import InputError
from tinyllm.generation import KeyValueCache
from tinyllm.model import CausalModel
from tinyllm.pretrained import check_options, refuse_unknown


@dataclass(frozen=True)
class BigramConfig:
    """The one size of the model. The default is for text as bytes."""

    vocab_size: int = 256

    def __post_init__(self) -> None:
        check_options(self, whole="vocab_size")

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> BigramConfig:
        """From the contents of a config.json that we wrote; nobody publishes bigram models."""
        refuse_unknown(config, read=["vocab_size"], only={"model_type": ["bigram"]})
        return cls(config.get("vocab_size", cls.vocab_size))

    def to_published(self) -> dict[str, Any]:
        """The options for a config.json."""
        return {"architectures": ["Bigram"], **asdict(self)}


def count_pairs(tokens: Any, vocab_size: int) -> Array:
    """How often b follows a in a row of tokens (N,): the number at [a, b] of a (V, V) array of int64.

    Raises:
        InputError: less than two tokens, or ids that are not from 0 to V - 1.
    """
    xp = array_module(tokens)
    ids = xp.asarray(tokens)
    if ids.ndim != 1 or ids.size < 2 or ids.dtype.kind not in "iu":
        raise InputError(f"to count pairs takes a row of 2 or more token ids, not {ids.dtype} {ids.shape}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise InputError(f"token id {bad} is out of range: the model knows ids 0 to {vocab_size - 1}")
    ids = ids.astype(np.int64)  # small unsigned types would overflow
    pairs = ids[:-1] * vocab_size + ids[1:]  # (N - 1,)
    return xp.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)


class Bigram(CausalModel):
    """Bigram(config, seed): a table to be trained. `Bigram.from_counts`: one that is read off a text."""

    model_type = "bigram"
    config_class = BigramConfig
    published_names = {"table": "table"}
    published_head = None  # it has none
    context = sys.maxsize  # only the last token matters, so there may be any number before it

    def __init__(self, config: BigramConfig, seed: int | None = 0) -> None:
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        if seed is not None:  # near zero all tokens are equally likely; any start leads to the same optimum
            table = np.random.default_rng(seed).standard_normal(self.table.weight.shape, np.float32)
            self.table.weight.data = table * np.float32(0.02)

    @classmethod
    def from_counts(cls, tokens: Any, vocab_size: int, smoothing: float = 1.0) -> Bigram:
        """The model whose table is the log of the pairs' frequencies in a row of tokens (N,).

        Smoothing pretends that every pair stood there so many times more (1: Laplace; 0: maximum likelihood,
        where a pair never seen has the score -inf). A token that nothing followed tells nothing: after it,
        all are equally likely.

        Raises:
            InputError: as `count_pairs`, or a smoothing that is negative or not finite.
        """
        if not 0 <= smoothing < math.inf:
            raise InputError(f"the smoothing is {smoothing}, but must be a number of 0 or more")
        xp = array_module(tokens)
        count = count_pairs(tokens, vocab_size) + float(smoothing)  # (V, V)
        count[count.sum(axis=1) == 0] = 1
        with np.errstate(divide="ignore"):
            log_p = xp.log(count / count.sum(axis=1, keepdims=True))
        model = cls(BigramConfig(vocab_size), seed=None)
        model.table.weight.data = log_p.astype(np.float32)
        return model.eval()

    def probabilities(self) -> Tensor:
        """p(b | a) at [a, b], (V, V)."""
        return F.softmax(self.table.weight)

    def hidden_states(self, input_ids: Any, cache: KeyValueCache | None = None) -> Tensor:
        """input_ids (B, T) -> (B, T, V). There is nothing hidden: a token's row of the table is the scores.

        A cache stays empty; it only counts the positions.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        ids, _ = self._read(input_ids, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.table(ids)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., V) -> logits (..., V): the same."""
        return hidden

    def loss(self, input_ids: Any, targets: Any, reduction: str = "mean") -> Tensor:
        """Cross-entropy of the targets (B, T), in nats a token; targets of -100 do not count."""
        return F.cross_entropy(self(input_ids), self._ids(targets), reduction=reduction)
