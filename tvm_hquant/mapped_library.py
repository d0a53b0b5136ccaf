"""Gives back the memory of a loaded library whose constants were copied. It imports nothing but the standard library.

TVM's virtual machine keeps its constants in memory of its own, made when it is created from the library's read-only data. The
pages that were read for that stay mapped, so that a process would hold all weights twice.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_DONT_NEED = 4
"""``MADV_DONTNEED`` of Linux: pages of an unchanged file are read again when they are needed."""


def release_pages(library: Path) -> int:
    """Drops the read-only pages of a loaded library that hold nothing but what stands in its file.

    Returns:
        How many bytes were mapped there; 0 where the system does not tell (``/proc`` is Linux's).
    """
    try:
        text = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    name, released = os.path.realpath(library), 0
    start = end = 0
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 5 and "-" in fields[0] and not fields[0].endswith(":"):
            # start-end permissions offset device inode path
            is_data = line.endswith(name) and fields[1] == "r--p"
            start, end = (int(address, 16) for address in fields[0].split("-")) if is_data else (0, 0)
        elif fields[:1] == ["Anonymous:"] and end > start:
            # What the loader has changed, such as addresses, is in no file.
            if int(fields[1]) == 0 and _advise(start, end - start):
                released += end - start
            start = end = 0
    return released


def _advise(start: int, length: int) -> bool:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return int(madvise(start, length, _DONT_NEED)) == 0
