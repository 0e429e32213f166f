"""What the tests of the emulator share.

Importing this skips where no C++ compiler is, `checks()` where the checks cannot be had.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kernels.emulator.build import EmulatorUnavailable, compiler
from kernels.module import Kernel, Module

try:
    compiler()
except EmulatorUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


def checks() -> None:
    """Skip the rest of a test file where the compiler is not one for the checked build."""
    try:
        compiler(checked=True)
    except EmulatorUnavailable as error:
        pytest.skip(str(error), allow_module_level=True)


def kernel(folder: Path, text: str, name: str = "test", **options: Any) -> Kernel:
    """The kernel of that name in a source of this text, written to test.cu."""
    path = folder / "test.cu"
    path.write_text(text, encoding="utf-8")
    return Module(path, backend="emulator", **options).kernel(name)
