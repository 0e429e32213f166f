"""Reads which thread-local variables a shared library (ELF, 64 bits) has: a kernel's __shared__ ones."""

from __future__ import annotations

import struct
from pathlib import Path

_SYMTAB, _TLS = 2, 6  # section type; symbol type


def thread_local_variables(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset in the thread-local block, bytes) of each; none if the file is no 64-bit ELF."""
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        return []
    order = "<" if data[5] == 1 else ">"
    (table,) = struct.unpack_from(order + "Q", data, 40)
    entry_size, count = struct.unpack_from(order + "HH", data, 58)
    sections = [struct.unpack_from(order + "IIQQQQIIQQ", data, table + i * entry_size) for i in range(count)]
    found = set()
    for _, kind, _, _, offset, size, link, _, _, each in sections:
        names = sections[link][4]
        for at in range(offset, offset + size, each) if kind == _SYMTAB else ():
            name, info, _, section, value, length = struct.unpack_from(order + "IBBHQQ", data, at)
            if info & 15 == _TLS and section and length:
                start = names + name
                found.add((data[start : data.index(0, start)].decode(), value, length))
    return sorted(found)
