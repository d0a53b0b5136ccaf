"""Kernels that were compiled once, on disk: a second search, or the search after the last edit, compiles what is new.

A kernel is found by what it is compiled from: a hash of its IR, its symbol (which names the request), the target, the versions
of TVM and LLVM, and the passes between IR and LLVM. So nothing stale is ever found, and nothing has to be declared invalid.
Libraries lie in an SQLite file, as they were compiled, several kernels in each; whichever has not been used for longest makes
room for new ones.

``HQUANT_KERNEL_CACHE`` names the folder of the file, in place of the user's cache folder; ``off`` turns the cache off.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
import tvm
import tvm_ffi

from tvm_hquant.cpu_pipeline import cpu_pipeline
from tvm_hquant.kernels.interface import Kernel
from tvm_hquant.relax_ir.kernel_calls import kernel_symbol
from tvm_hquant.simulator.kernel_library import Library

VARIABLE = "HQUANT_KERNEL_CACHE"
OFF = "off"
LIMIT = 512 * 2**20
"""Bytes of all libraries together."""

_FILE = "kernels.sqlite"
_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS libraries (digest TEXT PRIMARY KEY, content BLOB NOT NULL, bytes INTEGER, used REAL)",
    "CREATE TABLE IF NOT EXISTS kernels (key TEXT PRIMARY KEY, library TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS kernels_of_libraries ON kernels (library)",
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class KernelCache:
    """Libraries of kernels in a file. Safe for several processes at once.

    A file that cannot be used is left alone with a warning: nothing is found in it and nothing kept.

    Attributes:
        path: of the file; it is made when something is to be kept.
        limit: bytes that all libraries may have together.
    """

    path: Path
    limit: int = LIMIT

    def find(self, symbols: Mapping[str, str]) -> tuple[Library, ...]:
        """Libraries with as many of the wanted kernels as are known, each kernel in one of them.

        Args:
            symbols: by the key of each kernel (:func:`kernel_key`).
        """
        return self._attempt(lambda: self._find(symbols), ())

    def add(self, library: Library, keys: Mapping[str, str]) -> None:
        """Keeps a library. ``keys`` are those of its kernels, by symbol."""
        self._attempt(lambda: self._add(library, keys), None)

    def _find(self, symbols: Mapping[str, str]) -> tuple[Library, ...]:
        if not self.path.exists():
            return ()
        found: list[Library] = []
        with self._database() as database:
            wanted: dict[str, list[str]] = {}
            for key, symbol in symbols.items():
                for (digest,) in database.execute("SELECT library FROM kernels WHERE key = ?", (key,)):
                    wanted.setdefault(digest, []).append(symbol)
            for digest, own in wanted.items():
                for (content,) in database.execute("SELECT content FROM libraries WHERE digest = ?", (digest,)):
                    if _digest(content) == digest:
                        found.append(Library(content, tuple(own)))
            rows = [(time.time(), digest) for digest in wanted]
            database.executemany("UPDATE libraries SET used = ? WHERE digest = ?", rows)
        return tuple(found)

    def _add(self, library: Library, keys: Mapping[str, str]) -> None:
        if len(library.content) > self.limit:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        digest, size = _digest(library.content), len(library.content)
        with self._database() as database:
            database.execute(
                "INSERT OR REPLACE INTO libraries VALUES (?, ?, ?, ?)", (digest, library.content, size, time.time())
            )
            rows = [(keys[symbol], digest) for symbol in library.symbols]
            database.executemany("INSERT OR REPLACE INTO kernels VALUES (?, ?)", rows)
            total = database.execute("SELECT SUM(bytes) FROM libraries").fetchone()[0]
            oldest = database.execute("SELECT digest, bytes FROM libraries ORDER BY used, digest").fetchall()
            while total > self.limit:
                removed, freed = oldest.pop(0)
                total -= freed
                database.execute("DELETE FROM libraries WHERE digest = ?", (removed,))
                database.execute("DELETE FROM kernels WHERE library = ?", (removed,))

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The file, for one transaction; another process may write at the same time."""
        with closing(sqlite3.connect(self.path, timeout=60.0)) as database, database:
            database.execute("BEGIN IMMEDIATE")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise sqlite3.DatabaseError(f"it has version {version}, not {_VERSION}")
            for statement in _SCHEMA:
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {_VERSION}")
            yield database

    def _attempt(self, action: Callable[[], Result], otherwise: Result) -> Result:
        try:
            return action()
        except (sqlite3.Error, OSError) as error:
            warnings.warn(
                f"{self.path} cannot be used as a cache of compiled kernels ({error}): kernels are compiled anew. Remove it, "
                f"or set {VARIABLE} to another folder or to {OFF!r}",
                stacklevel=3,
            )
            return otherwise


def default_kernel_cache() -> KernelCache | None:
    """The user's cache, or the one that ``HQUANT_KERNEL_CACHE`` names; None where it is turned off."""
    folder = os.environ.get(VARIABLE) or platformdirs.user_cache_dir("tvm_hquant", appauthor=False)
    return None if folder == OFF else KernelCache(Path(folder) / _FILE)


def kernel_key(kernel: Kernel, target: Any) -> str:
    """A hash of everything that the code of a kernel follows from, as hexadecimal digits."""
    ir = f"{tvm_ffi.structural_hash(kernel.function):016x}"
    return hashlib.sha256("\n".join((ir, kernel_symbol(kernel), str(target), _toolchain())).encode()).hexdigest()


@cache
def _toolchain() -> str:
    passes = [step.info.name for step in cpu_pipeline()[0].passes]
    llvm = tvm.get_global_func("target.llvm_version_major")()
    return f"TVM {tvm.__version__}, LLVM {llvm}, {', '.join(passes)}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
