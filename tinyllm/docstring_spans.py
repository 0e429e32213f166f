"""Questions whose answer is a span of a text, built from the docstrings of Python's library.

A docstring's first sentence, "Copy data from one file to another.", answers "copy from what?" by "one file"
and "copy to what?" by "another". "copy with what?" it does not answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tinyllm.datasets import Document, sentences
from tinyllm.errors import InputError
from tinyllm.masked import Row, SpecialTokens

PREPOSITIONS = "as by for from if in into of on to when with".split()
_PREPOSITION = "|".join(PREPOSITIONS)
# A preposition and what follows, up to the next one, a sign between words, or the end of the sentence.
_PHRASE = re.compile(rf" ({_PREPOSITION})((?: (?!(?:{_PREPOSITION})\b)[\w'-]+)+)(?=[^\w'-]|$)")


class Statement(NamedTuple):
    """A sentence: its first word, its tokens, and for each preposition that stands in it once the places of
    the first and last tokens of what follows."""

    verb: str
    tokens: list[int]
    places: dict[str, tuple[int, int]]
    absent: list[str]  # the prepositions that do not stand in it


def statements(
    found: Iterable[Document], encode: Callable[[str], list[int]], longest: int
) -> list[Statement]:
    """One for each docstring whose first sentence has a phrase with a preposition, and at most `longest`
    tokens; no sentence twice."""
    kept: dict[str, Statement] = {}
    for document in found:
        sentence = (sentences(document.text) or [""])[0]
        if sentence in kept or not re.match(r"[A-Z][a-z]+ ", sentence):
            continue
        words, tokens = re.findall(r"[\w'-]+", sentence.lower()), encode(f" {sentence}")
        places = {}
        for phrase in _PHRASE.finditer(sentence):
            start, end = (encode(f" {sentence[:at]}") for at in phrase.span(2))
            cut_clean = tokens[: len(start)] == start and tokens[: len(end)] == end
            if words.count(phrase[1]) == 1 and cut_clean:  # no token reaches over an edge
                places[phrase[1]] = len(start), len(end) - 1
        if places and len(tokens) <= longest:
            absent = [preposition for preposition in PREPOSITIONS if preposition not in words]
            kept[sentence] = Statement(words[0], tokens, places, absent)
    return list(kept.values())


class Question(NamedTuple):
    """A row [CLS] question [SEP] sentence [SEP], and the places of the answer's first and last tokens in it;
    both 0 where the sentence has none."""

    row: Row
    place: tuple[int, int]


def question(
    pool: Sequence[Statement],
    special: SpecialTokens,
    encode: Callable[[str], list[int]],
    rng: np.random.Generator,
    unanswered: float = 0.25,
) -> Question:
    """A random one, with probability `unanswered` about a preposition that its sentence does not have."""
    if not pool:
        raise InputError("there is no sentence to ask about")
    statement = pool[rng.integers(len(pool))]
    asked = statement.absent if rng.random() < unanswered else list(statement.places)
    preposition = asked[rng.integers(len(asked))]
    words = encode(f"{statement.verb} {preposition} what?")
    place = (0, 0)
    if preposition in statement.places:
        first, last = statement.places[preposition]
        place = (len(words) + 2 + first, len(words) + 2 + last)
    return Question(special.row(words, statement.tokens), place)
