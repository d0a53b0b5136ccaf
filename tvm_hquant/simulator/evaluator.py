"""Evaluates programs on samples: each at most once, on all cores, with a journal on disk.

Samples are cut into chunks. A chunk's scores of all programs that the journal does not know are one piece of work, done
here or by the workers of an executor; what is done is written down at once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from tvm_hquant.calibration.samples import DataSource, Sample, count_samples
from tvm_hquant.progress import Progress, silent_progress
from tvm_hquant.simulator.chunks import ChunkSample, ChunkScores, ProgramSet, chunk_samples
from tvm_hquant.simulator.engine import SimulationEngine
from tvm_hquant.simulator.journal import EvaluationJournal, Floats
from tvm_hquant.simulator.machine import Array
from tvm_hquant.simulator.metrics import Metric, MetricAccumulator, Score
from tvm_hquant.simulator.program import Program

CHUNK = 16
"""Samples of one piece of work."""

_REFERENCE_BYTES = 64 * 2**20
"""Outputs of the float model that are kept in memory at most, so that they are computed once."""


class ChunkRunner(Protocol):
    """Scores chunks elsewhere."""

    @property
    def capacity(self) -> int:
        """How many pieces of work it can be given before one is done."""

    def submit(
        self,
        float_program: Program,
        programs: Sequence[Program],
        metrics: Sequence[str],
        samples: tuple[ChunkSample, ...],
    ) -> Future[ChunkScores]:
        """Starts one piece of work."""


@dataclass(eq=False)
class _KnownSource:
    """What is remembered of a source: hashes of its chunks, and the float model's outputs by position."""

    source: DataSource
    digests: tuple[str, ...] | None = None
    references: dict[int, tuple[Array, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Work:
    """A chunk with the programs whose scores are missing."""

    number: int
    samples: tuple[Sample, ...]
    programs: tuple[Program, ...]


class ProgramEvaluator:
    """Scores programs against the float model.

    Args:
        engine: runs what is evaluated in this process.
        float_program: what is compared with.
        journal: where scores are kept and found; only in memory of the caller without one.
        runner: does the work elsewhere; None: here.
        progress: shows progress, sample by sample.
    """

    def __init__(
        self,
        engine: SimulationEngine,
        float_program: Program,
        journal: EvaluationJournal | None = None,
        runner: ChunkRunner | None = None,
        progress: Progress = silent_progress,
    ) -> None:
        self._engine = engine
        self._float = float_program
        self.journal = journal
        self.runner = runner
        self._progress = progress
        self._known: dict[int, _KnownSource] = {}
        self._reference_bytes = 0
        self.evaluations = 0
        """Programs that were run, counted once for each set of samples; what the journal knew is not among them."""

    def scores(
        self, programs: Sequence[Program], source: DataSource, metrics: Sequence[Metric], description: str
    ) -> list[list[MetricAccumulator]]:
        """For every program its scores in every metric, on every sample.

        Equal programs are run once. Values that several programs share are computed once for each sample, so it is cheap
        to ask for programs that differ in late layers together.

        Raises:
            DataError: see :meth:`Metric.score`.
        """
        unique = {program.digest: program for program in programs}
        names = tuple(metric.name for metric in metrics)
        known = self._known.setdefault(id(source), _KnownSource(source))
        found: dict[int, dict[tuple[str, str], Floats]] = {}
        count = count_samples(source)
        chunks = -(-count // CHUNK)
        if self.journal is not None:
            for number, digest in enumerate(self._digests(known)):
                kept = self.journal.find(digest, list(unique), names)
                found[number] = {(program, metric): values for (_, program, metric), values in kept.items()}
        missing = {
            number: tuple(p for p in unique.values() if any((p.digest, m) not in found.get(number, {}) for m in names))
            for number in range(chunks)
        }
        self.evaluations += len({p.digest for programs in missing.values() for p in programs})
        if any(missing.values()):
            for _ in self._progress(description, self._fill(known, missing, names, found), count):
                pass
        return [
            [
                MetricAccumulator(metric).with_scores(
                    Score(*row) for number in range(chunks) for row in found[number][p.digest, metric.name].tolist()
                )
                for metric in metrics
            ]
            for p in programs
        ]

    def _fill(
        self,
        known: _KnownSource,
        missing: Mapping[int, tuple[Program, ...]],
        metrics: Sequence[str],
        found: dict[int, dict[tuple[str, str], Floats]],
    ) -> Iterator[None]:
        """Does what is missing; yields once for every sample that is done."""
        work = self._work(known.source, missing)
        done = self._done_elsewhere(known, work, metrics) if self.runner else self._done_here(known, work, metrics)
        for piece, result in done:
            self._remember(known, piece.number, result)
            rows = {
                (program.digest, metric): result.scores[p, m]
                for p, program in enumerate(piece.programs)
                for m, metric in enumerate(metrics)
            }
            found.setdefault(piece.number, {}).update(rows)
            if self.journal is not None:
                digest = self._digests(known)[piece.number]
                self.journal.add({(digest, *key): values for key, values in rows.items()})
            yield from [None] * len(piece.samples)

    def _work(self, source: DataSource, missing: Mapping[int, tuple[Program, ...]]) -> Iterator[_Work]:
        for number, samples in enumerate(_chunks(source)):
            if missing[number]:
                yield _Work(number, samples, missing[number])

    def _done_here(
        self, known: _KnownSource, work: Iterator[_Work], metrics: Sequence[str]
    ) -> Iterator[tuple[_Work, ChunkScores]]:
        programs: tuple[Program, ...] = ()
        prepared: ProgramSet | None = None
        for piece in work:
            if prepared is None or piece.programs != programs:
                programs = piece.programs
                self._engine.compile([self._float, *programs])
                calls = [self._engine.call_program(program) for program in (self._float, *programs)]
                prepared = ProgramSet(self._engine.machine, calls[0], calls[1:], metrics)
            yield piece, prepared.score(self._samples(known, piece))

    def _done_elsewhere(
        self, known: _KnownSource, work: Iterator[_Work], metrics: Sequence[str]
    ) -> Iterator[tuple[_Work, ChunkScores]]:
        assert self.runner is not None
        running: deque[tuple[_Work, Future[ChunkScores]]] = deque()
        for piece in work:
            samples = self._samples(known, piece)
            running.append((piece, self.runner.submit(self._float, piece.programs, metrics, samples)))
            if len(running) >= self.runner.capacity:
                first, future = running.popleft()
                yield first, future.result()
        for piece, future in running:
            yield piece, future.result()

    def _samples(self, known: _KnownSource, piece: _Work) -> tuple[ChunkSample, ...]:
        return chunk_samples(list(self._engine.graph.inputs), piece.samples, known.references, piece.number * CHUNK)

    def _remember(self, known: _KnownSource, number: int, result: ChunkScores) -> None:
        for position, outputs in enumerate(result.references, number * CHUNK):
            size = sum(output.nbytes for output in outputs)
            if position not in known.references and self._reference_bytes + size <= _REFERENCE_BYTES:
                known.references[position] = outputs
                self._reference_bytes += size

    @staticmethod
    def _digests(known: _KnownSource) -> tuple[str, ...]:
        """Hashes of the chunks of a source; it is walked through once for them."""
        if known.digests is None:
            known.digests = tuple(_digest(samples) for samples in _chunks(known.source))
        return known.digests


def _chunks(source: DataSource) -> Iterator[tuple[Sample, ...]]:
    samples = iter(source)
    while chunk := tuple(islice(samples, CHUNK)):
        yield chunk


def _digest(samples: Sequence[Sample]) -> str:
    state = hashlib.sha256()
    for sample in samples:
        state.update(sample.digest() + repr(sample.label).encode())
    return state.hexdigest()
