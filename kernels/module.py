"""A .cu file as a module of kernels, compiled for the GPU by NVRTC or for the CPU by the emulator.

    module = Module("kernels/vector_add.cu", backend="emulator")
    module.kernel("vector_add")(blocks, threads, [a, b, out, np.int32(n)])

The same text goes to both compilers, and each kernel is compiled when it is first asked for.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .emulator.build import EmulatorUnavailable
from .emulator.launch import Counts, EmulatedKernel, KernelError, Report

__all__ = ["Counts", "EmulatorUnavailable", "KernelError", "Module", "Report"]

SHARED_LIMIT = 99 * 1024  # bytes a block may ask for on sm_86, an RTX 3080

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"[^\n]*$', re.MULTILINE)
_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once\b[^\n]*$", re.MULTILINE)


class Module:
    """The kernels of one .cu file.

    path: the file. defines: macros, {"D": 64}. backend: "emulator" takes NumPy arrays, "cuda" CuPy arrays.
    checked: (emulator) watch every load and store, and raise KernelError where one is wrong.
    shared_limit: (emulator) the bytes of shared memory that a block may have on the target card.

    Raises:
        EmulatorUnavailable: when a kernel is asked for, and there is no C++ compiler or the source does not
            compile; one line.
        ValueError: an unknown backend; checked on a card.
    """

    def __init__(
        self,
        path: str | Path,
        defines: dict[str, Any] | None = None,
        *,
        backend: str,
        checked: bool = False,
        shared_limit: int = SHARED_LIMIT,
    ) -> None:
        if backend not in ("emulator", "cuda"):
            raise ValueError(f"unknown backend {backend!r}: use 'emulator' or 'cuda'")
        if checked and backend == "cuda":
            raise ValueError("the checks are the emulator's: use backend='emulator'")
        self.path, self.backend, self.checked, self.shared_limit = Path(path), backend, checked, shared_limit
        self.defines = dict(defines or {})
        self._kernels: dict[str, Kernel] = {}

    @cached_property
    def source(self) -> str:
        """The text with the files beside it that it includes put in their places, as compilers see it."""
        return inlined(self.path)

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name, or of that C++ expression: "forward<float, 64, true>"."""
        if name not in self._kernels:
            make = EmulatedKernel if self.backend == "emulator" else _CudaKernel
            self._kernels[name] = Kernel(make(self, name))
        return self._kernels[name]


class Kernel:
    """One kernel, to be called with a grid, a block and its arguments."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """Launch a grid of blocks of threads, each block with shared_bytes of extern __shared__ memory.

        args: arrays (their pointer is passed, whatever their strides), None (a null pointer), NumPy scalars
        of the parameter's own type, a structured scalar for a struct.

        Raises:
            TypeError: an argument that is not what the kernel takes.
            ValueError: sizes that no card can launch.
            KernelError: the emulator found the kernel to be wrong.
        """
        self._compiled(_triple(grid, "grid"), _triple(block, "block"), list(args), shared_bytes)

    @property
    def counts(self) -> Counts:
        """What the last launch read and wrote. Only a checked emulator counts."""
        return self._compiled.counts


def inlined(path: str | Path, seen: set[Path] | None = None) -> str:
    """A source with each `#include "file"` beside it replaced by that file's text, once.

    CuPy's cache does not look into included files, and NVRTC knows no folder to find them in. `#line` keeps
    the places of messages right.
    """
    path, seen = Path(path).resolve(), set() if seen is None else seen
    seen.add(path)
    text = _ONCE.sub("", path.read_text(encoding="utf-8"))

    def put(found: re.Match) -> str:
        other = (path.parent / found[1]).resolve()
        line = text.count("\n", 0, found.start()) + 2
        inside = "" if other in seen else inlined(other, seen)
        return f'{inside}\n#line {line} "{path.name}"' if inside else ""

    return f'#line 1 "{path.name}"\n{_INCLUDE.sub(put, text)}'


def _triple(size: int | Sequence[int], what: str) -> tuple[int, int, int]:
    sizes = tuple(int(n) for n in (size if isinstance(size, Sequence) else (size,)))
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"{what} {size}: one to three sizes, each at least 1")
    return (*sizes, 1, 1)[:3]


class _CudaKernel:
    """A kernel compiled by NVRTC, through CuPy."""

    def __init__(self, module: Module, name: str) -> None:
        import cupy

        options = nvrtc_options(module.defines)
        self._module = cupy.RawModule(code=module.source, options=options, name_expressions=(name,))
        try:
            self._function = self._module.get_function(name)
        except cupy.cuda.compiler.CompileException as error:
            if "open source file" not in str(error):  # NVRTC: "cannot" or "could not"
                raise
            raise RuntimeError(
                f"{module.path.name} needs CUDA's headers, and CuPy finds none: pip install "
                "nvidia-cuda-runtime-cu12 (for CUDA 13: nvidia-cuda-runtime), or set CUDA_PATH to a toolkit"
            ) from None

    def __call__(self, grid: tuple, block: tuple, args: list, shared_bytes: int) -> None:
        if shared_bytes > 48 * 1024:  # beyond that a kernel must ask
            self._function.max_dynamic_shared_size_bytes = shared_bytes
        self._function(grid, block, tuple(map(_by_value, args)), shared_mem=shared_bytes)

    @property
    def counts(self) -> Counts:
        raise AttributeError("a card does not count: use Module(..., backend='emulator', checked=True)")


def nvrtc_options(defines: dict[str, Any]) -> tuple[str, ...]:
    """What NVRTC is told; CuPy adds the card and options of its own."""
    macros = (f"-D{key}={value}" for key, value in defines.items())
    return ("-std=c++17", *macros, *(f"-I{folder}" for folder in header_folders()))


def header_folders() -> list[Path]:
    """Where the wheels nvidia-cuda-runtime-cu12 and nvidia-cuda-runtime (13) put CUDA's headers; CuPy itself
    finds those of a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    folders = [root / part / "include" for root in roots for part in ("cu13", "cuda_runtime")]
    return [folder for folder in folders if (folder / "cuda_fp16.h").exists()]


def _by_value(argument: Any) -> Any:
    """As CuPy wants it: a null pointer as a number, a struct as an array of one."""
    if argument is None:
        return np.uintp(0)
    return np.array([argument]) if isinstance(argument, np.void) else argument
