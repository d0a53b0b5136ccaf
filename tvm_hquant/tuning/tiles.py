"""Times the tiles that kernels of a network may have, on this machine or over TVM's RPC.

Of several tiles that take the same time, one is the fastest by chance. So the fastest has to beat the expected one again, in
calls of their own. Where arrays lie in memory is chance too, and may make the same kernel take three times as long (a layer of
7×7 pixels on a Zen 4): so all tiles read and write the same arrays, besides constants in their order, and other ones
when the fastest is confirmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.channel_shuffles import find_absorbed_shuffles
from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest, LayerConstants, Tile
from tvm_hquant.kernels.kernel_function import argument_types
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.progress import Progress, silent_progress
from tvm_hquant.relax_ir.kernel_calls import kernel_symbol
from tvm_hquant.runtime import Artifact
from tvm_hquant.tuning.bench import CLEAR_GAIN, Bench, TimedFunction
from tvm_hquant.tuning.records import TuningRecord, is_tiled
from tvm_hquant.verification import artifact_program

Array = npt.NDArray[Any]

_TASKS_OF_A_LIBRARY = 6
"""Linking and loading take as long as compiling some kernels, so several share a library."""


@dataclass(frozen=True)
class _Task:
    """A request with the constants of one of its layers, and the tiles to try, the expected one first."""

    request: KernelRequest
    constants: LayerConstants
    family: Any
    tiles: tuple[Tile, ...]

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """One for each tile."""
        return tuple(self.family.kernel(self.request, tile) for tile in self.tiles)


def tune_tiles(
    artifact: Artifact,
    bench: Bench,
    candidates: int = 8,
    repeat: int = 10,
    progress: Progress = silent_progress,
) -> tuple[TuningRecord, ...]:
    """Measures the kernels of an artifact's network that have a choice of tiles; equal layers are measured once.

    Args:
        artifact: says which kernels.
        bench: where they are timed (:func:`tvm_hquant.tuning.bench.open_bench`).
        candidates: tiles to try for a kernel: those that its family expects most of.
        repeat: timed calls in each of ten turns; as many again for the fastest and the expected tile.
        progress: wraps the loop over kernels.

    Raises:
        ArtifactError, PlanError: files of the artifact are missing or damaged.
    """
    _, program = artifact_program(artifact)
    families = families_for_target(bench.spec.instruction_sets, bench.spec.processor)
    calls = [KernelCall(step.key, step.request, step.inputs) for step in program.steps]
    shuffles = find_absorbed_shuffles(calls, program.outputs, families).values()
    shuffled = {shuffle.tensor: shuffle.kernel.request for shuffle in shuffles}
    constants: dict[KernelRequest, LayerConstants] = {}
    for step in program.steps:
        if step.request is not None and step.constants is not None:
            constants.setdefault(shuffled.get(step.key, step.request), step.constants)
    found = (_task(families, request, values, candidates) for request, values in constants.items())
    tasks = [task for task in found if task is not None]
    shares = [tasks[start : start + _TASKS_OF_A_LIBRARY] for start in range(0, len(tasks), _TASKS_OF_A_LIBRARY)]
    records: list[TuningRecord] = []
    for share in progress("tuning", shares, len(shares)):
        library = bench.library({kernel_symbol(k): k.function for task in share for k in task.kernels})
        records += [_measured(bench, task, library, repeat) for task in share]
    return tuple(records)


def _task(
    families: Sequence[KernelFamily], request: KernelRequest, constants: LayerConstants, candidates: int
) -> _Task | None:
    """What there is to measure for a request; None if its kernel has no choice of tiles."""
    for family in families:
        if is_tiled(family) and len(tiles := family.tiles(request)) > 1:
            return _Task(request, constants, family, tuple(tiles[:candidates]))
        if family.kernel(request) is not None:
            return None
    return None


def _measured(bench: Bench, task: _Task, library: Any, repeat: int) -> TuningRecord:
    """The record of one task, whose kernels are in the library."""
    timed = _timed(bench, task, library, task.kernels)
    number = int(np.argmin(bench.microseconds(timed, repeat)))
    confirmed = _timed(bench, task, library, (task.kernels[0], task.kernels[number]))
    expected_time, fastest_time = bench.microseconds(confirmed, repeat)
    if number == 0 or fastest_time > CLEAR_GAIN * expected_time:
        number, fastest_time = 0, expected_time
    fastest, expected = task.tiles[number], task.tiles[0]
    return TuningRecord(task.request, task.family.name, bench.cpu, fastest, fastest_time, expected, expected_time)


def _timed(bench: Bench, task: _Task, library: Any, kernels: Sequence[Kernel]) -> list[TimedFunction]:
    """Kernels of one request with arguments in new arrays, which they share but for their constants."""
    activations, output = _arguments(task.request)
    before, after = [bench.tensor(array) for array in activations], bench.tensor(output)
    return [
        TimedFunction(library, kernel_symbol(k), bench.argument_lists(before, k.pack(task.constants), after))
        for k in kernels
    ]


def _arguments(request: KernelRequest) -> tuple[list[Array], Array]:
    """Random activations, and room for the output."""
    random = np.random.default_rng(0)
    inputs, (shape, dtype) = argument_types(request)
    return [_random(random, *array_type) for array_type in inputs], np.zeros(shape, dtype)


def _random(random: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    if dtype == "uint8":
        return random.integers(0, 256, shape).astype(dtype)
    values = random.normal(size=shape).astype(np.float32)
    # 16-bit storage: the upper half of a float32, which is a moderate bfloat16 and a code like any other.
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "uint16" else values.astype(dtype)
