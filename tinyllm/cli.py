"""What the example scripts share: one look, and errors that are one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autograd.backend import DeviceError, device_module
from tinyllm.errors import InputError
from tinyllm.files import disk_errors
from tinyllm.model import CausalModel
from tinyllm.tokenizers import Tokenizer
from tinyllm.training import Diverged, Interrupted, Progress


def run(main: Callable[[], None]) -> None:
    """Run a script. Unusable input ends it with one line and exit code 2, Ctrl-C with 130."""
    # A log file shows each line at once, and a character that it cannot spell ends no run.
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        main()
    except (InputError, DeviceError) as error:
        sys.exit(_fail(str(error), 2))
    except MemoryError as error:
        sys.exit(_fail(f"there is not enough memory: {error or 'choose smaller numbers'}", 2))
    except Diverged as error:
        sys.exit(_fail(str(error), 1))
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"\nstopped{': ' if str(stop) else ''}{stop}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def script(name: str, *words: Any) -> str:
    """The command that runs an example with this Python, for the user to copy; words quoted as need be."""
    python, here = Path(sys.executable), Path.cwd()
    python = python.relative_to(here) if python.is_relative_to(here) else python
    return shlex.join(map(str, (python, f"examples/{name}.py", *words)))


def parser(text: str) -> argparse.ArgumentParser:
    """A parser whose --help shows the script's own docstring as it stands."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def options(parser: argparse.ArgumentParser, *, out: str, steps: int, data: bool = True) -> None:
    """The options that every example has: --data, --steps, --seed, --device and --out.

    data False: for an example that makes its data itself.
    """
    add = parser.add_argument
    if data:
        add("--data", type=path, help="a UTF-8 text file, a folder, or a .gz (default: Python's own docs)")
    add("--steps", type=number(), default=steps, help=f"steps of the optimizer (default: {steps})")
    add("--seed", type=number(int, 0), default=0, help="of weights, batches and sampling (default: 0)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (default: cpu)")
    add("--out", type=path, default=Path(out), help=f"folder for what it makes (default: {out})")


def start(args: argparse.Namespace) -> None:
    """Before any work: is there the --device, and can there be the folder --out?

    Raises:
        DeviceError, InputError: there is not, or cannot.
    """
    device_module(args.device)
    with disk_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)


def path(text: str) -> Path:
    """A path given on the command line, ~ understood."""
    return Path(text).expanduser()


def number(kind: type = int, least: float = 1) -> Callable[[str], float]:
    """An argparse type: a number of `least` or more."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value >= least or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number of {least} or more")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def quoted(text: str) -> str:
    """The text with a mark before each line, to tell what a model writes from what a script says."""
    return textwrap.indent(text, "   | ", lambda line: True)


def sample(model: CausalModel, tokenizer: Tokenizer, prompt: Sequence[int], length: int, seed: int) -> str:
    """The prompt and up to `length` tokens that the model writes after it, as many as it can read; quoted."""
    new = min(length, model.context - len(prompt))
    (ids,) = model.generate([prompt], new, temperature=0.8, top_k=50, seed=seed)
    return quoted(tokenizer.decode(ids))


def losses(progress: Progress) -> str:
    """A table of both losses at each evaluation, that of training the mean of the 50 steps before it."""
    lines = ["  step   training   validation loss"]
    for step, nats in progress.validation:
        recent = progress.losses[max(step - 50, 0) : step]
        lines.append(f"{step:6,}{f'{np.mean(recent):.3f}' if recent else '':>11s}{nats:11.3f}")
    return "\n".join(lines)
