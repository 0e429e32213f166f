"""Checkpoints: what a training run has learned, safe from kill -9, a full disk and flipped bits.

`out/` holds folders `step-00000500/`, each complete in itself. What a folder is, its name alone says, because
renaming a folder is atomic:

    step-00000500            complete
    step-00000500.old        complete, and about to be replaced by a new save of the same step
    step-00000500.partial    being written
    step-00000500.deleted    being deleted
"""

import os
import re
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tinyllm.errors import InputError
from tinyllm.files import (
    disk_errors,
    listing,
    read_arrays,
    read_json,
    sync,
    sync_folder,
    write_arrays,
    write_json,
)

__all__ = ["save", "latest", "resolve", "verify", "write_arrays", "read_arrays", "write_json", "read_json"]

CHECKSUMS = "checksums.json"


def save(out: str | Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Let write(folder) fill a folder, and make it `out`/step-<step>; delete all but `keep` up to this step.

    Killed at any moment, `out` still holds the checkpoints it had, or the new one. Only one process may
    save into `out` at a time. Raises InputError if the disk refuses; the earlier checkpoints stay.
    """
    out = Path(out)
    final = out / f"step-{step:08d}"
    partial, old = final.with_name(final.name + ".partial"), final.with_name(final.name + ".old")
    with disk_errors(final):
        out.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        try:
            partial.mkdir()
            write(partial)
            write_json(partial / CHECKSUMS, _checksums(partial))
            for path in [*partial.rglob("*"), partial]:
                sync_folder(path) if path.is_dir() else sync(path)
            if final.exists():
                os.replace(final, old)
            os.replace(partial, final)
            sync_folder(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    earlier = [folder for (at, _), folder in _complete(out) if at < step]
    for folder in earlier[: max(0, len(earlier) - (keep - 1))]:
        _delete(folder)
    _sweep(out)
    return final


def latest(out: str | Path) -> Path | None:
    """The newest complete checkpoint in `out`, or None."""
    complete = _complete(Path(out))
    return complete[-1][1] if complete else None


def resolve(folder: str | Path) -> Path:
    """`folder` itself if it holds a config.json, else the newest checkpoint in it, else InputError."""
    folder = Path(folder)
    found = folder if (folder / "config.json").is_file() else latest(folder)
    if found is None:
        raise InputError(f"{folder} is not a checkpoint: expected config.json or step-..., {listing(folder)}")
    return found


def verify(folder: str | Path) -> None:
    """Raise InputError if a file in `folder` is not as it was saved; without checksums (published) all pass.

    The checksum is CRC-32: it notices every error within 32 neighbouring bits and all but one in 4e9 of the
    others. BLAKE2 would take four times as long, for protection against forgers whom we do not face here.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS).is_file():
        return
    try:
        found = _checksums(folder)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    for name, checksum in read_json(folder / CHECKSUMS).items():
        if found.get(name) != checksum:
            wrong = "is damaged, its checksum differs" if name in found else "is missing"
            raise InputError(f"{folder / name} {wrong}; delete {folder} to use the checkpoint before it")


def _complete(out: Path) -> list[tuple[tuple[int, bool], Path]]:
    """All complete checkpoints in `out`, oldest first; of one step, the one being replaced first."""
    found = []
    for folder in out.iterdir() if out.is_dir() else ():
        name = re.fullmatch(r"step-(\d{8,})(\.old)?", folder.name)
        if name and folder.is_dir():
            found.append(((int(name[1]), name[2] is None), folder))
    return sorted(found)


def _checksums(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): _crc32(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / CHECKSUMS
    }


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _sweep(out: Path) -> None:
    """Remove what a killed save left, and every .old whose successor is in place."""
    for folder in out.iterdir():
        if not re.fullmatch(r"step-\d{8,}(\.old)?(\.partial|\.deleted)?", folder.name):
            continue
        if folder.suffix == ".old" and folder.with_suffix("").is_dir():
            _delete(folder)
        elif folder.suffix in (".partial", ".deleted"):
            shutil.rmtree(folder, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Take the name of a checkpoint from `folder` first: half deleted, it must not look complete."""
    deleted = folder.with_name(folder.name + ".deleted")
    with suppress(OSError):  # a file in it that is open elsewhere: the next save tries again
        os.replace(folder, deleted)
        shutil.rmtree(deleted)
