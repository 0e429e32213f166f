"""Files that are whole or absent, and arrays in the safetensors format.

A file is written under another name, flushed to the disk, then renamed over its place: whoever is killed in
the middle, or meets a full disk, leaves the old file as it was.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tinyllm.errors import InputError

DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "BF16": ml_dtypes.bfloat16,
}
LONGEST_HEADER = 100_000_000  # bytes; the limit of the format
PIECE = 2**20  # bytes of a tensor that are read at a time
Arrays = Mapping[str, np.ndarray]
Entry = tuple[np.dtype, tuple[int, ...], int]  # dtype, shape, place in the file


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing right or any other failure to write `path` into one InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot write {path}: {reason} (what was saved before is untouched); "
            "make room there or choose another folder"
        ) from error


def sync(path: Path) -> None:
    """Wait until the bytes of the file `path` are on the disk."""
    with open(path, "r+b") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where the system knows how to."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def write_files(folder: str | Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Let each writer write its file; none takes its name in `folder` before all are safe on the disk."""
    folder = Path(folder)
    parts = {folder / f"{name}.partial": folder / name for name in writers}
    with disk_errors(folder if len(writers) > 1 else folder / next(iter(writers))):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for part, write in zip(parts, writers.values()):
                write(part)
                sync(part)
            for part, whole in parts.items():
                os.replace(part, whole)
            sync_folder(folder)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)


def json_writer(value: Mapping[str, Any]) -> Callable[[Path], None]:
    """A writer of `value` as JSON, for `write_files`."""
    text = json.dumps(value, indent=2) + "\n"
    return lambda path: path.write_bytes(text.encode())


def array_writer(arrays: Arrays, metadata: dict[str, str] | None = None) -> Callable[[Path], None]:
    """A writer of `arrays` as safetensors, for `write_files`."""

    def write(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode
        # save_file copies memory as it lies, so a transposed view would be stored wrong. asarray makes it
        # contiguous and, unlike ascontiguousarray, leaves a 0-d array 0-d.
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path, metadata)
        path.chmod(mode)  # newer versions of save_file leave a file that only its owner can read

    return write


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON to `path`, whole or not at all."""
    write_files(Path(path).parent, {Path(path).name: json_writer(value)})


def write_arrays(path: str | Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> None:
    """Write `arrays` as safetensors to `path`, whole or not at all."""
    write_files(Path(path).parent, {Path(path).name: array_writer(arrays, metadata)})


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in the file `path`; InputError if it is missing, damaged or no object."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"), object_pairs_hook=_object)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged, it is not JSON ({error}); save or download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object {{...}}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different; ValueError if one stands twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return value


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of the safetensors file `path`, in the dtypes they were stored in."""
    return dict(ArrayFile(path))


class ArrayFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file, each read when it is asked for, in its stored dtype.

    The format (huggingface.co/docs/safetensors, "Format"): N as 8 bytes, little-endian; N bytes of JSON,
    {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {...}}; then the
    data, row-major and little-endian, which the offsets cover without a gap or an overlap.

    Read here and not by the library's `safe_open`, which maps the file into memory: the pages it has read
    stay beside the arrays copied out of them, so loading takes twice the size of the file, and a file that
    shrinks meanwhile kills the process. Plain reads take the size of the arrays.

    Raises InputError for a file that is missing, truncated or not as its header says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = 8 + int.from_bytes(file.read(8), "little")
                if not 10 <= start <= min(size, LONGEST_HEADER):
                    raise ValueError(f"a header of {start - 8} bytes in a file of {size}")
                header = json.loads(file.read(start - 8).decode("utf-8"), object_pairs_hook=_object)
            self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
            self._entries = _entries(header, start, size)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} is damaged or not a safetensors file ({error}); save or download it again"
            ) from error
        self.shapes = {name: shape for name, (_, shape, _) in self._entries.items()}
        self.dtypes = {name: dtype for name, (dtype, _, _) in self._entries.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def read(self, name: str, dtype: Any = None, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor `name`, in another dtype if one is given; into `out`, of its shape, if that is given.

        A piece at a time, so that a tensor that is turned or widened needs no memory for what it was.
        """
        stored, shape, _ = self._entries[name]
        try:
            out = np.empty(shape, dtype or stored) if out is None else out
        except ValueError as error:  # a shape that no array can have
            raise InputError(f"cannot read tensor {name!r} of {self.path}: {error}") from error
        for piece, values in self._pieces(name, out):
            piece[...] = values
        return out

    def holds(self, name: str, array: np.ndarray) -> bool:
        """Whether the tensor `name` has the values of array, of its shape, in that array's precision."""
        pieces = self._pieces(name, array)
        return all(np.array_equal(piece, values.astype(array.dtype)) for piece, values in pieces)

    def _pieces(self, name: str, array: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some rows of array, and the same rows of the tensor in its stored dtype, until all have come."""
        stored, shape, offset = self._entries[name]
        target = array if shape else array[None]
        rows = max(1, PIECE // max(1, math.prod(shape[1:]) * stored.itemsize))
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                for start in range(0, len(target), rows):
                    piece = target[start : start + rows]
                    yield piece, np.fromfile(file, stored, piece.size).reshape(piece.shape)
        except (OSError, ValueError) as error:  # ValueError: the file has become shorter since it was opened
            raise InputError(f"cannot read tensor {name!r} of {self.path}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _entries(header: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    """The entry of each name, in the order of the file; ValueError unless they fill it from start to size."""
    entries, end = {}, start
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"tensor {name!r} has the dtype {entry['dtype']!r}, which is not read here")
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
        begin, stop = (start + offset for offset in entry["data_offsets"])
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, stop)):
            raise ValueError(f"tensor {name!r} has the shape {shape} and the offsets {entry['data_offsets']}")
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the place of tensor {name!r} does not fit its shape or its neighbours")
        entries[name], end = (dtype, shape, begin), stop
    if end != size:
        raise ValueError(f"the header describes {end} bytes, the file has {size}")
    return entries


def listing(folder: Path) -> str:
    """What `folder` holds, in a few words for an error message."""
    if not folder.is_dir():
        return "it is a file, not a folder" if folder.exists() else "there is no such folder"
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it holds {', '.join(names[:8])}{more}" if names else "it is empty"
