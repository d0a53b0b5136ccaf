"""Achieved against possible: every kernel of a compiled network on this machine beside what the target spec lets it reach.

The roofline model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4), 2009): a kernel takes at least as long as its arithmetic at the unit's rate, and as its memory
traffic at the memory's bandwidth. Only what cannot stay in the last-level cache from one call to the next counts as traffic:
the weights if those of the whole network exceed it, activations that exceed it alone. The unit's rate is the peak that the spec
names, at the clock that this machine has and with its memory, if the spec describes machines of its kind; products with padding
need not be computed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy.typing as npt

from tvm_hquant.concat_parts import part_name
from tvm_hquant.errors import ArtifactError, PrecisionError
from tvm_hquant.kernel_graph import IN_PLACE
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.operators import Concat
from tvm_hquant.runtime import Artifact
from tvm_hquant.simulator.program import Program, Step
from tvm_hquant.step_work import activation_bytes, operations, rated, share_on_map, weight_bytes
from tvm_hquant.target_spec import TargetSpec, read_target_spec
from tvm_hquant.target_spec.core_probe import measure_core
from tvm_hquant.target_spec.detect import cache_fields, copy_bandwidth_gb_per_s
from tvm_hquant.verification import artifact_program, random_inputs

Array = npt.NDArray[Any]

_RUNTIME_PREFIX = "vm."
"""Of the virtual machine's own functions, which allocate and check."""


@dataclass(frozen=True)
class KernelProfile:
    """One call of a kernel inside the network.

    Attributes:
        layer: its name; for a conversion ``convert TENSOR``.
        operator: its kind in target specs.
        precision: of the layer; for a conversion the two storages.
        kernel: the compiled function's family and variant; ``tvm`` for an operator that TVM computes.
        microseconds: median over the runs, inside the running network.
        operations: two for each multiply-accumulate; without these, one for each element of the output, in pools for each
            element of their windows; 0 if unknown.
        rated: what the spec's rates count of them: multiply-accumulates, or elements of the output.
        bytes: activations, of which each that is needed is read once, and written once; and weights.
        bound: what limits the possible time, or None where the spec has no rate.
        possible_microseconds: the least time by the roofline; None as ``bound``.
    """

    layer: str
    operator: str
    precision: str
    kernel: str
    microseconds: float
    operations: int
    rated: int
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
    """All kernel calls in order, and the median time of one whole call, measured without looking inside.

    ``clock_ghz`` is that of the roofline's units, the fastest one's if they differ.
    """

    model: str
    target: str
    threads: int
    clock_ghz: float
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
            "clock_ghz": self.clock_ghz,
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
        ArtifactError: this machine cannot run it, files are missing, or the library is not the manifest's.
        DataError: the sample does not fit.
    """
    plan, program = artifact_program(artifact)
    spec = _on_this_machine(read_target_spec(artifact.manifest["target"]["spec"], "the artifact's target spec"))
    sample = artifact.checked_inputs(inputs if inputs is not None else random_inputs(artifact.manifest, plan)[0])
    steps = called_steps(program, artifact.manifest)
    timed = _timed_calls(artifact, sample, repeat)
    if len(timed) != len(steps):
        raise ArtifactError(
            f"the library of {artifact.folder} calls {len(timed)} kernels and its manifest names {len(steps)}: they are not of "
            "one compilation; compile the model again"
        )
    whole = 1e6 * statistics.median(artifact.time(sample, repeat))
    roof = Roof(spec, {n: d.precision for n, d in plan.layers.items()}, threads, sum(map(weight_bytes, program.steps)))
    kernels = tuple(roof.kernel(*called, microseconds) for called, microseconds in zip(steps, timed, strict=True))
    return NetworkProfile(
        str(artifact.manifest["model"]),
        spec.name,
        threads,
        max(unit.clock_ghz for unit in spec.units),
        spec.memory.bandwidth_gb_per_s,
        kernels,
        whole,
    )


def _on_this_machine(spec: TargetSpec) -> TargetSpec:
    """The spec with the clock that this machine has now, and its memory, if it is such a machine; else as it is."""
    target = spec.tvm_target()
    if target.kind.name != "llvm" or not spec.is_timed_here():
        return spec
    clock = measure_core(target, max(unit.channel_alignment for unit in spec.units)).clock_ghz
    bandwidth = max(spec.memory.bandwidth_gb_per_s, copy_bandwidth_gb_per_s())
    memory = spec.memory.model_copy(update={**cache_fields(), "bandwidth_gb_per_s": bandwidth})
    return spec.at_clocks({unit.name: clock for unit in spec.units}).model_copy(update={"memory": memory})


def called_steps(program: Program, manifest: Mapping[str, Any]) -> list[tuple[Step, str]]:
    """The steps whose kernels a compiled network calls, in order, with the names of these kernels.

    The manifest says which kernel each layer has, whatever this release would choose. Layers that only name memory call
    none; a concatenation has a step for each input that is copied into its buffer.
    """
    steps = {step.name: step for step in program.steps}
    for step in program.steps:
        request = step.request
        if request is not None and isinstance(request.operator, Concat):
            for number, shape in enumerate(request.operator.input_shapes):
                part = KernelRequest(Concat((shape,), request.operator.axis), (request.output,), request.output)
                steps[part_name(step.name, number)] = replace(step, request=part)
    return [
        (steps[entry["name"]], str(entry["kernel"]))
        for entry in manifest["layers"]
        if entry["function"] and entry["kernel"] != IN_PLACE
    ]


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


def _timed_calls(artifact: Artifact, sample: Mapping[str, Array], repeat: int) -> list[float]:
    """Median microseconds of every kernel call of one run, in order."""
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
    return [1e6 * statistics.median(seconds for _, seconds in calls) for calls in zip(*runs, strict=True)]


@dataclass(frozen=True)
class Roof:
    """What a target reaches with ``threads`` threads, for a network with ``weights`` bytes of weights.

    ``precisions`` names the precision of each layer.
    """

    spec: TargetSpec
    precisions: Mapping[str, str]
    threads: int
    weights: int

    def kernel(self, step: Step, kernel_name: str, microseconds: float) -> KernelProfile:
        """The profile of one call."""
        activations, weights = activation_bytes(step), weight_bytes(step)
        if step.layer is None:
            assert step.request is not None
            operator, precision = "convert", f"{step.request.inputs[0]} → {step.request.output}"
            layer = f"convert {step.tensor}"
        else:
            operator, layer = step.layer.operator_kind, step.layer.name
            precision = self.precisions[layer] if step.request is not None else "float32"
        compute = self._compute_seconds(step, precision)
        traffic = (self.weights > self._cache) * weights + (activations > self._cache) * activations
        memory = traffic / (self.spec.memory.bandwidth_gb_per_s * 1e9)
        return KernelProfile(
            layer,
            operator,
            precision,
            kernel_name,
            microseconds,
            operations(step),
            rated(step),
            activations + weights,
            None if compute is None else "memory" if memory > compute else "compute",
            None if compute is None else 1e6 * max(memory, compute),
        )

    @cached_property
    def _times_are_its_own(self) -> bool:
        """Whether what is timed here is the hardware that the spec describes."""
        return self.spec.tvm_target().kind.name == "cuda" or self.spec.is_timed_here()

    @property
    def _cache(self) -> int:
        """Bytes of the last-level cache; 0 where the spec names none."""
        memory = self.spec.memory
        return int(1024 * (memory.l3_kib or memory.l2_kib or memory.l1_data_kib or 0))

    def _compute_seconds(self, step: Step, precision: str) -> float | None:
        """Those of the arithmetic at the unit's peak; None for what the spec says nothing of, such as softmax in an integer
        plan, or TVM's own operators, whose arithmetic is not known."""
        if step.request is None or not self._times_are_its_own:
            return None
        if step.layer is None:
            storages = (step.request.inputs[0], step.request.output)
            # Codes of one storage in another scale: the spec names formats, and these two are stored alike.
            source, destination = storages if storages[0] != storages[1] else ("uint8", "int8")
            rate = self.spec.conversion_peak_per_cycle(source, destination)
            unit = max(self.spec.units, key=lambda u: u.clock_ghz)
            return rated(step) / (rate * unit.clock_ghz * 1e9 * min(self.threads, unit.count))
        try:
            peak = self.spec.peak_per_second(precision, step.layer.operator_kind, self.threads)
            return rated(step) * share_on_map(step.layer.operator) / peak
        except PrecisionError:
            return None
