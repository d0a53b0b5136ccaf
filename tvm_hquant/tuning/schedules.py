"""Times schedules of MetaSchedule for the functions that TVM makes of operators without a kernel of this project.

Every function gets schedules out of :mod:`tvm_hquant.tuning.schedule_space`. TVM's rules may crash or take minutes for an
operator that they do not expect, so they run in a process of their own: then its function is left as it is.

A schedule must not change what the simulator computes, so one that leaves other bits than TVM's own loops in any argument, for
random inputs, is dropped. The rest are called a few times each, the fastest few take turns with TVM's own loops, and the
fastest of these has to beat them again.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from loky import ProcessPoolExecutor
from loky.backend import get_context

from tvm_hquant.opaque_functions import OpaqueFunction, load_opaque_functions
from tvm_hquant.passes.apply_schedules import scheduled_function
from tvm_hquant.progress import Progress, silent_progress
from tvm_hquant.runtime import Artifact
from tvm_hquant.tuning.bench import CLEAR_GAIN, Bench, TimedFunction
from tvm_hquant.tuning.records import ScheduleRecord
from tvm_hquant.tuning.schedule_space import sampled_traces

Array = npt.NDArray[Any]

_SAMPLING_SECONDS = 120.0
"""A hundred schedules of a convolution take less than one; where proofs do not end, more time does not help."""
_FINALISTS = 4
_FIRST_CALLS = 3
_SYMBOL = "candidate"

Sampler = Callable[[str, str, int, int], list[str]]
"""Script of a function, target as JSON, cores and how many schedules to traces (:func:`sampled_traces`)."""


@dataclass(frozen=True)
class LeftFunction:
    """A function that keeps TVM's own loops, and why."""

    function: OpaqueFunction
    reason: str


def tune_schedules(
    artifact: Artifact,
    bench: Bench,
    count: int = 64,
    repeat: int = 10,
    progress: Progress = silent_progress,
    sampler: Sampler = sampled_traces,
) -> tuple[tuple[ScheduleRecord, ...], tuple[LeftFunction, ...]]:
    """Measures schedules for the functions of an artifact that TVM made.

    Args:
        artifact: holds the functions.
        bench: where they are timed (:func:`tvm_hquant.tuning.bench.open_bench`).
        count: schedules to sample for a function.
        repeat: timed calls in each of ten turns of the fastest; as many again for the fastest one and TVM's own loops.
        progress: wraps the loop over functions.
        sampler: proposes schedules, in a process of its own; it has to be a function of a module.

    Returns:
        What was measured, and which functions MetaSchedule has no schedule for.

    Raises:
        ArtifactError: the file of the functions is damaged.
    """
    functions = load_opaque_functions(artifact.folder)
    records, left = [], []
    with closing(_SamplingProcess(sampler, bench)) as process:
        for function in progress("tuning what TVM computes", functions, len(functions)):
            traces = process.traces(function, count)
            if isinstance(traces, str):
                left.append(LeftFunction(function, traces))
            else:
                records.append(_measured(bench, function, traces, repeat))
    return tuple(records), tuple(left)


class _SamplingProcess:
    """Calls a sampler in another process, a new one after each that ended or took too long."""

    def __init__(self, sampler: Sampler, bench: Bench) -> None:
        self._sampler = sampler
        self._target = str(bench.spec.tvm_target())
        self._cores = bench.spec.processor.cores
        self._executor: Any = None

    def traces(self, function: OpaqueFunction, count: int) -> list[str] | str:
        """Traces for a function; why there are none if there are none."""
        if self._executor is None:
            self._executor = ProcessPoolExecutor(1, context=get_context("loky"))
        try:
            future = self._executor.submit(self._sampler, function.script, self._target, self._cores, count)
            traces: list[str] = future.result(timeout=_SAMPLING_SECONDS)
        except concurrent.futures.BrokenExecutor:
            self.close()
            return "MetaSchedule ended its process"
        except concurrent.futures.TimeoutError:
            self.close()
            return f"MetaSchedule proposed nothing in {_SAMPLING_SECONDS:.0f} s"
        except Exception as error:  # whatever a rule of TVM raises concerns this function alone
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"MetaSchedule says: {lines[-1]}"
        return traces or "MetaSchedule has no other schedule for it"

    def close(self) -> None:
        """Ends the process."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=True)
            self._executor = None


def _measured(bench: Bench, function: OpaqueFunction, traces: list[str], repeat: int) -> ScheduleRecord:
    """The record of one function."""
    original = tvm.script.from_source(function.script)
    arguments = [_arguments(original, bench)]
    expected = TimedFunction(bench.library({_SYMBOL: original}), _SYMBOL, arguments)
    bits = expected.with_arguments(_arguments(original, bench)).bits()
    timed: dict[str, TimedFunction] = {}
    for trace in traces:
        candidate = TimedFunction(bench.library({_SYMBOL: scheduled_function(original, trace)}), _SYMBOL, arguments)
        if candidate.with_arguments(_arguments(original, bench)).bits() == bits:
            timed[trace] = candidate
    first = {t: bench.microseconds([candidate], _FIRST_CALLS, turns=1)[0] for t, candidate in timed.items()}
    finalists = ["", *sorted(first, key=first.__getitem__)[:_FINALISTS]]
    timed[""] = expected
    fastest = finalists[int(np.argmin(bench.microseconds([timed[t] for t in finalists], repeat)))]
    expected_time, fastest_time = bench.microseconds([expected, timed[fastest]], repeat)
    if not fastest or fastest_time > CLEAR_GAIN * expected_time:
        fastest, fastest_time = "", expected_time
    return ScheduleRecord(function.digest, function.name, bench.cpu, fastest, fastest_time, expected_time)


def _arguments(function: Any, bench: Bench) -> list[Any]:
    """Normal floats, and zeros of all other types: they are indices, for all that is known. Outputs come last."""
    random = np.random.default_rng(0)
    arrays: list[Array] = []
    for parameter in function.params:
        shape, dtype = [int(size) for size in parameter.shape], str(parameter.dtype)
        arrays.append(random.normal(size=shape).astype(dtype) if dtype.startswith("float") else np.zeros(shape, dtype))
    return [bench.tensor(array) for array in arrays]
