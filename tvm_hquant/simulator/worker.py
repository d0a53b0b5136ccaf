"""What runs in a worker process: it compiles libraries of kernels, and scores chunks of samples.

A worker is sent hashes only. What it lacks it asks for, once: libraries, and the packed constants of kernels. So any executor
serves, workers may come and go, and nothing has to be shared but the instruction set.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import tvm

from tvm_hquant.errors import ToolchainError
from tvm_hquant.kernels.interface import KernelFamily, KernelRequest
from tvm_hquant.kernels.registry import host_instruction_sets, select_kernel
from tvm_hquant.relax_ir.kernel_calls import kernel_symbol
from tvm_hquant.simulator.chunks import ChunkSample, ChunkScores, ProgramSet
from tvm_hquant.simulator.kernel_library import Library, built_kernels, exported, loaded_functions
from tvm_hquant.simulator.machine import BoundKernel, KernelMachine


class Parts(NamedTuple):
    """What a worker is sent because it asked."""

    libraries: Mapping[int, Library]
    kernels: Mapping[int, BoundKernel]


class MissingParts(NamedTuple):
    """What a worker asks for: numbers of libraries, hashes of realizations."""

    libraries: tuple[int, ...]
    kernels: tuple[int, ...]


class ChunkTask(NamedTuple):
    """One piece of work.

    Attributes:
        owner: of the numbers and hashes: one evaluator of one model.
        instruction_sets: that the kernels need.
        inputs: shape and dtype of each graph input.
        libraries: numbers of all that the programs need.
        programs: pickled float program, programs and names of metrics; they are the same for many chunks.
        samples: the chunk.
        parts: what the worker asked for before.
    """

    owner: str
    instruction_sets: tuple[str, ...]
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    libraries: tuple[int, ...]
    programs: bytes
    samples: tuple[ChunkSample, ...]
    parts: Parts = Parts({}, {})


def compile_library(requests: Sequence[KernelRequest], families: Sequence[KernelFamily], target: str) -> Library:
    """Compiles kernels. ``target`` is the JSON text of a TVM target.

    Raises:
        ToolchainError: code generation or linking failed.
    """
    kernels = {kernel_symbol(k): k for k in (select_kernel(families, request) for request in requests)}
    executable = built_kernels(list(kernels.values()), tvm.target.Target(target))
    return Library(exported(executable), tuple(kernels))


def score_chunk(task: ChunkTask) -> ChunkScores | MissingParts:
    """Scores the chunk, or asks for what is missing."""
    return _worker(task.owner, task.inputs, task.instruction_sets).score(task)


@lru_cache(maxsize=2)
def _worker(owner: str, inputs: tuple[tuple[tuple[int, ...], str], ...], instruction_sets: tuple[str, ...]) -> _Worker:
    if not set(instruction_sets) <= set(host_instruction_sets()):
        raise ToolchainError(
            f"a worker lacks instructions that the kernels need ({', '.join(instruction_sets)}): all workers have to be "
            "machines of the kind that the search was started on"
        )
    return _Worker(owner, KernelMachine(inputs))


@dataclass(eq=False)
class _Worker:
    """The state of one evaluator in this process."""

    owner: str
    machine: KernelMachine
    libraries: set[int] = field(default_factory=set)
    prepared: tuple[bytes, ProgramSet] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def score(self, task: ChunkTask) -> ChunkScores | MissingParts:
        # One machine runs one schedule at a time, however many threads the executor gives a process.
        with self.lock:
            self._add(task.parts)
            if self.prepared is None or self.prepared[0] != task.programs:
                float_program, programs, metrics = pickle.loads(task.programs)
                missing = MissingParts(
                    tuple(set(task.libraries) - self.libraries),
                    tuple(self.machine.missing([float_program, *programs])),
                )
                if missing.libraries or missing.kernels:
                    return missing
                self.prepared = (task.programs, ProgramSet(self.machine, float_program, programs, metrics))
            return self.prepared[1].score(task.samples)

    def _add(self, parts: Parts) -> None:
        for number, library in parts.libraries.items():
            self.machine.add_functions(loaded_functions(library))
            self.libraries.add(number)
        for realization, kernel in parts.kernels.items():
            if not self.machine.has(realization):
                self.machine.bind(realization, kernel)
