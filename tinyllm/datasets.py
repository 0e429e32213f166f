"""From files to batches: text, token files too large for memory, and windows of tokens to learn from.

A causal model learns from every position at once: the inputs t[i], ..., t[i + T - 1] have the targets
t[i + 1], ..., t[i + T], with T the context.
"""

import codecs
import gzip
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from tinyllm.errors import InputError
from tinyllm.files import write_files
from tinyllm.tokenizers import Tokenizer, text_pieces

IGNORE = -100  # a target that does not count; cross_entropy's ignore_index
CHUNK = 1 << 20  # bytes read at a time
Batch = tuple[np.ndarray, np.ndarray]  # inputs, targets: (batch, context) int64


def default_corpus() -> str:
    """The prose of `help("topics")`, which comes with every Python: about 450,000 characters of English.

    Topics in alphabetical order, a blank line between; without the rows of signs that underline headings and
    rule tables. The topics quote each other: about a tenth of the last tenth stands word for word in the
    rest, so the loss on a validation split is slightly too good. Raises InputError where Python lacks them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("this Python lacks pydoc_data, the default corpus; give text with --data") from None
    text = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
    return re.sub(r"^ *[-=*~^+|]{3,}\n", "", text, flags=re.MULTILINE)


def stream_text(path: str | Path) -> Iterator[str]:
    """The text of a UTF-8 file, plain or .gz, or of all text files in a folder, in parts of up to a megabyte.

    A folder is read recursively, in the order of its paths, a blank line after each file. Hidden files are
    left out, and files with a zero byte near their start, which are no text. Raises InputError for what is
    missing, unreadable, empty or not UTF-8.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a text file, a folder of text files, or a .gz file")
    empty = True
    for file in _text_files(path) if path.is_dir() else [path]:
        for part in _decoded(file):
            empty = empty and not part
            yield part
        if path.is_dir():
            yield "\n\n"
    if empty:
        raise InputError(f"{path} holds no text; give a text file, a folder of text files, or a .gz file")


def read_text(path: str | Path) -> str:
    """All of `stream_text` as one string."""
    return "".join(stream_text(path))


def _text_files(folder: Path) -> list[Path]:
    names = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    files = [folder / name for name in sorted(names, key=lambda name: name.parts)]
    return [file for file in files if b"\0" not in next(_bytes(file), b"")[:8000]]


def _bytes(path: Path) -> Iterator[bytes]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0  # bytes; the decoder keeps back those of an unfinished character
    try:
        for chunk in _bytes(path):
            text = decoder.decode(chunk)
            yield text if done else text.removeprefix("\ufeff")  # Windows' mark of UTF-8
            done += len(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        position = done - len(decoder.getstate()[0]) + error.start
        raise InputError(
            f"{path} is not UTF-8: byte {position}, 0x{error.object[error.start]:02x}, fits no "
            "character; save it as UTF-8 or leave it out"
        ) from None


def split(text: str, validation_fraction: float = 0.1) -> tuple[str, str]:
    """(train, validation): the text's beginning and its last tenth, or another fraction.

    The cut lies at the last end of a line within the thousand characters before the exact place, if there is
    one. Raises InputError for a fraction outside [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"a validation fraction of {validation_fraction} is not in [0, 1); use 0.1 or so")
    cut = len(text) - math.floor(len(text) * validation_fraction)
    if cut < len(text):
        cut = text.rfind("\n", max(0, cut - 1000), cut) + 1 or cut
    return text[:cut], text[cut:]


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


class Sampler:
    """Random windows of a corpus: `next()` -> inputs, targets, both (batch, context) int64.

    An epoch cuts the tokens into consecutive windows, from a random start, and shows each once, shuffled; a
    batch may end one epoch and begin the next. Batch number `position` depends on the seed and that number
    alone: set `position` to continue where another sampler stopped. Memory: a permutation of the windows.

    Raises InputError for a corpus shorter than one window of context + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, batch: int, context: int, seed: int = 0) -> None:
        self.tokens, self.batch, self.context, self.seed = np.asarray(tokens), batch, context, seed
        n = len(self.tokens)
        if n < context + 1:
            raise InputError(
                f"a corpus of {n} tokens is too short for a context of {context}, which needs "
                f"{context + 1}; give more text or a smaller context"
            )
        self.windows = max(1, n // context - 1)  # in an epoch: one less than fit, so that the start can vary
        self.starts = n - self.windows * context  # places where the first window may start
        self.position = 0
        self._epoch, self._offsets = -1, np.empty(0, np.int64)

    def next(self) -> Batch:
        """The batch at `position`, which moves on by one."""
        epochs, places = np.divmod(np.arange(self.batch) + self.position * self.batch, self.windows)
        starts = np.array([self._start(*where) for where in zip(epochs.tolist(), places.tolist())])
        windows = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)  # (B, T + 1)
        self.position += 1
        return windows[:, :-1].copy(), windows[:, 1:].copy()

    def _start(self, epoch: int, place: int) -> int:
        """Where the window starts that is number `place` in the order of this epoch."""
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            first = random.integers(self.starts)
            self._epoch, self._offsets = epoch, first + self.context * random.permutation(self.windows)
        return int(self._offsets[place])


def evaluation_batches(tokens: np.ndarray, batch: int, context: int) -> Iterator[Batch]:
    """Consecutive windows, in which each token but the first is a target once.

    The last batch may have fewer rows. Its last window is filled up with inputs 0 and targets -100: a mean
    over batches must weigh each by its targets that are not -100. Raises InputError for less than two tokens.
    """
    if len(tokens) < 2:
        raise InputError(f"{len(tokens)} tokens have nothing to predict; evaluate on a longer text")
    return (_rows(tokens, start, batch, context) for start in range(0, len(tokens) - 1, batch * context))


def _rows(tokens: np.ndarray, start: int, batch: int, context: int) -> Batch:
    window = np.asarray(tokens[start : start + batch * context + 1]).astype(np.int64)
    padding = -(len(window) - 1) % context
    inputs = np.pad(window[:-1], (0, padding))
    targets = np.pad(window[1:], (0, padding), constant_values=IGNORE)
    return inputs.reshape(-1, context), targets.reshape(-1, context)


def bytes_per_token(tokenizer: Tokenizer, tokens: np.ndarray) -> float:
    """Mean UTF-8 bytes of a token: bits per byte = (nats per token) / (ln 2 * bytes per token)."""
    counts = np.bincount(tokens, minlength=tokenizer.vocabulary_size)
    lengths = [len(tokenizer.decode_bytes([i])) if n else 0 for i, n in enumerate(counts)]
    return float(counts @ lengths / counts.sum())
