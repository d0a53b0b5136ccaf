"""Scores of many programs on a few samples: the piece of work that an evaluation is made of, here or in a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tvm_hquant.simulator.machine import Array, CallProgram, KernelMachine, Schedule
from tvm_hquant.simulator.margins import SCORED

Floats = npt.NDArray[np.float64]

_ELEMENTS = 2**18
"""Elements of outputs that are scored at once, at most, unless one program has more."""


class ChunkSample(NamedTuple):
    """One sample: arrays of the graph inputs in order, label, and what the float model gives for it, where that is known."""

    inputs: tuple[Array, ...]
    label: int | None
    reference: tuple[Array, ...] | None


class ChunkScores(NamedTuple):
    """``scores`` is float64 [programs, metrics, samples, 2], columns as in :class:`~tvm_hquant.simulator.metrics.Score`.

    ``references`` are the outputs of the float model for each sample.
    """

    scores: Floats
    references: tuple[tuple[Array, ...], ...]


class ProgramSet:
    """Programs that are scored together, the float model among them, with the schedules that run them.

    Args:
        machine: has all their kernels.
        float_program, programs: what is scored against what.
        metrics: names.
    """

    def __init__(
        self,
        machine: KernelMachine,
        float_program: CallProgram,
        programs: Sequence[CallProgram],
        metrics: Sequence[str],
    ) -> None:
        self._machine = machine
        self._float = float_program
        self._programs = programs
        self._metrics = [SCORED[name] for name in metrics]
        self._schedules: dict[bool, Schedule] = {}

    def score(self, samples: Sequence[ChunkSample]) -> ChunkScores:
        """Every program on every sample. The float model runs first where its outputs are not known."""
        scores = np.empty((len(self._programs), len(self._metrics), len(samples), 2))
        references = []
        for number, sample in enumerate(samples):
            results = self._schedule(sample.reference is None).run(sample.inputs)
            reference, results = (
                (sample.reference, results) if sample.reference is not None else (results[0], results[1:])
            )
            step = max(1, _ELEMENTS // sum(output.size for output in reference))
            for start in range(0, len(results), step):
                group = slice(start, start + step)
                for m, metric in enumerate(self._metrics):
                    scores[group, m, number] = metric.score_all(reference, results[group], sample.label)
            references.append(reference)
        return ChunkScores(scores, tuple(references))

    def _schedule(self, with_float: bool) -> Schedule:
        if with_float not in self._schedules:
            programs = [self._float, *self._programs] if with_float else list(self._programs)
            self._schedules[with_float] = self._machine.schedule(programs)
        return self._schedules[with_float]


def chunk_samples(
    names: Sequence[str], samples: Sequence[Any], references: Mapping[int, tuple[Array, ...]], first: int
) -> tuple[ChunkSample, ...]:
    """Samples as a machine takes them; ``references`` by position, counted from ``first``."""
    return tuple(
        ChunkSample(tuple(sample.inputs[name] for name in names), sample.label, references.get(first + number))
        for number, sample in enumerate(samples)
    )
