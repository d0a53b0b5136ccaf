"""Scores that were measured once, on disk: a killed search goes on where it was, a second one pays nothing twice.

A row belongs to a model (its fingerprint), some samples (hashes of inputs and labels), a program (a hash of everything that
its outputs are computed from: precisions, scales, codes) and a metric. What kernels computed it plays no part: all give the
same bits. A plan that was calibrated in another way is another program, so nothing stale is ever found.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import JournalError

Floats = npt.NDArray[np.float64]

ScoreKey = tuple[str, str, str]
"""Hash of the samples, hash of the program, name of the metric."""

_VERSION = 1
_COLUMNS = ("model", "samples", "program", "metric", "values_")


class EvaluationJournal:
    """Scores by samples, program and metric, of one model, in an SQLite file. Safe for several processes at once.

    Args:
        path: of the file; it is made if there is none.
        fingerprint: of the model.

    Raises:
        JournalError: the file cannot be made, or is something else; later too, where it cannot be read or written.
    """

    def __init__(self, path: Path | str, fingerprint: str) -> None:
        self.path = Path(path)
        self._fingerprint = fingerprint
        with self._access():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=60.0)
            self._check_kind()
            with self._database:
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS scores (model TEXT, samples TEXT, program TEXT, metric TEXT, "
                    "values_ BLOB NOT NULL, PRIMARY KEY (model, samples, program, metric)) WITHOUT ROWID"
                )
                self._database.execute(f"PRAGMA user_version = {_VERSION}")

    def find(self, samples: str, programs: Sequence[str], metrics: Sequence[str]) -> dict[ScoreKey, Floats]:
        """What is known of these programs on some samples, float64 [samples, 2] each."""
        with self._access():
            rows = self._database.execute(
                "SELECT program, metric, values_ FROM scores WHERE model = ? AND samples = ?",
                (self._fingerprint, samples),
            )
            wanted = {(program, metric) for program in programs for metric in metrics}
            return {
                (samples, program, metric): np.frombuffer(values, np.float64).reshape(-1, 2)
                for program, metric, values in rows
                if (program, metric) in wanted
            }

    def add(self, scores: Mapping[ScoreKey, Floats]) -> None:
        """Keeps scores; all or nothing of one call survives a kill."""
        rows: Iterable[tuple[object, ...]] = (
            (self._fingerprint, *key, np.ascontiguousarray(values, np.float64).tobytes())
            for key, values in scores.items()
        )
        with self._access(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def _check_kind(self) -> None:
        """Leaves databases of other programs, and journals of other versions, as they are."""
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        tables = {row[0] for row in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        columns = tuple(row[1] for row in self._database.execute("PRAGMA table_info(scores)"))
        if tables - {"scores"} or columns not in ((), _COLUMNS):
            raise JournalError(f"{self.path} is a database of something else: give another file")
        if version not in (0, _VERSION):
            raise JournalError(f"{self.path} has version {version}, not {_VERSION}: give another file")

    @contextmanager
    def _access(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise JournalError(f"cannot use {self.path} as a journal of evaluations: {error}") from None
