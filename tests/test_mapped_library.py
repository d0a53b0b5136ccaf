"""Pages of a library's constants are given back after the virtual machine has copied them, and nothing else is."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from tvm_hquant.mapped_library import release_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is known on Linux")
SIZE = 64 * mmap.PAGESIZE


def resident(path: Path) -> int:
    """Bytes of a file's mappings that are in memory."""
    total, is_own = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            is_own = line.endswith(str(path.resolve()))
        elif is_own and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_unchanged_pages_are_dropped_and_read_again(tmp_path: Path) -> None:
    """The memory goes down, and the contents are those of the file whenever they are read."""
    path, contents = tmp_path / "library.so", bytes(range(256)) * (SIZE // 256)
    path.write_bytes(contents)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        assert bytes(mapped) == contents
        assert resident(path) == SIZE
        assert release_pages(path) == SIZE
        assert resident(path) == 0
        assert bytes(mapped) == contents


def test_changed_pages_stay(tmp_path: Path) -> None:
    """What the loader writes into a read-only segment, such as addresses, stands in no file and must not be dropped."""
    path = tmp_path / "library.so"
    path.write_bytes(bytes(SIZE))
    both = mmap.PROT_READ | mmap.PROT_WRITE
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, both) as mapped:
        mapped[100:107] = b"address"
        view = ctypes.c_char.from_buffer(mapped)
        protect = ctypes.CDLL(None).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert protect(ctypes.addressof(view), SIZE, mmap.PROT_READ) == 0
        assert release_pages(path) == 0
        assert mapped[100:107] == b"address"
        del view
