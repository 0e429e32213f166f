"""What BERT learns from (Devlin et al. 2019, sections 3.1 and A.2): masked tokens, and pairs of texts.

A row reads  [CLS] first [SEP]  or  [CLS] first [SEP] second [SEP];  the first part with its [SEP] is segment
0, the second segment 1.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from tinyllm.datasets import padded
from tinyllm.errors import InputError
from tinyllm.tokenizers import BytePairTokenizer

Tokens = Sequence[int]
Row = tuple[list[int], list[int]]  # the ids of a row, and the segment of each
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")


def with_special_tokens(tokenizer: BytePairTokenizer) -> BytePairTokenizer:
    """The tokenizer with four tokens more, behind all others."""
    new = {name: tokenizer.vocabulary_size + i for i, name in enumerate(SPECIAL)}
    return BytePairTokenizer(tokenizer.ranks, tokenizer.special_tokens | new)


class SpecialTokens(NamedTuple):
    """The ids of SPECIAL."""

    pad: int
    cls: int
    sep: int
    mask: int

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Those of a tokenizer of ours or of a published one; InputError where it lacks one."""
        lost = [name for name in SPECIAL if name not in tokenizer.special_tokens]
        if lost:
            raise InputError(f"the tokenizer has no {', '.join(lost)}: it is not one for BERT")
        return cls(*(tokenizer.special_tokens[name] for name in SPECIAL))

    def row(self, first: Tokens, second: Tokens | None = None, longest: int | None = None) -> Row:
        """One text, or a pair. Where it would be longer than `longest`, tokens go from the end of the first
        or, while that is the longer one, of the second.

        Raises:
            InputError: longest leaves no room for a token of each text.
        """
        texts = [list(first)] + ([list(second)] if second is not None else [])
        if longest is not None:
            room = longest - 1 - len(texts)
            if room < len(texts):
                raise InputError(f"{longest} tokens have no room for {len(texts)} texts and their frame")
            while sum(map(len, texts)) > room:
                max(texts, key=len).pop()
        ids, segments = [self.cls], [0]
        for segment, text in enumerate(texts):
            ids += [*text, self.sep]
            segments += [segment] * (len(text) + 1)
        return ids, segments

    def batch(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, attention_mask and token_type_ids, each (B, T), T the longest row's; what follows a row is
        [PAD], with mask and segment 0."""
        ids, lengths = padded([row for row, _ in rows], self.pad)
        segments, _ = padded([of_row for _, of_row in rows])
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        return ids, mask.astype(np.int64), segments


def mask_tokens(
    ids: np.ndarray,
    special: Collection[int],
    mask: int,
    vocabulary: int,
    rng: np.random.Generator,
    rate: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), both (B, T), for the masked language model (section 3.1).

    Each token but the special ones is chosen with probability `rate`. Of the chosen ones 80 % become the id
    `mask`, 10 % a random token that is not special, 10 % stay as they are; targets hold what stood there, and
    -100 where nothing was chosen.
    """
    special = np.array(sorted(special))
    chosen = (rng.random(ids.shape) < rate) & ~np.isin(ids, special)
    how = rng.random(ids.shape)
    ordinary = np.setdiff1d(np.arange(vocabulary), special)
    inputs = np.where(chosen & (how < 0.8), mask, ids)
    inputs = np.where(chosen & (how >= 0.9), rng.choice(ordinary, ids.shape), inputs)
    return inputs, np.where(chosen, ids, -100)


class SentencePairs:
    """Pairs of texts of which the second followed the first, or did not, with equal chances (section A.2).

    documents: each a list of sentences, each a list of tokens. A text is one or more sentences in a row, as
    many as fit into half of the room, and at least one; what does not fit is cut.

    Raises:
        InputError: less than two documents with two sentences or more.
    """

    def __init__(self, documents: Sequence[Sequence[Tokens]], longest: int) -> None:
        self.documents = [document for document in documents if len(document) > 1]
        self.room = longest - 3  # but for the frame
        if len(self.documents) < 2:
            raise InputError("pairs of sentences need two documents of two sentences or more")
        self._ends = list(accumulate(len(document) - 1 for document in self.documents))

    def draw(self, rng: np.random.Generator) -> tuple[list[int], list[int], int]:
        """(first, second, label): label 0 where the second text followed the first, 1 where it is from
        another document."""
        d, first, i = self._first(rng)
        label = int(rng.integers(2))
        other = d
        while label and other == d:
            # Where another first text ends, so that its place in its document does not give it away.
            other, _, i = self._first(rng)
        return first, self._fill(self.documents[other], i, self.room - len(first))[0], label

    def _first(self, rng: np.random.Generator) -> tuple[int, list[int], int]:
        """A document, a text from it, and the sentence after that, of which there is one."""
        d, i = self._place(rng)
        return d, *self._fill(self.documents[d][:-1], i, self.room // 2)

    def _place(self, rng: np.random.Generator) -> tuple[int, int]:
        """A document, and in it a sentence that is not the last; all sentences equally likely."""
        place = int(rng.integers(self._ends[-1]))
        d = bisect_right(self._ends, place)
        return d, place - (self._ends[d - 1] if d else 0)

    @staticmethod
    def _fill(sentences: Sequence[Tokens], i: int, room: int) -> tuple[list[int], int]:
        """(tokens, the next sentence): sentence i, cut to the room, and those after it that fit whole."""
        text, i = list(sentences[i][:room]), i + 1
        while i < len(sentences) and len(text) + len(sentences[i]) <= room:
            text += sentences[i]
            i += 1
        return text, i
