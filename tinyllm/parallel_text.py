"""Parallel text: pairs of a sentence and its translation, from files to batches.

Both languages share one byte-pair encoding, learned from both (Vaswani et al. 2017, section 5.1). A source
ends with the end token; the decoder reads start, then the translation, and is to say the translation, then
end. Sentences of similar length go into one batch, so that there is little padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllm.datasets import IGNORE, read_text
from tinyllm.errors import InputError
from tinyllm.tokenizers import BytePairTokenizer, train_bpe
from tinyllm.translation import padded

Pair = tuple[str, str]  # source, target
Batch = tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (source, lengths, decoder's), targets


def read_pairs(path: str | Path, target: str | Path | None = None) -> list[Pair]:
    """The pairs in a UTF-8 file, plain or .gz: a line is source, tab, target; or, with `target`, the lines of
    one file with those of the other. What a line has behind a second tab is left out.

    Raises:
        InputError: a file that cannot be read, a line without a tab or with nothing on a side, which the
            message counts, or files with different numbers of lines.
    """
    lines = _lines(path)
    if target is None:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise InputError(f"{path}, line {number} is empty: give it a pair, or take it out")
            if "\t" not in line:
                raise InputError(
                    f"{path}, line {number} has no tab: a line is a sentence, a tab, and its translation"
                )
        pairs = [tuple(line.split("\t")[:2]) for line in lines]
        files = (path, path)
    else:
        others = _lines(target)
        if len(lines) != len(others):
            raise InputError(
                f"{path} has {len(lines)} lines and {target} {len(others)}: line by line, one file is the "
                "translation of the other"
            )
        pairs, files = list(zip(lines, others)), (path, target)
    for number, pair in enumerate(pairs, 1):
        for side, file, text in zip(("source", "target"), files, pair):
            if not text.strip():
                raise InputError(f"{file}, line {number} has an empty {side}: give it text, or take it out")
    return [(source.strip(), target.strip()) for source, target in pairs]


def _lines(path: str | Path) -> list[str]:
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def split_pairs(pairs: Iterable[Pair], held_out: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): a random choice; no source stands on both sides, and none twice among the held out.

    Raises:
        InputError: fewer sources than that, and as many to learn from.
    """
    pairs = list(dict.fromkeys(pairs))
    sources = sorted({source for source, _ in pairs})
    if len(sources) < 2 * held_out:
        raise InputError(
            f"{len(sources)} different sources are too few to hold {held_out} out and learn from as many: "
            "give more pairs, or hold fewer out"
        )
    chosen = np.random.default_rng(seed).choice(len(sources), held_out, replace=False)
    unseen = {sources[i] for i in chosen}
    train = [pair for pair in pairs if pair[0] not in unseen]
    rest = {source: target for source, target in reversed(pairs) if source in unseen}
    return train, [(source, rest[source]) for source in (sources[i] for i in chosen)]


class Vocabulary(NamedTuple):
    """A tokenizer of both languages, and the token that pads and that the decoder starts with."""

    tokenizer: BytePairTokenizer
    end: int
    pad: int

    @property
    def size(self) -> int:
        return self.pad + 1

    def source(self, text: str) -> list[int]:
        """text end"""
        return [*self.tokenizer.encode(text), self.end]

    def text(self, tokens: Iterable[int]) -> str:
        """What tokens say before the end."""
        return self.tokenizer.decode([i for i in tokens if 0 <= i < self.end])

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Each token as a text, for pictures."""
        return [self.tokenizer.decode([i]) if i < self.end else "end" for i in tokens]


def learn_vocabulary(pairs: Iterable[Pair], size: int, progress: Callable = iter) -> Vocabulary:
    """Byte pairs of both sides together, at most `size` tokens; InputError if that is below 258."""
    tokenizer = train_bpe("\n".join(text for pair in pairs for text in pair), size - 1, progress)
    return Vocabulary(tokenizer, tokenizer.end_of_text, tokenizer.vocabulary_size)


class Tokens(NamedTuple):
    """A pair as tokens: the source with its end, the target without."""

    source: list[int]
    target: list[int]

    @property
    def length(self) -> int:
        """Of the longer side: the decoder reads one token more than the target has, the start."""
        return max(len(self.source), len(self.target) + 1)


def encoded(pairs: Iterable[Pair], vocabulary: Vocabulary, most: int) -> list[Tokens]:
    """The pairs as tokens; InputError for one with a side longer than `most`, which the message quotes."""
    found = []
    for source, target in pairs:
        tokens = Tokens(vocabulary.source(source), vocabulary.tokenizer.encode(target))
        if tokens.length > most:
            raise InputError(
                f"a pair has {tokens.length} tokens on a side, and the model reads {most}: shorten it, leave "
                f"it out, or take a larger context; it begins {source[:40]!r}"
            )
        found.append(tokens)
    return found


def collate(pairs: Sequence[Tokens], vocabulary: Vocabulary) -> Batch:
    """What a Transformer's loss takes of pairs, padded to the longest on each side.

    -> (source (B, S), lengths (B,), decoder's input (B, T)), targets (B, T) with -100 where padded.
    """
    ids, lengths = padded([pair.source for pair in pairs], vocabulary.pad)
    decoder_ids, _ = padded([[vocabulary.pad, *pair.target] for pair in pairs], vocabulary.pad)
    wanted, _ = padded([[*pair.target, vocabulary.end] for pair in pairs], IGNORE)
    return (ids, lengths, decoder_ids), wanted


class PairSampler:
    """Batches of pairs of similar length, each of at most `tokens` tokens a side with its padding, or of one
    pair that is longer.

    An epoch shuffles the pairs, sorts them by length, cuts them into batches and shuffles those: each pair
    comes once. batch(step) depends on the seed and the step alone.
    """

    def __init__(self, pairs: Sequence[Tokens], vocabulary: Vocabulary, tokens: int, seed: int = 0) -> None:
        self.pairs, self.vocabulary, self.seed = pairs, vocabulary, seed
        self.lengths = np.array([pair.length for pair in pairs])
        self.cuts = [0]  # where batches begin in the order of length; the lengths there are always the same
        for place, length in enumerate(np.sort(self.lengths).tolist()):
            if place > self.cuts[-1] and (place + 1 - self.cuts[-1]) * length > tokens:
                self.cuts.append(place)
        self._epoch, self._batches = -1, []

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.cuts)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        epoch, place = divmod(step, len(self))
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            order = rng.permutation(len(self.pairs))
            order = order[np.argsort(self.lengths[order], kind="stable")]
            batches = np.split(order, self.cuts[1:])
            self._epoch, self._batches = epoch, [batches[i] for i in rng.permutation(len(batches))]
        return collate([self.pairs[i] for i in self._batches[place]], self.vocabulary)


def evaluation_batches(pairs: Sequence[Tokens], vocabulary: Vocabulary, rows: int = 64) -> list[Batch]:
    """All pairs in batches of so many rows, those of similar length together."""
    by_length = sorted(pairs, key=lambda pair: pair.length)
    return [collate(by_length[i : i + rows], vocabulary) for i in range(0, len(pairs), rows)]


def scores(found: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of translations, both from 0 to 100, by sacrebleu.

    Empty where the library is not installed: pip install -e ".[translation]".
    """
    try:
        import sacrebleu
    except ImportError:
        return {}
    return {
        "BLEU": sacrebleu.corpus_bleu(list(found), [list(expected)]).score,
        "chrF": sacrebleu.corpus_chrf(list(found), [list(expected)]).score,
    }
