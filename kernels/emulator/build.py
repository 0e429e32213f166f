"""Compiles the emulator and the kernels with the C++ compiler of this machine, into a cache.

What is built is named by a hash of all that shapes it: sources, headers, flags, and what the compiler says of
itself and of this processor. It is built aside and renamed into place, so any number of processes may build.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = [HERE / name for name in ("emulator.h", "small_floats.h", "entry.h")]
RUNTIME = [HERE / name for name in ("runtime.cpp", "warp.cpp", "checker.cpp")]
RUNTIME_HEADERS = [HERE / name for name in ("runtime.h", "context.h")]

# Pointers cast as kernels do; a * b + c fused, as on a card; return addresses that lead back to lines.
FLAGS = ["-std=gnu++17", "-fPIC", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-ffp-contract=fast", "-fno-omit-frame-pointer", "-g1", "-gdwarf-4", "-w", "-fno-exceptions"]
FLAGS += ["-fno-optimize-sibling-calls"]
# A call before each load and store as the kernel wrote them: not split into parts, not merged with others.
CHECKED_FLAGS = ["-fsanitize=thread", "-DEMULATOR_CHECKED", "-fno-tree-sra", "-fno-tree-vectorize"]
CHECKED_FLAGS += ["-fno-tree-slp-vectorize", "-fno-store-merging", "-fno-tree-loop-distribute-patterns"]

Lines = list[list[str]]


class EmulatorUnavailable(RuntimeError):
    """The emulator cannot run here; one line says why, and the way out."""


def compiler(checked: bool = False) -> list[str]:
    """The command of the C++ compiler: $CXX, g++ or clang++. checked: that of the checked build.

    Raises:
        EmulatorUnavailable: there is none; for the checked build, it is not GCC on Linux.
    """
    command = _compiler()
    if checked and (sys.platform != "linux" or "__clang__" in _target(tuple(command))[1]):
        raise EmulatorUnavailable(
            "the emulator's checks need GCC on Linux (clang takes wide loads apart): install g++, or set CXX"
        )
    return command


def _compiler() -> list[str]:
    if sys.platform == "win32":
        raise EmulatorUnavailable("the CUDA emulator needs Linux or macOS: on Windows, use WSL")
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise EmulatorUnavailable(f"no C++ compiler: CXX is {chosen[0]!r}, and there is no such command")
        return chosen
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise EmulatorUnavailable("no C++ compiler found for the CUDA emulator: install g++, or set CXX to one")


@functools.cache
def _target(command: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The flags for this processor, and all that the compiler then defines: its version, the instructions."""
    for native in (("-march=native",), ("-mcpu=native",), ()):
        probe = [*command, *native, "-dM", "-E", "-x", "c++", os.devnull]
        found = subprocess.run(probe, capture_output=True, text=True, errors="replace")
        if found.returncode == 0:
            return native, found.stdout
    raise EmulatorUnavailable(f"the C++ compiler {shlex.join(command)} fails: {_first_error(found.stderr)}")


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME, or the platform's place for such things."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    folder = base / "tinyllm-emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _folder_of_this_process()


@functools.cache
def _folder_of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="tinyllm-emulator-"))


def _build(name: str, key: list[str], sources: dict[str, str], flags: list[str], lines: Lines) -> Path:
    """The shared library `name`-HASH of sources {file: text}; built if it is not there.

    lines: the flags of each call of the compiler, and the files it takes; the last call makes the library.
    """
    command = compiler()
    native, target = _target(tuple(command))
    parts = [*command, *native, target, *key, *flags, *sources.values(), *(x for line in lines for x in line)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = cache_folder() / f"{name}-{digest}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        for file, text in sources.items():
            Path(folder, file).write_text(text, encoding="utf-8")
        made = Path(folder, library.name)
        for i, line in enumerate(lines):
            output = ["-shared", "-o", str(made)] if i + 1 == len(lines) else ["-c"]
            call = [*command, *native, *flags, "-I", str(HERE), *line, *output]
            done = subprocess.run(call, capture_output=True, text=True, errors="replace", cwd=folder)
            if done.returncode:
                raise EmulatorUnavailable(f"the C++ compiler refuses {name}: {_first_error(done.stderr)}")
        os.replace(made, library)
    return library


def _first_error(text: str) -> str:
    """The first line of a compiler's messages that names an error."""
    lines = text.strip().splitlines() or ["it says nothing"]
    found = next((line for line in lines if re.search(r"\berror\b|undefined reference", line)), lines[-1])
    return re.sub(r"^\S*/", "", found.strip())


def runtime() -> Path:
    """The library that runs blocks and threads."""
    key = [path.read_text(encoding="utf-8") for path in (*HEADERS, *RUNTIME_HEADERS)]
    sources = {path.name: path.read_text(encoding="utf-8") for path in RUNTIME}
    return _build("runtime", key, sources, [*FLAGS, "-O3", "-pthread"], [[*sources]])


# Ends every kernel's source: its signature, and a call with arguments by their addresses.
_FOOTER = """
#line 1 "launch.cpp"
#include "entry.h"
extern "C" __attribute__((visibility("default"))) emulator::Entry emulator_entry;
emulator::Entry emulator_entry = emulator::Call<&{name}>::entry({shared});
"""
_EXTERN_SHARED = re.compile(r"\bextern\s+__shared__\s+[^;]*?(\w+)\s*\[\s*\]\s*;")
SHARED_CAPACITY = 227 * 1024  # what the largest cards so far have


def kernel(source: str, name: str, defines: dict[str, object], checked: bool) -> Path:
    """The library of one kernel of a source whose includes are inlined."""
    compiler(checked)
    shared = {found[1] for found in _EXTERN_SHARED.finditer(source)}
    if len(shared) > 1:
        raise EmulatorUnavailable(f"extern __shared__ memory has several names, {sorted(shared)}: use one")
    symbol = next(iter(shared), None)
    source = re.sub(r"\bextern(\s+)__shared__", r"extern\1__extern_shared__", source)
    call = _FOOTER.format(name=name, shared="emulator_dynamic_shared" if symbol else "nullptr")
    sources = {"kernel.cpp": f'#include "emulator.h"\n{source}{call}', "shared.cpp": ""}
    if symbol:  # thread-local: a block runs on one OS thread
        sources["shared.cpp"] = (
            f'extern "C" {{ alignas(1024) __thread unsigned char {symbol}[{SHARED_CAPACITY}];\n'
            f"void* emulator_dynamic_shared() {{ return {symbol}; }} }}\n"
        )
    flags = [*FLAGS, "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections"]
    if "__clang__" not in _target(tuple(compiler()))[1]:
        flags += ["-fno-gnu-unique"]
    made = ["-O2", *(f"-D{key}={value}" for key, value in defines.items()), "kernel.cpp"]
    unused_goes = "-Wl,-dead_strip" if sys.platform == "darwin" else "-Wl,--gc-sections"
    linked = ["shared.cpp", str(runtime()), unused_goes]
    lines = [[*made, *linked]]
    if checked:
        lines = [[*CHECKED_FLAGS, *made], ["kernel.o", *linked]]
    key = [path.read_text(encoding="utf-8") for path in HEADERS]
    return _build(re.sub(r"\W+", "_", name).strip("_")[:40], key, sources, flags, lines)
