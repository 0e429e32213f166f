"""Running the example scripts as a user does, in processes of their own, and quickly, in this one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from tinyllm import checkpoints
from tinyllm.files import read_arrays, read_json

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
ENVIRONMENT |= {
    "PYTHONPATH": str(ROOT),
    "PYTHONUTF8": "1",
    "HF_HUB_OFFLINE": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
POSIX = os.name == "posix"
LAPTOP_RUN = ["--steps", 24, "--batch", 4, "--context", 16]  # of the fixture laptop_run


class Result(NamedTuple):
    code: int
    out: str
    err: str


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / f"{script}.py"), *map(str, arguments)]


def launch(script: str, *arguments: object, cwd: Path, **settings: object) -> subprocess.Popen:
    """Start an example in the folder `cwd`, both its streams in pipes of bytes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT}
    return subprocess.Popen(command(script, *arguments), cwd=cwd, **{**pipes, **settings})


def finish(process: subprocess.Popen) -> Result:
    streams = process.communicate(timeout=120)
    out, err = (stream.decode("utf-8").replace(os.linesep, "\n") for stream in streams)
    return Result(process.returncode, out, err)


def run(script: str, *arguments: object, cwd: Path, **settings: object) -> Result:
    return finish(launch(script, *arguments, cwd=cwd, **settings))


def load(script: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{script}", ROOT / "examples" / f"{script}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder and what they hold; {} where there is none."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def losses(out: Path) -> list[float]:
    return read_arrays(checkpoints.latest(out) / "optimizer.safetensors")["losses"].tolist()


def training(out: Path) -> dict:
    return read_json(checkpoints.latest(out) / "training.json")


def same_run(out: Path, reference: Path) -> None:
    """Assert that two runs ended in the same: each loss, and every bit of weights, optimizer and records."""
    assert losses(out) == losses(reference)
    assert np.isfinite(losses(out)).all()
    ours, theirs = checkpoints.latest(out), checkpoints.latest(reference)
    assert ours.name == theirs.name
    checkpoints.verify(ours)
    assert files(ours) == files(theirs)


def refused(result: Result, *said: object) -> str:
    """Assert that bad input ended in one clear line with these words, and exit code 2; returns the line."""
    assert result.code == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for words in said:
        assert str(words) in lines[0], (words, lines[0])
    return lines[0]


def check_help(script: Callable[..., Result], module: ModuleType, *options: str) -> None:
    """Assert that --help shows what the example says of itself, its options and those of all examples."""
    code, out, err = script("--help")
    assert code == 0 and not err and module.__doc__.strip() in out
    for option in ("--data", "--steps", "--seed", "--device", "--out", *options):
        assert f"  {option} " in out


def check_bad_paths(script: Callable[..., Result], book: Path, folder: Path) -> None:
    """Assert that no text to read, and a file in the place of the folder to write to, are refused."""
    refused(script("--data", folder / "absent.txt", "--out", folder), "absent.txt does not exist")
    (folder / "file").write_text("in the way", encoding="utf-8")
    refused(script("--data", book, "--steps", 1, "--out", folder / "file"), folder / "file")
