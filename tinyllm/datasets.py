"""From files to batches: text, documents, and windows of tokens.

A causal model learns from every position at once: the inputs t[i], ..., t[i + T - 1] have the targets
t[i + 1], ..., t[i + T], with T the context.
"""

import ast
import codecs
import gzip
import importlib.util
import math
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllm.errors import InputError
from tinyllm.tokenizers import Tokenizer

IGNORE = -100  # a target that does not count; cross_entropy's ignore_index
CHUNK = 1 << 20  # bytes read at a time
Batch = tuple[np.ndarray, np.ndarray]  # inputs, targets: (batch, context) int64


def default_corpus() -> str:
    """documents("prose") as one text: 360,000 characters of English, a blank line between documents.

    Those for validation, by `split_documents`, stand last, and are its last tenth. Raises InputError where
    this Python lacks them.
    """
    train, validation = split_documents(documents("prose"))
    return "\n\n".join(document.text for document in train + validation) + "\n"


def _topics() -> dict[str, str]:
    """The topics of Python's help, in alphabetical order, cleaned."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("this Python lacks pydoc_data, the default corpus; give text with --data") from None
    ruled = re.compile(r"^ *[-=*~^+|]{3,}\n", re.MULTILINE)
    return {name: ruled.sub("", topics[name].strip("\n") + "\n").strip("\n") for name in sorted(topics)}


class Document(NamedTuple):
    """A text with the name that it goes by, and the class that it belongs to."""

    label: str
    name: str
    text: str


def documents(kind: str) -> list[Document]:
    """The documents that come with every Python, no two with the same text, always in the same order.

    "prose"       the topics of help("topics"): 360,000 characters. Label "topics". They quote each other, so
                  a paragraph stands only in the shortest topic that has it.
    "docstrings"  of the modules, classes and functions of the standard library: 7,000 of them, 1.5 million
                  characters. Label: the top-level package or module; name: "json.decoder.JSONDecoder.decode".
    "sources"     the modules of the standard library as they stand: 400 of them, 8 million characters. Label:
                  the top-level package or module; name: "json.decoder".

    Nothing is imported: the sources are read and parsed. Tests, tables of characters and IDLE are left out.
    Raises InputError for another kind, and where this Python comes without the sources.
    """
    if kind == "prose":
        return _distinct(_prose())
    if kind == "docstrings":
        return _distinct(found for module in _modules() for found in _docstrings(module))
    if kind == "sources":
        return _distinct(_modules())
    raise InputError(f"there are no documents of the kind {kind!r}; take prose, docstrings or sources")


def _distinct(found: Iterable[Document]) -> list[Document]:
    """The first document of each text, empty ones left out."""
    first: dict[str, Document] = {}
    for document in found:
        first.setdefault(document.text, document)
    first.pop("", None)
    return list(first.values())


def _prose() -> list[Document]:
    topics = _topics()
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())  # quoted, it may be indented or wrapped otherwise
            if words not in seen:
                kept.append(paragraph)
            seen.add(words)
        topics[name] = "\n\n".join(kept).strip("\n")
    return [Document("topics", name, text) for name, text in topics.items()]


# Parts of the standard library that are no library, come not everywhere, or are tables.
_LEFT_OUT = set("test tests idlelib lib2to3 distutils ensurepip turtledemo encodings pydoc_data".split())


def _modules() -> list[Document]:
    """The sources of the standard library; a package's __init__.py has the name of the package."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    try:
        for name, file in _source_files(root, ""):
            with suppress(SyntaxError, UnicodeDecodeError):  # a stray file in no known encoding
                text = importlib.util.decode_source(Path(file).read_bytes())
                found.append(Document(name.split(".")[0], name, text))
    except OSError as error:
        raise InputError(_no_sources(root, str(error.strerror))) from error
    if not found:
        raise InputError(_no_sources(root, "no .py files"))
    return found


def _no_sources(root: Path, why: str) -> str:
    return f"this Python comes without the sources of its library ({root}: {why}); give text with --data"


def _source_files(folder: str | Path, package: str) -> Iterator[tuple[str, str]]:
    """(dotted name, path) of all modules below. site-packages and the like are no identifiers."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name.removesuffix(".py")
        if not name.isidentifier() or name in _LEFT_OUT or name.startswith("_sysconfigdata"):
            continue
        if entry.is_dir():
            yield from _source_files(entry.path, f"{package}{name}.")
        elif name != entry.name:
            yield package[:-1] if name == "__init__" else package + name, entry.path


_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _docstrings(module: Document) -> Iterator[Document]:
    """The docstrings of a module and of all classes and functions in it."""

    def walk(name: str, node: ast.AST) -> Iterator[Document]:
        if isinstance(node, (ast.Module, *_DEFINITIONS)):
            yield Document(module.label, name, ast.get_docstring(node) or "")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _DEFINITIONS):
                yield from walk(f"{name}.{child.name}", child)
            elif isinstance(child, (ast.stmt, ast.ExceptHandler)):  # an expression defines nothing
                yield from walk(name, child)

    with suppress(SyntaxError):  # a stray file that is no Python of this version
        yield from walk(module.name, ast.parse(module.text))


def sentences(text: str) -> list[str]:
    """The sentences of a text, the white space in each one blank.

    One ends at a . ! or ? before white space and a capital, a digit or an opening sign, or at a blank line.
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        found += re.split(r"(?<=[.!?]) (?=[A-Z0-9\"'(\[*`])", line) if line else []
    return found


def folder_documents(folder: str | Path) -> list[Document]:
    """Each text file of a folder as a document, as `stream_text` reads them.

    Name: the path below the folder, with slashes; label: the first part of that path, "" for files that lie
    in the folder itself. So a folder for each class gives labelled texts.
    """
    folder = Path(folder)
    names = [(file, file.relative_to(folder)) for file in _text_files(folder)]
    found = _distinct(
        Document(name.parts[0] if len(name.parts) > 1 else "", name.as_posix(), "".join(_decoded(file)))
        for file, name in names
    )
    if not found:
        raise InputError(f"{folder} holds no text; give a text file, a folder of text files, or a .gz file")
    return found


def split_documents(
    found: Iterable[Document], fraction: float = 0.1
) -> tuple[list[Document], list[Document]]:
    """(train, validation), in their order; validation gets about that fraction of the documents.

    The side of a document depends on its name alone (a CRC-32 of it): it stays there whatever other documents
    come or go, and a larger fraction only adds to the validation side. No text stands on both sides, for
    `documents` and `folder_documents` give no text twice. Raises InputError for a fraction outside [0, 1).
    """
    _check_fraction(fraction)
    sides: tuple[list[Document], list[Document]] = [], []
    for document in found:
        code = zlib.crc32(document.name.encode("utf-8", "surrogateescape"))
        # CRC-32 is linear, similar names have similar codes; the remainder for a prime mixes all bits.
        sides[code % 10007 < 10007 * fraction].append(document)
    return sides


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
    _check_fraction(validation_fraction)
    cut = len(text) - math.floor(len(text) * validation_fraction)
    if cut < len(text):
        cut = text.rfind("\n", max(0, cut - 1000), cut) + 1 or cut
    return text[:cut], text[cut:]


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise InputError(f"a validation fraction of {fraction} is not in [0, 1); use 0.1 or so")


def check_lines(faults: Mapping[int, tuple[str | Path, str]]) -> None:
    """Raise InputError for the first line of a file, if any, with a fault, and say how many lines have one.

    faults: number of the line -> the file, and what is wrong with the line.
    """
    if faults:
        number = min(faults)
        path, fault = faults[number]
        more = f" (the first of {len(faults):,} lines to mend)" if len(faults) > 1 else ""
        raise InputError(f"{path}, line {number} {fault}{more}")


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as (B, longest) int64, filled up at their ends, and their lengths (B,)."""
    lengths = np.array([len(row) for row in rows], np.int64)
    out = np.full((len(rows), lengths.max()), fill, np.int64)
    for to, row in zip(out, rows):
        to[: len(row)] = row
    return out, lengths


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
