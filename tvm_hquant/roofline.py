"""Achieved against possible: every kernel of a compiled network on this machine beside what the target spec lets it reach.

The roofline model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4), 2009): a kernel takes at least as long as its arithmetic at the unit's rate, and as its memory
traffic at the memory's bandwidth. Only what cannot stay in the last-level cache from one call to the next counts as traffic:
the weights if those of the whole network exceed it, activations that exceed it alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import PrecisionError
from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import KernelFamily
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.kernels.registry import select_kernel
from tvm_hquant.operators import Conv2D, Dense
from tvm_hquant.relax_ir.kernel_calls import is_view, kernel_symbol
from tvm_hquant.runtime import Artifact
from tvm_hquant.simulator.program import Program, Step
from tvm_hquant.stored_outputs import find_stored_outputs
from tvm_hquant.target_spec import TargetSpec, read_target_spec
from tvm_hquant.tensor_format import STORAGE_DTYPE
from tvm_hquant.tuning.records import families_of_manifest
from tvm_hquant.verification import artifact_program, random_inputs

Array = npt.NDArray[Any]

_RUNTIME_PREFIX = "vm."
"""Of the virtual machine's own functions, which allocate and check."""


@dataclass(frozen=True)
class KernelProfile:
    """One call of a kernel inside the network.

    Attributes:
        layer: its name; for a conversion ``convert TENSOR``; for a function that belongs to no layer the function's name.
        operator: its kind in target specs.
        precision: of the layer; for a conversion the two storages.
        kernel: the compiled function's family and variant; ``tvm`` for an operator that TVM computes.
        microseconds: median over the runs, inside the running network.
        operations: two for each multiply-accumulate; one for each element of the output without weights; 0 if unknown.
        bytes: activations read and written once, and weights.
        bound: what limits the possible time, or None where the spec has no rate.
        possible_microseconds: the least time by the roofline; None as ``bound``.
    """

    layer: str
    operator: str
    precision: str
    kernel: str
    microseconds: float
    operations: int
    bytes: int
    bound: Literal["compute", "memory"] | None
    possible_microseconds: float | None

    @property
    def giga_operations_per_second(self) -> float:
        return self.operations / self.microseconds / 1e3

    @property
    def fraction(self) -> float | None:
        """Possible time over measured time; 1 is the roof."""
        return None if self.possible_microseconds is None else self.possible_microseconds / self.microseconds


@dataclass(frozen=True)
class NetworkProfile:
    """All kernel calls in order, and the median time of one whole call, measured without looking inside."""

    model: str
    target: str
    threads: int
    bandwidth_gb_per_s: float
    kernels: tuple[KernelProfile, ...]
    whole_microseconds: float

    @property
    def kernel_microseconds(self) -> float:
        return sum(kernel.microseconds for kernel in self.kernels)

    @property
    def possible_microseconds(self) -> float:
        """The least time of all kernels that the spec has a rate for."""
        return sum(kernel.possible_microseconds or 0.0 for kernel in self.kernels)

    def to_jsonable(self) -> dict[str, Any]:
        """As plain data, derived figures included."""
        return {
            "model": self.model,
            "target": self.target,
            "threads": self.threads,
            "bandwidth_gb_per_s": self.bandwidth_gb_per_s,
            "whole_microseconds": self.whole_microseconds,
            "possible_microseconds": self.possible_microseconds,
            "kernels": [
                {
                    **vars(kernel),
                    "giga_operations_per_second": kernel.giga_operations_per_second,
                    "fraction": kernel.fraction,
                }
                for kernel in self.kernels
            ],
        }


def profile_artifact(
    artifact: Artifact, threads: int, inputs: Mapping[str, Array] | None = None, repeat: int = 20
) -> NetworkProfile:
    """Times every kernel of an artifact while the network runs on this machine.

    The virtual machine reports the start and the end of each call, which costs about a microsecond a kernel.

    Args:
        artifact: loaded on this machine.
        threads: how many TVM's thread pool has (``TVM_NUM_THREADS``): the spec's rates are scaled to them.
        inputs: one sample; a random one if not given.
        repeat: runs.

    Raises:
        ArtifactError: this machine cannot run it, or files are missing.
        DataError: the sample does not fit.
    """
    plan, program = artifact_program(artifact)
    spec = read_target_spec(artifact.manifest["target"]["spec"], "the artifact's target spec")
    sample = artifact.checked_inputs(inputs if inputs is not None else random_inputs(artifact.manifest, plan)[0])
    timed = _timed_calls(artifact, sample, repeat)
    whole = 1e6 * statistics.median(artifact.time(sample, repeat))
    families = families_of_manifest(artifact.manifest, spec)
    steps = _steps_by_symbol(program, families)
    weights = sum(_weight_bytes(step) for step in program.steps)
    roof = Roof(spec, {n: d.precision for n, d in plan.layers.items()}, threads, weights)
    opaque = {str(e["function"]): str(e["name"]) for e in artifact.manifest["layers"] if e.get("function")}
    kernels = []
    for symbol, microseconds in timed:
        step, name = steps[symbol].popleft() if steps[symbol] else (None, opaque.get(symbol, symbol))
        kernels.append(roof.kernel(step, name, microseconds))
    return NetworkProfile(
        str(artifact.manifest["model"]), spec.name, threads, spec.memory.bandwidth_gb_per_s, tuple(kernels), whole
    )


@dataclass(frozen=True)
class CallEvent:
    """The start or the end of a call, in seconds of one clock."""

    symbol: str
    is_start: bool
    seconds: float


def outermost_calls(events: Iterable[CallEvent]) -> list[tuple[str, float]]:
    """Symbol and seconds of every call that no other call encloses.

    A layer that TVM computes is a Relax function whose kernels are called inside of it; its time is that of the whole function.
    """
    calls: list[tuple[str, float]] = []
    open_calls: list[CallEvent] = []
    for event in events:
        if event.is_start:
            open_calls.append(event)
            continue
        start = open_calls.pop()
        if not open_calls:
            calls.append((start.symbol, event.seconds - start.seconds))
    return calls


def _timed_calls(artifact: Artifact, sample: Mapping[str, Array], repeat: int) -> list[tuple[str, float]]:
    """Symbol and median microseconds of every kernel call of one run, in order."""
    from tvm.runtime import tensor
    from tvm.runtime.vm import VirtualMachine

    machine = VirtualMachine(artifact.library, artifact.device)  # of its own: instruments cannot be taken off
    events: list[CallEvent] = []

    def record(_function: Any, symbol: str, is_before: bool, _result: Any, *_arguments: Any) -> None:
        if not symbol.startswith(_RUNTIME_PREFIX):
            if not is_before:
                artifact.device.sync()
            events.append(CallEvent(symbol, is_before, time.perf_counter()))

    tensors = [*(tensor(array, artifact.device) for array in sample.values()), *artifact.parameters]
    main = machine["main"]
    main(*tensors)
    machine.set_instrument(record)
    runs: list[list[tuple[str, float]]] = []
    for _ in range(repeat):
        events.clear()
        main(*tensors)
        runs.append(outermost_calls(events))
    return [
        (calls[0][0], 1e6 * statistics.median(seconds for _, seconds in calls)) for calls in zip(*runs, strict=True)
    ]


def _steps_by_symbol(program: Program, families: Sequence[KernelFamily]) -> dict[str, deque[tuple[Step, str]]]:
    """Steps in order, with the names of their kernels, by the compiled function: equal requests share one.

    A concatenation whose inputs are written in place has a step for each input that is copied, a shuffle of what is stored
    shuffled has none.
    """
    calls = [KernelCall(step.key, step.request, step.inputs) for step in program.steps]
    stored = find_stored_outputs(calls, program.outputs, families)
    placed = stored.kernels
    found: dict[str, deque[tuple[Step, str]]] = defaultdict(deque)
    for step in program.steps:
        if step.request is None or is_view(step.request) or step.key in stored.shuffles:
            continue
        if step.key in stored.concats:
            kernels = [part.kernel for part in stored.concats[step.key] if part.is_copy]
        else:
            kernels = [placed[step.key] if step.key in placed else select_kernel(families, step.request)]
        for kernel in kernels:
            found[kernel_symbol(kernel)].append((replace(step, request=kernel.request), kernel.name))
    return found


@dataclass(frozen=True)
class Roof:
    """What a target reaches with ``threads`` threads, for a network with ``weights`` bytes of weights.

    ``precisions`` names the precision of each layer.
    """

    spec: TargetSpec
    precisions: Mapping[str, str]
    threads: int
    weights: int

    def kernel(self, step: Step | None, kernel_name: str, microseconds: float) -> KernelProfile:
        """The profile of one call; without a step, of a function that TVM made."""
        if step is None:
            return KernelProfile(kernel_name, "opaque", "float32", "tvm", microseconds, 0, 0, None, None)
        assert step.request is not None
        request = step.request
        activations = _activation_bytes(step)
        if step.layer is None:
            operator, precision = "convert", f"{request.inputs[0]} → {request.output}"
            layer = f"convert {step.tensor}"
        else:
            operator, precision = step.layer.operator_kind, self.precisions[step.layer.name]
            layer = step.layer.name
        operations = _operations(step)
        compute = self._compute_seconds(step, precision, operations)
        traffic = (self.weights > self._cache) * _weight_bytes(step) + (activations > self._cache) * activations
        memory = traffic / (self.spec.memory.bandwidth_gb_per_s * 1e9)
        return KernelProfile(
            layer,
            operator,
            precision,
            kernel_name,
            microseconds,
            operations,
            activations + _weight_bytes(step),
            None if compute is None else "memory" if memory > compute else "compute",
            None if compute is None else 1e6 * max(memory, compute),
        )

    @property
    def _cache(self) -> int:
        """Bytes of the last-level cache; 0 where the spec names none."""
        memory = self.spec.memory
        return int(1024 * (memory.l3_kib or memory.l2_kib or memory.l1_data_kib or 0))

    def _compute_seconds(self, step: Step, precision: str, operations: int) -> float | None:
        assert step.request is not None
        if step.layer is None:
            storages = (step.request.inputs[0], step.request.output)
            # Codes of one storage in another scale: the spec names formats, and these two are stored alike.
            source, destination = storages if storages[0] != storages[1] else ("uint8", "int8")
            rate = self.spec.conversion_elements_per_cycle(source, destination)
            unit = max(self.spec.units, key=lambda u: u.clock_ghz)
            return operations / (rate * unit.clock_ghz * 1e9 * min(self.threads, unit.count))
        work = step.layer.macs or operations
        try:
            return work / self.spec.macs_per_second(precision, step.layer.operator_kind, self.threads)
        except PrecisionError:
            return None  # the spec has no rate: a layer that runs all the same, such as softmax in an integer plan


def _operations(step: Step) -> int:
    layer = step.layer
    assert step.request is not None
    if layer is not None and layer.macs:
        return 2 * layer.macs
    return math.prod(step.request.operator.output_shape)


def _activation_bytes(step: Step) -> int:
    request = step.request
    assert request is not None
    shapes = [*input_shapes(request.operator), request.operator.output_shape]
    storages = [*request.inputs, request.output]
    return sum(
        math.prod(shape) * np.dtype(STORAGE_DTYPE[storage]).itemsize
        for shape, storage in zip(shapes, storages, strict=True)
    )


def _weight_bytes(step: Step) -> int:
    """Bytes of an anchor's weights as its kernel reads them: a byte for each code, whatever its width."""
    if step.request is None or not isinstance(step.request.operator, (Conv2D, Dense)):
        return 0
    sizes = {"int8": 1, "float32": 4}
    return (
        math.prod(step.request.operator.weight_shape) * step.request.weight_points * sizes.get(step.request.weights, 2)
    )
