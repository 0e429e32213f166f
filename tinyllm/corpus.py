"""A corpus made ready for training: a tokenizer, and rows of tokens for training and validation."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllm.datasets import (
    default_corpus,
    documents,
    folder_documents,
    open_tokens,
    read_text,
    split,
    split_documents,
    stream_text,
    write_tokens,
)
from tinyllm.errors import InputError
from tinyllm.tokenizers import BytePairTokenizer, Tokenizer, text_pieces, train_bpe

TOKENS = "tokens.npy"
_BPE_CHARACTERS = 20_000_000  # of a larger corpus the beginning is enough to find the frequent pairs


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
    tokenizer = train_bpe("\n\n".join(train)[:_BPE_CHARACTERS], vocabulary_size, progress)
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


def text_parts(data: Path | None) -> Iterable[str]:
    """The text at a path in parts, or the default corpus in one."""
    return [default_corpus()] if data is None else stream_text(data)


def train_tokenizer(data: Path | None, vocabulary_size: int, progress: Callable = iter) -> Tokenizer:
    """Byte-level BPE learned from the training part of a corpus, or from the beginning of a large one."""
    head, total = [], 0
    for part in text_parts(data):
        head.append(part)
        total += len(part)
        if total > _BPE_CHARACTERS:
            break
    text = "".join(head)
    return train_bpe(split(text)[0], vocabulary_size, progress)


def tokenize(data: Path | None, tokenizer: Tokenizer, out: Path) -> np.ndarray:
    """The corpus as tokens (N,), in a file in the folder `out` that is mapped into memory."""
    write_tokens(tokenizer, text_parts(data), out / TOKENS)
    return open_tokens(out / TOKENS)


def restore(data: Path | None, tokenizer: Tokenizer, out: Path, expected: str) -> np.ndarray:
    """The tokens of an earlier run, from its file or, where that is lost or damaged, from the corpus again.

    Raises:
        InputError: the corpus is missing, or its fingerprint is not the one expected.
    """
    with suppress(InputError):
        tokens = open_tokens(out / TOKENS)
        if fingerprint(tokens) == expected:
            return tokens
        del tokens  # Windows replaces no file that is mapped into memory
    tokens = tokenize(data, tokenizer, out)
    if fingerprint(tokens) != expected:
        raise InputError(
            f"the corpus is not the one that the run in {out} began with: give it back, or start anew"
        )
    return tokens


def fingerprint(tokens: np.ndarray) -> str:
    """Tells one row of tokens from another, to notice a corpus that changed between two runs."""
    return f"{len(tokens)} tokens, CRC-32 {zlib.crc32(np.ascontiguousarray(tokens)):08x}"


def cut(tokens: np.ndarray, context: int, validation_fraction: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation): the beginning of the corpus and its last tenth.

    Raises:
        InputError: too few tokens for one window of context + 1 in training and two tokens in validation.
    """
    end = len(tokens) - max(int(len(tokens) * validation_fraction), 2)
    if end < context + 1:
        raise InputError(
            f"the corpus has {len(tokens)} tokens, of which {max(end, 0)} are for training: too few for one "
            f"window of {context} + 1; give more text with --data, or a smaller --context"
        )
    return tokens[:end], tokens[end:]
