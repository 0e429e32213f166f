"""Texts with labels: the docstrings of Python's library and who wrote them, or any table of two columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllm.datasets import Document, check_lines, read_text, split_documents
from tinyllm.errors import InputError

MASK = "package"


class Texts(NamedTuple):
    """Labelled texts: their tokens, in the order of their lengths, and the number of each one's class."""

    tokens: list[list[int]]
    labels: np.ndarray


class Task(NamedTuple):
    """The names of the classes, texts to learn from and texts held out; how many of both were cut, and how
    many were left out because another is read alike."""

    names: list[str]
    train: Texts
    held_out: Texts
    cut: int
    alike: int


def masked(found: Iterable[Document], labels: int) -> list[Document]:
    """The documents of the most frequent labels, with all these labels replaced by MASK in their texts.

    So no docstring of a package of Python's library gives itself away by the package's name, in lower or
    upper case. Labels with an underscore first, private packages, are left out.
    """
    found = list(found)
    public = Counter(document.label for document in found if not document.label.startswith("_"))
    names = [name for name, _ in public.most_common(labels)]
    mask = re.compile("|".join(map(re.escape, names)), re.IGNORECASE)
    return [d._replace(text=mask.sub(MASK, d.text)) for d in found if d.label in names]


def read_tsv(path: str | Path) -> list[Document]:
    """The texts of a UTF-8 file, plain or .gz, each a line `text<tab>label`; blank lines are skipped.

    The label stands after the last tab. A document's name is its text, so equal texts are on one side of a
    split. Raises InputError for fewer than two labels, and for lines that are none, of which it names the
    first and says how many there are.
    """
    found, faults = [], {}
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines cuts at signs inside a text
        if not line.strip():
            continue
        text, tab, label = (part.strip() for part in line.rpartition("\t"))
        if "\t" not in line:
            faults[number] = path, "has no tab: each line is a text, a tab, and its label"
        elif not text or not label:
            faults[number] = path, f"has an empty {'label' if text else 'text'}"
        found.append(Document(label, text, text))
    check_lines(faults)
    if len({document.label for document in found}) < 2:
        raise InputError(f"{path} has less than two labels: there is nothing to tell apart")
    return found


def split_task(
    found: Iterable[Document], encode: Callable[[str], list[int]], longest: int, held_out: float = 0.3
) -> Task:
    """The documents as tokens, at most `longest` of each, the fraction `held_out` kept apart by name.

    Classes are in the order of their frequency. Of texts that are read alike the first stays, whatever the
    labels of the others: so nothing that is held out is in training. Raises InputError where a side is empty,
    or a label stands on the held-out side alone.
    """
    found = list(found)
    rows: dict[tuple[int, ...], Document] = {}
    cut = 0
    for document in found:
        tokens = encode(document.text)
        if rows.setdefault(tuple(tokens[:longest]), document) is document:
            cut += len(tokens) > longest
    read = {document: list(tokens) for tokens, document in sorted(rows.items(), key=lambda row: len(row[0]))}
    kept = {document.label for document in read}
    names = [name for name, _ in Counter(d.label for d in found).most_common() if name in kept]
    sides = split_documents(read, held_out)
    if not all(sides):
        raise InputError(f"{len(read)} texts are too few to hold some out: give more")
    unseen = sorted({d.label for d in sides[1]} - {d.label for d in sides[0]})
    if unseen:
        more = f" and {len(unseen) - 4} more" if len(unseen) > 4 else ""
        raise InputError(
            f"labels that stand in held-out texts alone: {', '.join(map(repr, unseen[:4]))}{more}; give more "
            "texts of them, or leave them out"
        )
    number = {name: i for i, name in enumerate(names)}
    train, held = (
        Texts([read[d] for d in side], np.array([number[d.label] for d in side])) for side in sides
    )
    return Task(names, train, held, cut, len(found) - len(read))


def naive_bayes(train: Texts, held_out: Texts, vocabulary: int) -> np.ndarray:
    """The guesses (N,): argmax of log p(class) + sum over a text's tokens of log p(token | class), each p by
    Laplace's rule, a count and one more."""
    count = lambda of: np.array([np.bincount(row, minlength=vocabulary) for row in of.tokens])  # (N, V)
    log_p = lambda n: np.log((n + 1) / (n + 1).sum(axis=-1, keepdims=True))
    classes = np.eye(train.labels.max() + 1)[train.labels]  # (N, classes)
    return (count(held_out) @ log_p(classes.T @ count(train)).T + log_p(classes.sum(axis=0))).argmax(axis=-1)
