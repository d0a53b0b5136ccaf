"""Evaluates programs on samples: each at most once, on all cores, with a journal on disk.

Samples are cut into chunks. A chunk's scores of all programs that the journal does not know are one piece of work, done
here or by the workers of an executor; what is done is written down at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from tvm_hquant.calibration.samples import DataSource, Sample, count_samples
from tvm_hquant.progress import Progress, silent_progress
from tvm_hquant.simulator.chunks import ChunkScores, ProgramSet, chunk_samples
from tvm_hquant.simulator.engine import SimulationEngine
from tvm_hquant.simulator.journal import EvaluationJournal, Floats
from tvm_hquant.simulator.machine import Array
from tvm_hquant.simulator.metrics import Metric, MetricAccumulator
from tvm_hquant.simulator.program import Program
from tvm_hquant.simulator.runner import Piece, WorkerRunner, available_cores, local_executor

CHUNK = 16
"""Samples of one piece of work."""

_WORTH_PROCESSES = 5e11
"""Multiply-accumulates from which starting worker processes, some seconds each, pays."""

_REFERENCE_BYTES = 64 * 2**20
"""Outputs of the float model that are kept in memory at most, so that they are computed once."""


@dataclass(eq=False)
class _KnownSource:
    """What is remembered of a source: hashes of its chunks, and the float model's outputs by position."""

    source: DataSource
    digests: tuple[str, ...] | None = None
    references: dict[int, tuple[Array, ...]] = field(default_factory=dict)


class ProgramEvaluator:
    """Scores programs against the float model.

    Args:
        engine: runs what is evaluated in this process.
        float_program: what is compared with.
        journal: where scores are kept and found; None: nowhere.
        progress: shows progress, sample by sample.

    Work is done in this process, unless an executor was given (:meth:`use_executor`), or there is so much of it that starting
    a process for each core pays. The scores are the same.
    """

    def __init__(
        self,
        engine: SimulationEngine,
        float_program: Program,
        journal: EvaluationJournal | None = None,
        progress: Progress = silent_progress,
    ) -> None:
        self._engine = engine
        self._float = float_program
        self.journal = journal
        self._runner: WorkerRunner | None = None
        self._processes = available_cores()
        self._progress = progress
        self._known: dict[int, _KnownSource] = {}
        self._reference_bytes = 0
        self.evaluations = 0
        """Programs that were run, counted once for each set of samples; what the journal knew is not among them."""

    def use_executor(self, executor: Executor, workers: int) -> None:
        """Gives all work to an executor, such as ``distributed.Client.get_executor()``, that has so many workers."""
        self._runner = WorkerRunner(self._engine, executor, workers)

    def use_processes(self, count: int) -> None:
        """How many processes of this machine may share large work; 1: everything is done in this one."""
        self._processes = count

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
                MetricAccumulator(
                    metric, np.concatenate([found[number][p.digest, metric.name] for number in range(chunks)])
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
        pieces = self._pieces(known, missing)
        runner = self._runner_for(missing)
        done = runner.run(self._float, metrics, pieces) if runner is not None else self._done_here(pieces, metrics)
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

    def _runner_for(self, missing: Mapping[int, tuple[Program, ...]]) -> WorkerRunner | None:
        """Who does the work, where it is not this process."""
        if self._runner is None and self._processes > 1 and _operations(missing) > _WORTH_PROCESSES:
            executor, count = local_executor(self._processes)
            self._runner = WorkerRunner(self._engine, executor, count)
        return self._runner

    def _pieces(self, known: _KnownSource, missing: Mapping[int, tuple[Program, ...]]) -> Iterator[Piece]:
        names = list(self._engine.graph.inputs)
        for number, samples in enumerate(_chunks(known.source)):
            if missing[number]:
                yield Piece(number, missing[number], chunk_samples(names, samples, known.references, number * CHUNK))

    def _done_here(self, pieces: Iterator[Piece], metrics: Sequence[str]) -> Iterator[tuple[Piece, ChunkScores]]:
        programs: tuple[Program, ...] = ()
        prepared: ProgramSet | None = None
        for piece in pieces:
            if prepared is None or piece.programs != programs:
                programs = piece.programs
                self._engine.compile([self._float, *programs])
                calls = [self._engine.call_program(program) for program in (self._float, *programs)]
                prepared = ProgramSet(self._engine.machine, calls[0], calls[1:], metrics)
            yield piece, prepared.score(piece.samples)

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


def _operations(missing: Mapping[int, tuple[Program, ...]]) -> float:
    """Multiply-accumulates of all that is missing, each value made once for a sample."""
    total = 0.0
    for programs in set(missing.values()):
        steps = {step.key: step for program in programs for step in program.steps}
        work = sum(step.layer.macs for step in steps.values() if step.layer is not None)
        total += work * CHUNK * sum(1 for others in missing.values() if others == programs)
    return total


def _chunks(source: DataSource) -> Iterator[tuple[Sample, ...]]:
    samples = iter(source)
    while chunk := tuple(islice(samples, CHUNK)):
        yield chunk


def _digest(samples: Sequence[Sample]) -> str:
    state = hashlib.sha256()
    for sample in samples:
        state.update(sample.digest() + repr(sample.label).encode())
    return state.hexdigest()
