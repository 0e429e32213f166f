"""A corpus too large for memory: text read in parts, its tokens in a file that is mapped into memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from tinyllm.corpus import BPE_CHARACTERS
from tinyllm.datasets import default_corpus, split, stream_text
from tinyllm.errors import InputError
from tinyllm.files import write_files
from tinyllm.tokenizers import Tokenizer, text_pieces, train_bpe

TOKENS = "tokens.npy"


def text_parts(data: Path | None) -> Iterable[str]:
    """The text at a path in parts, or the default corpus in one."""
    return [default_corpus()] if data is None else stream_text(data)


def train_tokenizer(data: Path | None, vocabulary_size: int, progress: Callable = iter) -> Tokenizer:
    """Byte-level BPE learned from the training part of a corpus, or from the beginning of a large one."""
    head, total = [], 0
    for part in text_parts(data):
        head.append(part)
        total += len(part)
        if total > BPE_CHARACTERS:
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


def write_tokens(tokenizer: Tokenizer, text: str | Iterable[str], path: str | Path) -> int:
    """Write the tokens of a text, or of a stream of its parts, as a .npy file of uint16 or uint32.

    Needs memory for one piece of text only. Returns the number of tokens. The file appears when it is whole.
    """
    dtype = np.dtype("<u2" if tokenizer.vocabulary_size <= 1 << 16 else "<u4")
    count = 0

    def write(part: Path) -> None:
        nonlocal count
        with open(part, "wb") as file:
            _write_header(file, dtype, 0)
            start = file.tell()
            for piece in text_pieces(text):
                tokens = np.array(tokenizer.encode(piece), dtype)
                file.write(tokens.tobytes())
                count += len(tokens)
            if count == 0:
                raise InputError(f"no text, so no tokens for {path}; give a text that is not empty")
            file.seek(0)
            _write_header(file, dtype, count)
            assert file.tell() == start  # NumPy leaves room in the header for the first axis to grow

    write_files(Path(path).parent, {Path(path).name: write})
    return count


def _write_header(file, dtype: np.dtype, count: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def open_tokens(path: str | Path) -> np.memmap:
    """The tokens of a file of `write_tokens`, (N,), left on the disk until they are used.

    Raises InputError for a file that is missing, cut short or not made by `write_tokens`.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"cannot read tokens from {path} ({error}); write them again") from error
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise InputError(f"{path} holds no row of uint16 or uint32 tokens; write them again")
    return tokens
