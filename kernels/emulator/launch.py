"""Launches compiled kernels on NumPy arrays: copies in, runs the blocks, copies out, tells of errors."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import build
from .elf import thread_local_variables

MAX_FRAMES, MAX_REPORTS = 12, 16  # as in runtime.h
SHOWN = 4  # of the reports, in an error's message: one mistake is often seen in many places
ALIGNMENT = 256  # of the memory that CUDA gives


class KernelError(RuntimeError):
    """The emulator found a kernel to be wrong. A line for each of the first findings; `reports` has all."""

    def __init__(self, reports: list[Report]) -> None:
        lines = [str(report) for report in reports[:SHOWN]]
        if len(reports) > SHOWN:
            lines.append(f"... and at {len(reports) - SHOWN} more places, see .reports")
        super().__init__("\n".join(lines))
        self.reports = reports


@dataclass(frozen=True)
class Report:
    """One finding: where the thread stood, what it did, and where the thread it met had been."""

    text: str
    place: str  # "flash_attention.cu:80"
    thread: tuple[int, int, int]
    block: tuple[int, int, int]
    other_place: str = ""

    @property
    def line(self) -> int:
        """The line of the source; 0 if it could not be found."""
        return int(self.place.rpartition(":")[2] or 0) if ":" in self.place else 0

    def __str__(self) -> str:
        where = f" (there: {self.other_place})" if self.other_place else ""
        return f"{self.place}: {self.text}{where}; thread {self.thread} of block {self.block}"


class Counts(ctypes.Structure):
    """What a launch did to memory. A request is one access of a warp, a sector 32 bytes of global memory; a
    conflict is a pass over the 32 banks of shared memory beyond those that the width of the access needs."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "global_read_bytes",
            "global_written_bytes",
            "global_read_requests",
            "global_written_requests",
            "global_read_sectors",
            "global_written_sectors",
            "shared_read_requests",
            "shared_written_requests",
            "shared_read_conflicts",
            "shared_written_conflicts",
        )
    ]

    def __repr__(self) -> str:
        return f"Counts({', '.join(f'{name}={getattr(self, name):,}' for name, _ in self._fields_)})"


class _Region(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("granule", ctypes.c_uint32),
        ("argument", ctypes.c_int16),
        ("constant", ctypes.c_int16),
    ]


class _Variable(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("guard", ctypes.c_int64)]


class _Report(ctypes.Structure):
    _fields_ = [
        ("frames", ctypes.c_uint64 * MAX_FRAMES),
        ("other_frames", ctypes.c_uint64 * MAX_FRAMES),
        ("block", ctypes.c_uint64),
        ("other_block", ctypes.c_uint64),
        ("thread", ctypes.c_int32),
        ("other_thread", ctypes.c_int32),
        ("text", ctypes.c_char * 200),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("invoke", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("dynamic_shared", ctypes.c_void_p),
        ("shared_bytes", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("workers", ctypes.c_int32),
        ("checked", ctypes.c_int32),
        ("regions", ctypes.POINTER(_Region)),
        ("variables", ctypes.POINTER(_Variable)),
        ("region_count", ctypes.c_int32),
        ("variable_count", ctypes.c_int32),
        ("counts", Counts),
        ("reports", ctypes.POINTER(_Report)),
        ("report_count", ctypes.c_int32),
        ("stop", ctypes.c_int32),
    ]


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char),
        ("item", ctypes.c_char),
        ("constant", ctypes.c_bool),
        ("bytes", ctypes.c_int32),
        ("item_bytes", ctypes.c_int32),
    ]


class _Entry(ctypes.Structure):
    _fields_ = [
        ("invoke", ctypes.c_void_p),
        ("dynamic_shared", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("parameters", _Parameter * 64),
    ]


@functools.cache
def _runtime(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.emulator_map.restype = ctypes.c_void_p
    library.emulator_map.argtypes = [ctypes.c_size_t]
    library.emulator_unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.emulator_launch.argtypes = [ctypes.POINTER(_Request)]
    return library


class EmulatedKernel:
    """One kernel as a shared library."""

    def __init__(self, module: Any, name: str) -> None:
        self.name, self.checked, self.limit = name, module.checked, module.shared_limit
        self.path = build.kernel(module.source, name, module.defines, module.checked)
        self._runtime = _runtime(build.runtime())
        self._library = ctypes.CDLL(str(self.path))
        self._entry = _Entry.in_dll(self._library, "emulator_entry")
        variables = [v for v in thread_local_variables(self.path) if v[2] != build.SHARED_CAPACITY]
        # GCC notes beside a variable of a class whether it was made: no memory of the kernel's.
        self._variables = [(offset, size, name.startswith("_ZGV")) for name, offset, size in variables]
        self._static_bytes = sum(size for _, size, guard in self._variables if not guard)
        self._counts: Counts | None = None

    @property
    def counts(self) -> Counts:
        if self._counts is None:
            raise AttributeError("nothing was counted: launch the kernel of a Module(..., checked=True)")
        return self._counts

    def __call__(self, grid: tuple, block: tuple, args: list, shared_bytes: int) -> None:
        self._check_sizes(grid, block, shared_bytes)
        parameters = self._entry.parameters[: self._entry.count]
        if len(args) != len(parameters):
            raise TypeError(f"{self.name} takes {len(parameters)} arguments, not {len(args)}")
        for number, (argument, parameter) in enumerate(zip(args, parameters)):
            _check_argument(f"{self.name}: argument {number}", argument, parameter)
        arrays = [
            (number, argument, bool(parameter.constant))
            for number, (argument, parameter) in enumerate(zip(args, parameters))
            if isinstance(argument, np.ndarray) and argument.size
        ]
        with _Memory(self._runtime, arrays) as memory:
            values = [_value(memory, argument) for argument in args]
            reports = self._launch(grid, block, values, shared_bytes, memory)
            if not reports:
                for _, array, constant in arrays:
                    if not constant:
                        memory.copy_back(array)
        if reports:
            raise KernelError(reports)

    def _check_sizes(self, grid: tuple, block: tuple, shared_bytes: int) -> None:
        threads = block[0] * block[1] * block[2]
        if threads > 1024 or block[2] > 64:
            raise ValueError(f"{self.name}: a block of {block} threads; a card runs 1024, 64 of them deep")
        if grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
            raise ValueError(f"{self.name}: a grid of {grid}; a card takes up to (2^31 - 1, 65535, 65535)")
        if shared_bytes and not self._entry.dynamic_shared:
            raise ValueError(f"{self.name}: shared_bytes={shared_bytes} without extern __shared__ memory")
        static = self._static_bytes
        if static + shared_bytes > self.limit:
            text = (
                f"{static + shared_bytes:,} bytes of shared memory a block, {static:,} static and "
                f"{shared_bytes:,} dynamic; the target card has {self.limit:,}"
            )
            raise KernelError([Report(text, self.name, (0, 0, 0), (0, 0, 0))])

    def _launch(
        self, grid: tuple, block: tuple, values: list, shared_bytes: int, memory: _Memory
    ) -> list[Report]:
        arguments = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(value) for value in values))
        variables = (_Variable * max(len(self._variables), 1))(*self._variables)
        found = (_Report * MAX_REPORTS)()
        blocks = grid[0] * grid[1] * grid[2]
        request = _Request(
            invoke=self._entry.invoke,
            arguments=arguments,
            dynamic_shared=self._entry.dynamic_shared,
            shared_bytes=shared_bytes,
            grid=grid,
            block=block,
            workers=min(blocks, _cores()),
            checked=self.checked,
            regions=memory.regions,
            region_count=len(memory.spans),
            variables=variables,
            variable_count=len(self._variables),
            reports=found,
        )
        self._runtime.emulator_launch(ctypes.byref(request))
        self._counts = request.counts if self.checked else None
        reports = [self._report(entry, grid, block) for entry in found[: request.report_count]]
        # Without a barrier some threads read before the others write: that is the same mistake.
        races = {place for r in reports if "race" in r.text for place in (r.place, r.other_place)}
        return [report for report in reports if report.place not in races or "nobody" not in report.text]

    def _report(self, entry: _Report, grid: tuple, block: tuple) -> Report:
        place = self._place([f for f in entry.frames if f])
        other = self._place([f for f in entry.other_frames if f])
        thread, number = (_unravel(i, size) for i, size in ((entry.thread, block), (entry.block, grid)))
        return Report(entry.text.decode(errors="replace"), place, thread, number, other)

    def _place(self, frames: list[int]) -> str:
        """The line of the kernel's own file, or of the file next to it, that the return addresses lead to."""
        base = _base_address(self._library, self._entry)
        lines = [line for frame in frames for line in _lines(self.path, frame - base - 1)]
        ours = [line for line in lines if re.search(r"\.cuh?:\d+$", line)]
        in_kernel = [line for line in ours if re.search(r"\.cu:\d+$", line)]
        return next(iter(in_kernel or ours), "" if not frames else self.name)


def _unravel(number: int, sizes: tuple) -> tuple[int, int, int]:
    x, y, _ = sizes
    return number % x, number // x % y, number // x // y


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _base_address(library: ctypes.CDLL, entry: _Entry) -> int:
    info = _DlInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_DlInfo)]
    dladdr(ctypes.addressof(entry), ctypes.byref(info))
    return info.base or 0


@functools.cache
def _lines(path: Path, offset: int) -> list[str]:
    """The "file:line" of an address and of the calls it was inlined from, innermost first."""
    if offset < 0:
        return []
    for tool in ("addr2line", "llvm-addr2line"):
        try:
            found = subprocess.run(
                [tool, "-i", "-e", str(path), hex(offset)], capture_output=True, text=True, errors="replace"
            )
        except FileNotFoundError:
            continue
        lines = [line.partition(" (")[0] for line in found.stdout.splitlines()]
        return [re.sub(r"^.*/", "", line) for line in lines]
    return ["install-binutils-for-lines:0"]


def _check_argument(where: str, argument: Any, parameter: _Parameter) -> None:
    """Raises TypeError where C++ would read something else than what Python meant."""
    kind, item = parameter.kind.decode(), parameter.item.decode()
    if argument is None or isinstance(argument, np.ndarray):
        if kind != "p":
            raise TypeError(
                f"{where}: an array or None, where the kernel takes {parameter.bytes} bytes by value"
            )
        if argument is None:
            return
        if not parameter.constant and not argument.flags.writeable:
            raise TypeError(f"{where}: the array is read-only, and the kernel may write it")
        if item not in "vs" and not _matches(argument.dtype, item, parameter.item_bytes):
            takes = f"{_NAMES[item]} of {parameter.item_bytes} bytes"
            raise TypeError(f"{where}: an array of {argument.dtype}, where the kernel takes {takes}")
        return
    if not isinstance(argument, np.generic):
        raise TypeError(f"{where}: {type(argument).__name__}; pass a NumPy scalar such as np.int32(n)")
    if kind == "p":
        raise TypeError(f"{where}: {argument.dtype}, where the kernel takes a pointer")
    fits = argument.dtype.itemsize == parameter.bytes and (kind == "s") == (argument.dtype.kind == "V")
    if not fits or kind != "s" and not _matches(argument.dtype, kind, parameter.bytes):
        given = f"a struct of {argument.dtype.itemsize} bytes" if argument.dtype.names else argument.dtype
        raise TypeError(f"{where}: {given}, where the kernel takes {_NAMES[kind]} of {parameter.bytes} bytes")


_NAMES = {"b": "bool", "i": "integers", "u": "unsigned integers", "f": "floats", "h": "half", "w": "bfloat16"}
_NAMES |= {"s": "a struct"}


def _matches(dtype: np.dtype, kind: str, size: int) -> bool:
    if dtype.itemsize != size:
        return False
    if kind == "w":
        return dtype.name in ("bfloat16", "uint16")
    if kind == "h":
        return dtype.name in ("float16", "uint16")
    return dtype.kind == kind or {dtype.kind, kind} == {"i", "u"}


def _value(memory: _Memory, argument: Any) -> Any:
    """The bytes of an argument, in a buffer."""
    if argument is None or isinstance(argument, np.ndarray):
        return ctypes.c_void_p(None if argument is None else memory.address(argument))
    data = np.asarray(argument).tobytes()
    return ctypes.create_string_buffer(data, len(data))


def _span(array: np.ndarray) -> tuple[int, int]:
    """The addresses of an array's first byte and of the one after its last."""
    return np.lib.array_utils.byte_bounds(array)


class _Memory:
    """Copies of the arrays in memory of their own, as far from Python's as a card's.

    Arrays that overlap stay together. A copy starts where the array starts in what it is a view of, modulo
    the alignment of CUDA's memory: what a card could not read 16 bytes at a time cannot be read so here.
    """

    def __init__(self, runtime: ctypes.CDLL, arrays: list[tuple[int, np.ndarray, bool]]) -> None:
        self._runtime = runtime
        self.spans: list[tuple[int, int, int]] = []  # first and last address, where the copy is
        self._mapped: list[tuple[int, int]] = []
        self._groups: list[tuple[int, int, list]] = []
        for item in sorted(arrays, key=lambda item: _span(item[1])[0]):
            low, high = _span(item[1])
            if self._groups and low < self._groups[-1][1]:
                low, last, members = self._groups.pop()
                self._groups.append((low, max(high, last), [*members, item]))
            else:
                self._groups.append((low, high, [item]))

    def __enter__(self) -> _Memory:
        regions = []
        for low, high, members in self._groups:
            numbers, arrays, constant = zip(*members)
            owner = arrays[0]
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            size = -(-(high - low + 2 * ALIGNMENT) // 4096) * 4096
            begin = self._runtime.emulator_map(size)
            if not begin:
                raise MemoryError(f"no memory for a copy of {high - low:,} bytes")
            self._mapped.append((begin, size))
            shift = (low - _span(owner)[0]) % ALIGNMENT
            copy = (
                begin + (size - (high - low) - shift) // ALIGNMENT * ALIGNMENT + shift
            )  # near the guard page
            self.spans.append((low, high, copy))
            granule = min(array.dtype.itemsize for array in arrays)
            regions.append((copy, high - low, granule, min(numbers), all(constant)))
            for array in arrays:
                self._view(array)[...] = array
        self.regions = (_Region * max(len(regions), 1))(*regions)
        return self

    def __exit__(self, *_: object) -> None:
        for begin, size in self._mapped:
            self._runtime.emulator_unmap(begin, size)

    def address(self, array: np.ndarray) -> int | None:
        """Where the copy of the array's first element is."""
        if not array.size:
            return None
        place = array.__array_interface__["data"][0]
        low, _, copy = next(span for span in self.spans if span[0] <= place < span[1])
        return place - low + copy

    def _view(self, array: np.ndarray) -> np.ndarray:
        """The copy of the array, as an array."""
        low, high, copy = next(s for s in self.spans if s[0] <= _span(array)[0] < s[1])
        everything = (ctypes.c_char * (high - low)).from_address(copy)
        offset = array.__array_interface__["data"][0] - low
        return np.ndarray(array.shape, array.dtype, everything, offset, array.strides)

    def copy_back(self, array: np.ndarray) -> None:
        array[...] = self._view(array)
