"""Gives pieces of an evaluation to the workers of an executor."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from typing import Any, NamedTuple

from tvm_hquant.errors import ToolchainError
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.relax_ir.kernel_calls import is_view
from tvm_hquant.simulator.chunks import ChunkSample, ChunkScores
from tvm_hquant.simulator.engine import SimulationEngine, as_calls
from tvm_hquant.simulator.kernel_library import Library
from tvm_hquant.simulator.program import Program, Step
from tvm_hquant.simulator.worker import ChunkTask, MissingParts, Parts, compile_library, score_chunk


class Piece(NamedTuple):
    """Programs to score on some samples; ``number`` is the caller's."""

    number: int
    programs: tuple[Program, ...]
    samples: tuple[ChunkSample, ...]


class WorkerRunner:
    """Runs pieces of work in other processes, here or elsewhere.

    Args:
        engine: of this process; it compiles what only this process can: operators that TVM legalizes.
        executor: anything like ``concurrent.futures.Executor`` whose workers are processes that can import this package.
            Workers of one thread serve best.
        workers: how many there are; two pieces for each are under way.
    """

    def __init__(self, engine: SimulationEngine, executor: Executor, workers: int) -> None:
        self._engine = engine
        self._executor = executor
        self._workers = workers
        self._owner = uuid.uuid4().hex
        self._libraries: list[Library] = []
        self._compiled: set[KernelRequest] = set()
        self._has_functions = False
        self._steps: dict[int, Step] = {}

    def run(
        self, float_program: Program, metrics: Sequence[str], pieces: Iterable[Piece]
    ) -> Iterator[tuple[Piece, ChunkScores]]:
        """The scores of every piece, in the order in which they are done.

        Raises:
            ToolchainError: kernels cannot be compiled, a worker cannot run them, or one was ended from outside.
        """
        try:
            yield from self._run(float_program, metrics, iter(pieces))
        except BrokenExecutor as error:
            raise ToolchainError(
                "a worker process was ended from outside, perhaps for lack of memory: start again, with fewer --workers; "
                "what the journal holds is not evaluated again"
            ) from error

    def _run(
        self, float_program: Program, metrics: Sequence[str], waiting: Iterator[Piece]
    ) -> Iterator[tuple[Piece, ChunkScores]]:
        running: dict[Future[ChunkScores | MissingParts], tuple[Piece, ChunkTask]] = {}
        programs: tuple[Program, ...] | None = None
        pickled = b""
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < 2 * self._workers:
                piece = next(waiting, None)
                if piece is None:
                    exhausted = True
                    break
                if piece.programs != programs:
                    programs = piece.programs
                    pickled = self._prepared(float_program, programs, metrics)
                task = self._task(pickled, piece.samples)
                running[self._executor.submit(score_chunk, task)] = (piece, task)
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                piece, task = running.pop(future)
                result = future.result()
                if isinstance(result, MissingParts):
                    again = task._replace(parts=self._parts(result))
                    running[self._executor.submit(score_chunk, again)] = (piece, task)
                else:
                    yield piece, result

    def _task(self, programs: bytes, samples: tuple[ChunkSample, ...]) -> ChunkTask:
        inputs = tuple((tuple(t.shape), t.dtype) for t in self._engine.graph.inputs.values())
        numbers = tuple(range(len(self._libraries)))
        return ChunkTask(self._owner, self._engine.instruction_sets, inputs, numbers, programs, samples)

    def _prepared(self, float_program: Program, programs: Sequence[Program], metrics: Sequence[str]) -> bytes:
        """The programs as they travel, with everything compiled that they need."""
        steps = {s.realization: s for p in (float_program, *programs) for s in p.steps}
        new = {r: s for r, s in steps.items() if r not in self._steps}
        self._steps.update(new)
        self._compile(list(new.values()))
        calls = (as_calls(float_program), tuple(map(as_calls, programs)), tuple(metrics))
        return pickle.dumps(calls, pickle.HIGHEST_PROTOCOL)

    def _compile(self, steps: Sequence[Step]) -> None:
        if not self._has_functions and any(step.request is None for step in steps):
            self._libraries.append(self._engine.function_library())
            self._has_functions = True
        wanted = {s.request: None for s in steps if s.request is not None and not is_view(s.request)}
        new = [request for request in wanted if request not in self._compiled]
        self._compiled.update(new)
        cached = self._engine.cached_libraries(new)
        self._libraries += cached
        found = {symbol for library in cached for symbol in library.symbols}
        requests = [request for request in new if self._engine.symbol(request) not in found]
        # Several small libraries, so that all workers have some to compile.
        groups = [group for i in range(2 * self._workers) if (group := requests[i :: 2 * self._workers])]
        target = str(self._engine.target)
        futures = [self._executor.submit(compile_library, group, self._engine.families, target) for group in groups]
        for group, future in zip(groups, futures, strict=True):
            self._libraries.append(future.result())
            self._engine.keep_library(self._libraries[-1], group)

    def _parts(self, missing: MissingParts) -> Parts:
        return Parts(
            {number: self._libraries[number] for number in missing.libraries},
            {r: self._engine.bound_kernel(self._steps[r]) for r in missing.kernels},
        )


def local_executor(workers: int | None = None) -> tuple[Executor, int]:
    """Processes of this machine, one for each core that this process may use, and how many they are.

    They are started when the first piece of work comes, and do not run the caller's main module again.
    """
    from loky import ProcessPoolExecutor
    from loky.backend import get_context

    count = workers or available_cores()
    # A worker computes in one thread: TVM's pools in several processes would be pinned to the same cores.
    # It keeps a network's kernels and weights, which loky would take for a leak after 300 MB and start it anew without them.
    environment: dict[str, Any] = {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "LOKY_MAX_MEMORY_LEAK_SIZE": "1e18"}
    return ProcessPoolExecutor(count, context=get_context("loky"), env=environment), count


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
