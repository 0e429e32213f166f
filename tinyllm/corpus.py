"""A corpus made ready for training: a tokenizer, and rows of tokens for training and validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllm.datasets import documents, folder_documents, read_text, split, split_documents
from tinyllm.errors import InputError
from tinyllm.tokenizers import BytePairTokenizer, text_pieces, train_bpe

BPE_CHARACTERS = 20_000_000  # of a larger corpus the beginning is enough to find the frequent pairs


class Corpus(NamedTuple):
    """A tokenizer and two rows of its tokens, each (N,), of the smallest unsigned type that holds them."""

    tokenizer: BytePairTokenizer
    train: np.ndarray
    validation: np.ndarray


def load(data: Path | None, vocabulary_size: int, kind: str = "prose", progress: Callable = iter) -> Corpus:
    """The texts of `split_texts` as tokens, with end_of_text between documents.

    The byte-pair encoding, of at most vocabulary_size tokens, is learned from the training texts, or from the
    beginning of many; progress wraps the iteration over its merges, as tqdm does.

    Raises:
        InputError: as `split_texts`, or a vocabulary_size below 257.
    """
    train, validation = split_texts(data, kind)
    tokenizer = train_bpe("\n\n".join(train)[:BPE_CHARACTERS], vocabulary_size, progress)
    return Corpus(tokenizer, _row(tokenizer, train), _row(tokenizer, validation))


def split_texts(data: Path | None, kind: str = "prose") -> tuple[list[str], list[str]]:
    """(training, validation): the texts of the documents of each side.

    data None: `documents(kind)`, which come with every Python, split by name. A folder: each file a document,
    split by name too. A text file or .gz is one document, whose last tenth is for validation; so is a folder
    of so few files that one side would have none.

    Raises:
        InputError: unreadable data, or less than two characters for each side.
    """
    if data is None or Path(data).is_dir():
        found = documents(kind) if data is None else folder_documents(data)
        sides = tuple([document.text for document in side] for side in split_documents(found))
        if not all(sides):
            sides = _cut("\n\n".join(document.text for document in found))
    else:
        sides = _cut(read_text(data))
    if any(sum(map(len, side)) < 2 for side in sides):
        raise InputError(f"{data} holds too little text to train on nine tenths of it; give more with --data")
    return sides


def _cut(text: str) -> tuple[list[str], list[str]]:
    train, validation = split(text)
    return [train], [validation]


def _row(tokenizer: BytePairTokenizer, texts: list[str]) -> np.ndarray:
    dtype = np.min_scalar_type(tokenizer.vocabulary_size - 1)
    end = np.array([tokenizer.end_of_text], dtype)
    parts: list[np.ndarray] = []
    for text in texts:
        parts += [np.array(tokenizer.encode(piece), dtype) for piece in text_pieces(text)]
        parts.append(end)
    return np.concatenate(parts[:-1])
