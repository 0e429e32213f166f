"""Questions built from docstrings: where the answer lies, and that it is the right one."""

from __future__ import annotations

import string
from collections import Counter

import numpy as np
import pytest

from tinyllm.datasets import Document, documents
from tinyllm.docstring_spans import PREPOSITIONS, question, statements
from tinyllm.errors import InputError
from tinyllm.masked import SpecialTokens
from tinyllm.tokenizers import CharacterTokenizer, train_bpe

from .folders import one_line

SPECIAL = SpecialTokens(pad=200, cls=201, sep=202, mask=203)
encode = lambda text: list(text.encode())


def of(*texts, longest=99):
    found = [Document("a", f"a.f{i}", text) for i, text in enumerate(texts)]
    return statements(found, encode, longest)


def answers(statement):
    """Preposition -> the text at its place."""
    return {p: bytes(statement.tokens[i : j + 1]).decode() for p, (i, j) in statement.places.items()}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Copy data from one file to another. More to read.", {"from": " one file", "to": " another"}),
        ("Return True if the future's done.", {"if": " the future's done"}),
        ("Copy data from A, to B", {"from": " A", "to": " B"}),
        ("Set a read-only view of it (of x).", {}),  # twice: which one is meant?
        ("Set the size of x in multi-line mode; by y.", {"of": " x", "in": " multi-line mode", "by": " y"}),
        ("Look at it on.", {}),
        ("Store into the import index.", {"into": " the import index"}),
    ],
)
def test_phrases(text, expected):
    found = of(text)
    assert [answers(statement) for statement in found] == ([expected] if expected else [])
    for statement in found:
        assert bytes(statement.tokens).decode() == f" {text.split('. ')[0] + '.' * ('. ' in text)}"
        assert statement.verb == text.split()[0].lower()
        assert not set(statement.absent) & set(text.lower().replace(",", "").split(". ")[0].split())
        assert set(statement.absent) < set(PREPOSITIONS)


def test_which_sentences_are_taken():
    assert len(of("Copy from a.", "Copy from a.\n\nMore.", "Copy from b.")) == 2  # each once
    assert not of("copy from a.", ">>> from a", "__x from a", "Nothing.", "")
    assert len(of("Copy from a.", longest=13)) == 1 and not of("Copy from a.", longest=12)


def test_no_token_reaches_over_the_edge_of_an_answer():
    """With a BPE that joins signs: "x_)" ends in one token "_)" that belongs to both sides."""
    tokenizer = train_bpe("_) " * 50, 260)
    assert len(tokenizer.encode("_)")) == 1
    assert not statements([Document("a", "a.f", "Set it from x_)")], tokenizer.encode, 99)
    assert statements([Document("a", "a.f", "Set it from x)")], tokenizer.encode, 99)


def test_questions():
    """[CLS] verb preposition what? [SEP] sentence [SEP]; a quarter has no answer."""
    texts = [f"Copy item{i} from place{i} to goal{i} of it." for i in range(10)]
    pool, none, asked_for = of(*texts), 0, Counter()
    for seed in range(400):
        (ids, segments), (first, last) = question(pool, SPECIAL, encode, np.random.default_rng(seed))
        at = ids.index(SPECIAL.sep)
        assert ids[0] == SPECIAL.cls and ids[-1] == SPECIAL.sep
        assert segments == [0] * (at + 1) + [1] * (len(ids) - at - 1)
        asked, sentence = bytes(ids[1:at]).decode(), bytes(ids[at + 1 : -1]).decode()
        preposition = asked.removeprefix("copy ").removesuffix(" what?")
        assert preposition in PREPOSITIONS and sentence.strip() in texts
        asked_for[preposition] += 1
        if (first, last) == (0, 0):
            none += 1
            assert f" {preposition} " not in sentence
        else:
            answer = bytes(ids[first : last + 1]).decode()
            assert f" {preposition}{answer}" in sentence
            assert answer[1:5] == {"from": "plac", "to": "goal", "of": "it"}[preposition]
    assert abs(none / 400 - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert set(asked_for) == set(PREPOSITIONS)
    always = [question(pool, SPECIAL, encode, np.random.default_rng(i), 0.0) for i in range(30)]
    assert all(q.place[0] > 0 for q in always)


def test_no_sentence():
    error = pytest.raises(InputError, question, [], SPECIAL, encode, np.random.default_rng(0))
    assert "no sentence" in one_line(error)


def test_of_python():
    found = documents("docstrings")
    tokenizer = CharacterTokenizer({*string.printable, *"".join(document.text for document in found)})
    made = statements(found, tokenizer.encode, 150)
    assert len(made) > 2000 and len({tuple(s.tokens) for s in made}) == len(made)
