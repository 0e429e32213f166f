"""What kernels/module.py asks of CuPy, seen by a CuPy that only writes down."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kernels.flash_attention import _PROBLEM, SOURCE, _Call
from kernels.module import Module


class CompileException(Exception):
    pass


class Function:
    """A kernel: its launches, and what it was allowed to take of shared memory."""

    max_dynamic_shared_size_bytes = None

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int) -> None:
        self.launches.append((grid, block, args, shared_mem))


@pytest.fixture
def cupy(monkeypatch):
    """A module cupy with RawModule: `.made` keeps its arguments, `.log` is what the compiler complains of."""
    module = ModuleType("cupy")
    module.made, module.log, module.function = [], None, Function()
    module.cuda = SimpleNamespace(compiler=SimpleNamespace(CompileException=CompileException))

    class RawModule:
        def __init__(self, **arguments: Any) -> None:
            module.made.append(arguments)

        def get_function(self, name: str) -> Function:
            if module.log:
                raise CompileException(module.log)
            return module.function

    module.RawModule = RawModule
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_compile_and_launch(cupy, monkeypatch):
    monkeypatch.setattr("kernels.module.header_folders", lambda: ["/headers"])
    module = Module(SOURCE, {"D": 64}, backend="cuda")
    kernel = module.kernel("forward<float, 64, 64, 32>")
    assert cupy.made == [
        {
            "code": module.source,
            "options": ("-std=c++17", "-DD=64", "-I/headers"),
            "name_expressions": ("forward<float, 64, 64, 32>",),
        }
    ]
    array, struct = np.zeros(3), np.zeros((), [("n", "i4")])[()]
    kernel(5, (32, 2), [array, None, np.int32(7), struct], shared_bytes=48 * 1024)
    assert cupy.function.max_dynamic_shared_size_bytes is None  # any kernel may have as much
    ((grid, block, args, shared_bytes),) = cupy.function.launches
    assert (grid, block, shared_bytes) == ((5, 1, 1), (32, 2, 1), 48 * 1024)
    assert args[0] is array and args[1:3] == (0, 7)
    assert isinstance(args[1], np.uintp) and args[3].shape == (1,) and args[3].dtype == struct.dtype
    kernel(1, 32, [], shared_bytes=48 * 1024 + 256)
    assert cupy.function.max_dynamic_shared_size_bytes == 48 * 1024 + 256
    assert module.kernel("forward<float, 64, 64, 32>") is kernel and len(cupy.made) == 1


@pytest.mark.parametrize("words", ["cannot open", "could not open"])
def test_no_headers_of_cuda(cupy, words):
    cupy.log = f'flash_attention.cu(9): catastrophic error: {words} source file "cuda_bf16.h"'
    with pytest.raises(RuntimeError, match=r"flash_attention.cu needs CUDA's headers.*pip install"):
        Module(SOURCE, backend="cuda").kernel("forward")


def test_other_errors_of_the_compiler_are_left_as_they_are(cupy):
    cupy.log = "error: expected a ;"
    with pytest.raises(CompileException, match="expected a ;"):
        Module(SOURCE, backend="cuda").kernel("forward")


def test_too_little_shared_memory_says_the_way_out(monkeypatch):
    limit = lambda device: 64 * 1024
    monkeypatch.setitem(_Call.launch.__globals__, "_shared_limit", limit)
    card = SimpleNamespace(cuda=SimpleNamespace(Device=lambda: SimpleNamespace(id=0)))
    call = SimpleNamespace(problem=np.zeros((), _PROBLEM), dtype=np.dtype("f4"), width=128, xp=card)
    with pytest.raises(RuntimeError, match=r"98304 bytes of shared memory.*: F.use_flash\(False\)"):
        _Call.launch(call, "forward", 1, [])
