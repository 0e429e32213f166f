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

from tinyllm.datasets import IGNORE, check_lines, padded, read_text
from tinyllm.errors import InputError
from tinyllm.tokenizers import BytePairTokenizer, train_bpe

Pair = tuple[str, str]  # source, target
Batch = tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (source, lengths, decoder's), targets


def read_pairs(path: str | Path, target: str | Path | None = None) -> list[Pair]:
    """The pairs in a UTF-8 file, plain or .gz: a line is source, tab, target; or, with `target`, the lines of
    one file with those of the other. What a line has behind a second tab is left out.

    Raises:
        InputError: a file that cannot be read, files with different numbers of lines, or lines without a tab
            or with nothing on a side, of which the message names the first and says how many there are.
    """
    lines = _lines(path)
    if target is None:
        files, rows = (path, path), [line.split("\t") for line in lines]
    else:
        files, others = (path, target), _lines(target)
        if len(lines) != len(others):
            raise InputError(
                f"{path} has {len(lines)} lines and {target} {len(others)}: line by line, one file is the "
                "translation of the other"
            )
        rows = list(zip(lines, others))
    pairs = [tuple(text.strip() for text in row[:2]) for row in rows]
    faults = {}
    for number, pair in enumerate(pairs, 1):
        if len(pair) < 2 or not all(pair):
            faults[number] = _fault(pair, files)
    check_lines(faults)
    return pairs


def _fault(pair: tuple[str, ...], files: tuple[str | Path, str | Path]) -> tuple[str | Path, str]:
    """In which of the files, and how, a line is no pair."""
    if len(pair) == 1:
        fault = "has no tab: a line is a sentence, a tab, and its translation"
        return files[0], fault if pair[0] else "is empty: give it a pair, or take it out"
    side = 1 if pair[0] else 0
    return files[side], f"has an empty {('source', 'target')[side]}: give it text, or take it out"


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
    """The pairs as tokens.

    Raises:
        InputError: pairs with more than `most` tokens on a side. The message says how many there are, and
            the number of the first, which is that of its line where the pairs are those of a file.
    """
    pairs, encode = list(pairs), vocabulary.tokenizer.encode
    found = [Tokens(vocabulary.source(source), encode(target)) for source, target in pairs]
    longer = [number for number, tokens in enumerate(found, 1) if tokens.length > most]
    if longer:
        first, longest = longer[0], max(tokens.length for tokens in found)
        begins = pairs[first - 1][0][:40]
        raise InputError(
            f"the model reads {most} tokens on a side; {len(longer):,} of {len(found):,} pairs have more, up "
            f"to {longest}, the first is pair {first} (line {first} of a file), {begins!r}: shorten them, "
            "leave them out, or take a larger context"
        )
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
