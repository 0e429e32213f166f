"""A corpus made ready for training: a tokenizer, and one row of tokens cut into training and validation."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from tinyllm.datasets import default_corpus, open_tokens, split, stream_text, write_tokens
from tinyllm.errors import InputError
from tinyllm.tokenizers import Tokenizer, train_bpe

TOKENS = "tokens.npy"
_BPE_CHARACTERS = 20_000_000  # of a larger corpus the beginning is enough to find the frequent pairs


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
