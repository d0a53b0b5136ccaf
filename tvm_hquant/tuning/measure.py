"""Times the tiles that kernels of a network may have, on this machine or over TVM's RPC.

Tiles take turns in a random order, so that what the machine does besides hits all alike. Inside a network, activations have
just been written, but weights have not been read since the sample before: so every call takes another copy of the weights, and
the copies are larger together than the nearer caches. Over RPC, where calls cannot be timed singly, these caches are flushed.

Of several tiles that take the same time, one is the fastest by chance. So the fastest has to beat the expected one again, in
calls of their own.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvm_hquant.artifact import check_linker
from tvm_hquant.channel_shuffles import find_absorbed_shuffles
from tvm_hquant.cpu_features import cpu_identity
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.errors import DataError, TuningError
from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest, LayerConstants, Tile
from tvm_hquant.kernels.kernel_function import argument_types
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.progress import Progress, silent_progress
from tvm_hquant.relax_ir.kernel_calls import kernel_symbol
from tvm_hquant.runtime import Artifact
from tvm_hquant.target_spec import TargetSpec, read_target_spec
from tvm_hquant.tuning.records import TuningRecord, is_tiled
from tvm_hquant.verification import artifact_program

Array = npt.NDArray[Any]

_NEAR_CACHES = 4 * 2**20
"""Bytes: more than the second-level cache of a core has."""
_MOST_COPIES = 16
_TURNS = 10
_TASKS_OF_A_LIBRARY = 6
"""Linking and loading take as long as compiling some kernels, so several share a library."""
_CLEAR_GAIN = 0.98
"""Another tile than the expected one has to be this much faster: smaller differences are noise."""


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


def tune_artifact(
    artifact: Artifact,
    candidates: int = 8,
    repeat: int = 10,
    rpc: str | None = None,
    progress: Progress = silent_progress,
) -> tuple[TuningRecord, ...]:
    """Measures the kernels of an artifact's network that have a choice of tiles; equal layers are measured once.

    Args:
        artifact: says which kernels, and for which target.
        candidates: tiles to try for a kernel: those that its family expects most of.
        repeat: timed calls in each of ten turns; as many again for the fastest and the expected tile.
        rpc: ``HOST:PORT`` of a TVM RPC server on the target; this machine if not given.
        progress: wraps the loop over kernels.

    Raises:
        TuningError: this machine cannot run the target's kernels, or nobody answers at ``rpc``.
        ToolchainError: the target's linker is missing.
    """
    spec = read_target_spec(artifact.manifest["target"]["spec"], "the artifact's target spec")
    if rpc is None and (problems := spec.host_problems()):
        raise TuningError(f"cannot tune for {spec.name} here: {'; '.join(problems)}; name a board with --rpc HOST:PORT")
    check_linker(spec)
    _, program = artifact_program(artifact)
    families = families_for_target(spec.instruction_sets, spec.processor)
    calls = [KernelCall(step.key, step.request, step.inputs) for step in program.steps]
    shuffles = find_absorbed_shuffles(calls, program.outputs, families).values()
    shuffled = {shuffle.tensor: shuffle.kernel.request for shuffle in shuffles}
    constants: dict[KernelRequest, LayerConstants] = {}
    for step in program.steps:
        if step.request is not None and step.constants is not None:
            constants.setdefault(shuffled.get(step.key, step.request), step.constants)
    found = (_task(families, request, values, candidates) for request, values in constants.items())
    tasks = [task for task in found if task is not None]
    bench = _Bench(spec, rpc)
    shares = [tasks[start : start + _TASKS_OF_A_LIBRARY] for start in range(0, len(tasks), _TASKS_OF_A_LIBRARY)]
    records: list[TuningRecord] = []
    for share in progress("tuning", shares, len(shares)):
        library = bench.library([kernel for task in share for kernel in task.kernels])
        records += [bench.measure(task, library, repeat) for task in share]
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


@dataclass(frozen=True, eq=False)
class _Timed:
    """A kernel of a loaded library with arguments for calls one after the other."""

    library: Any
    kernel: Kernel
    arguments: Sequence[Sequence[Any]]

    def seconds(self, repeat: int) -> list[float]:
        """Of calls on this machine, each with the next arguments."""
        function = self.library[kernel_symbol(self.kernel)]
        times = []
        for number in range(repeat + 1):
            arguments = self.arguments[number % len(self.arguments)]
            start = time.perf_counter()
            function(*arguments)
            times.append(time.perf_counter() - start)
        return times[1:]  # before the first call others had the caches

    def seconds_there(self, repeat: int, device: Any) -> list[float]:
        """Of calls on a remote device."""
        evaluator = self.library.time_evaluator(
            kernel_symbol(self.kernel), device, number=1, repeat=repeat, cache_flush_bytes=_NEAR_CACHES
        )
        return list(evaluator(*self.arguments[0]).results)


class _Bench:
    """Where kernels are timed."""

    def __init__(self, spec: TargetSpec, rpc: str | None) -> None:
        self._target = spec.tvm_target()
        self._compiler = spec.target.cross_compiler
        self._session: Any = None
        self._uploads = 0
        self.cpu = cpu_identity() if rpc is None else spec.name
        self._device = tvm.cpu()
        if rpc is not None:
            host, _, port = rpc.rpartition(":")
            if not host or not port.isdigit():
                raise DataError(f"--rpc {rpc!r} is not HOST:PORT, such as 192.0.2.7:9090")
            try:
                self._session = tvm.rpc.connect(host, int(port), session_timeout=600)
            except (RuntimeError, OSError) as error:
                raise TuningError(f"nobody answers at {rpc}: {str(error).strip().splitlines()[-1]}") from None
            self._device = self._session.cpu(0)

    def measure(self, task: _Task, library: Any, repeat: int) -> TuningRecord:
        """The record of one task, whose kernels are in the library."""
        timed = [_Timed(library, kernel, self._argument_sets(kernel, task.constants)) for kernel in task.kernels]
        expected, fastest = timed[0], timed[int(np.argmin(self._medians(timed, repeat)))]
        expected_time, fastest_time = self._medians([expected, fastest], repeat)
        if fastest is expected or fastest_time > _CLEAR_GAIN * expected_time:
            fastest, fastest_time = expected, expected_time
        tile = task.tiles[timed.index(fastest)]
        return TuningRecord(task.request, task.family.name, self.cpu, tile, fastest_time, task.tiles[0], expected_time)

    def _medians(self, timed: Sequence[_Timed], repeat: int) -> list[float]:
        """Microseconds of a call of each, in turns."""
        seconds: list[list[float]] = [[] for _ in timed]
        order = np.random.default_rng(0)
        for _ in range(_TURNS):
            for number in order.permutation(len(timed)):
                one, times = timed[number], seconds[number]
                times += one.seconds(repeat) if self._session is None else one.seconds_there(repeat, self._device)
        return [1e6 * statistics.median(times) for times in seconds]

    def _argument_sets(self, kernel: Kernel, constants: LayerConstants) -> list[list[Any]]:
        """Arguments for calls one after the other: the same activations and output, copies of the constants."""
        activations, packed, output = _arguments(kernel, constants)
        size = max(1, sum(array.nbytes for array in packed))
        copies = min(_MOST_COPIES, -(-_NEAR_CACHES // size)) if self._session is None else 1
        before, after = [self._tensor(a) for a in activations], self._tensor(output)
        return [[*before, *(self._tensor(a) for a in packed), after] for _ in range(copies)]

    def library(self, kernels: Sequence[Kernel]) -> Any:
        """Compiled kernels, loaded where they are timed."""
        symbols = {kernel_symbol(k): k.function.with_attr("global_symbol", kernel_symbol(k)) for k in kernels}
        executable = tvm.compile(tvm.IRModule(symbols), target=self._target, tir_pipeline=CPU_PIPELINE)
        with tempfile.TemporaryDirectory(prefix="tvm_hquant_tuning_") as folder:
            # The server has mapped the libraries before: one of the same name would be written over them.
            self._uploads += 1
            path = Path(folder) / f"candidates_{self._uploads}.so"
            options = {} if self._compiler is None else {"fcompile": tvm.support.cc.cross_compiler(self._compiler)}
            executable.export_library(str(path), **options)
            if self._session is None:
                return tvm.runtime.load_module(str(path))
            self._session.upload(str(path))
            return self._session.load_module(path.name)

    def _tensor(self, array: Array) -> Any:
        return tvm.runtime.tensor(array, self._device)


def _arguments(kernel: Kernel, constants: LayerConstants) -> tuple[list[Array], list[Array], Array]:
    """Random activations, the packed constants of a layer, and room for the output."""
    random = np.random.default_rng(0)
    inputs, (shape, dtype) = argument_types(kernel.request)
    activations = [_random(random, *array_type) for array_type in inputs]
    return activations, list(kernel.pack(constants)), np.zeros(shape, dtype)


def _random(random: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    if dtype == "uint8":
        return random.integers(0, 256, shape).astype(dtype)
    values = random.normal(size=shape).astype(np.float32)
    # 16-bit storage: the upper half of a float32, which is a moderate bfloat16 and a code like any other.
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "uint16" else values.astype(dtype)
