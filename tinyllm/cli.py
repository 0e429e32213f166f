"""What the example scripts share: one look, and errors that are one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from autograd.backend import DeviceError
from tinyllm.errors import InputError
from tinyllm.training import Diverged, Interrupted


def run(main: Callable[[], None]) -> None:
    """Run a script. Unusable input ends it with one line and exit code 2, Ctrl-C with 130."""
    # A log file shows each line at once, and a character that it cannot spell ends no run.
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        main()
    except (InputError, DeviceError) as error:
        sys.exit(_fail(str(error), 2))
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


def script(name: str) -> str:
    """The command that runs an example with this Python, for the user to copy."""
    python, here = Path(sys.executable), Path.cwd()
    python = python.relative_to(here) if python.is_relative_to(here) else python
    return f"{shlex.quote(str(python))} examples/{name}.py"


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
