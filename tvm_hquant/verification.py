"""Checks a compiled artifact against the arithmetic contract, tensor by tensor, on the machine where it runs.

The steps of the plan are derived again from the artifact's own files. Every layer of the compiled library is called, here
or over TVM's RPC on a board, with the constants that were compiled into it and the tensors that the layers before it made;
its result is compared bit for bit with what :func:`tvm_hquant.numerics.evaluate` says for the plan's constants and the
same inputs. So a layer whose constants are not those of the plan is found by itself. Then the whole module runs, and its
outputs are compared with those of the chain of its layers.

Kernels that are not bit-exact (tensor cores on floats) have their results compared with :func:`numerics.tensor_core_limits`
instead. What reads them is compared as everything else, for the inputs that they really made: so the bound of a layer never
hides a difference in another.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant import numerics
from tvm_hquant.deployed_library import DeployedLibrary
from tvm_hquant.errors import ArtifactError, DataError
from tvm_hquant.kernel_graph import IN_PLACE
from tvm_hquant.kernels.interface import Kernel
from tvm_hquant.kernels.registry import select_kernel
from tvm_hquant.layer_record import graph_from_record
from tvm_hquant.layers import LayerGraph
from tvm_hquant.operator_codec import to_jsonable
from tvm_hquant.plan import PrecisionPlan, load_plan
from tvm_hquant.precision import Arithmetic
from tvm_hquant.progress import Progress, silent_progress
from tvm_hquant.relax_ir.kernel_calls import is_view
from tvm_hquant.runtime import Artifact
from tvm_hquant.simulator.program import Program, ProgramBuilder, Step
from tvm_hquant.tensor_comparison import ExactValues, ExpectedTensor, WithinLimits, differences

Array = npt.NDArray[Any]

_SAMPLES_AT_ONCE = 8


@dataclass(frozen=True)
class TensorCheck:
    """One tensor, over all samples that were compared.

    ``kernel`` is the compiled function, ``elements`` how many values were compared, ``different`` how many differ, and
    ``largest`` the largest difference in stored units. ``by_bound`` says that values were not compared bit for bit: then
    ``different`` counts those outside of their limits, and ``largest`` is the largest distance from these.
    ``is_outside_contract`` says that TVM itself computes the tensor, and that nothing was compared. ``note`` says why values
    differ: the constants in the library are not those of the plan, or the kernel breaks the contract; or why a tensor was not
    compared.
    """

    layer: str
    tensor: str
    kernel: str
    elements: int
    different: int
    largest: float
    by_bound: bool
    note: str = ""
    is_outside_contract: bool = False


@dataclass(frozen=True)
class VerificationReport:
    """``checks`` in execution order; ``outputs_equal`` compares the whole module with the chain of its layers."""

    checks: tuple[TensorCheck, ...]
    outputs_equal: bool
    samples: int
    device: str

    @property
    def holds(self) -> bool:
        """Whether everything that was compared is equal bit for bit, or within its limits where it was compared by bound."""
        return self.outputs_equal and all(check.different == 0 for check in self.checks)

    @property
    def outside_contract(self) -> tuple[TensorCheck, ...]:
        """What was not compared because TVM itself computes it: there the device may differ from what was simulated."""
        return tuple(check for check in self.checks if check.is_outside_contract)


@dataclass
class _Tally:
    """What was counted for one step so far."""

    elements: int = 0
    different: int = 0
    largest: float = 0.0
    cause: str = ""


def verify_artifact(
    artifact: Artifact,
    inputs: Sequence[Mapping[str, Array]] | None = None,
    rpc: str | None = None,
    progress: Progress = silent_progress,
) -> VerificationReport:
    """Compares an artifact with the contract.

    Args:
        artifact: a loaded or just compiled artifact; for a board it need not run here.
        inputs: samples, each input name to an array with a batch axis; two random ones if not given.
        rpc: ``HOST:PORT`` of a TVM RPC server on the target.
        progress: wraps the loop over samples.

    Raises:
        ArtifactError: files are missing or damaged, or the library lacks a layer of the plan.
        DataError: a sample does not fit the model.
    """
    plan, program = artifact_program(artifact)
    library = DeployedLibrary(artifact, rpc)
    stored = library.stored_outputs(program)
    kernels = {key: kernel for key, kernel in stored.kernels.items() if key not in stored.concats}
    in_place = {*stored.concats, *stored.names}
    for step in program.steps:
        if step.request is not None and not is_view(step.request) and step.key not in (*kernels, *in_place):
            kernels[step.key] = select_kernel(library.families, step.request)
    given = list(inputs) if inputs is not None else random_inputs(artifact.manifest, plan)
    samples = [_checked_sample(artifact, sample) for sample in given]
    tallies = [_Tally() for _ in program.steps]
    equal = True
    chunks = [samples[first : first + _SAMPLES_AT_ONCE] for first in range(0, len(samples), _SAMPLES_AT_ONCE)]
    for chunk in progress("verifying", chunks, len(chunks)):
        values = [library.run_layers(program, sample) for sample in chunk]
        for step, tally in zip(program.steps, tallies, strict=True):
            _compare_step(step, kernels.get(step.key), library, values, tally)
        for sample, own in zip(chunk, values, strict=True):
            expected = [own[key] for key in program.outputs]
            equal &= all(differences(o, e)[0] == 0 for o, e in zip(library.run(sample), expected, strict=True))
    checks = tuple(
        _check(step, kernels.get(step.key), tally) for step, tally in zip(program.steps, tallies, strict=True)
    )
    return VerificationReport(checks, equal, len(samples), library.name)


def artifact_program(artifact: Artifact) -> tuple[PrecisionPlan, Program]:
    """Plan and steps of an artifact, from its own files.

    Raises:
        ArtifactError: a file is missing or damaged, or the plan is not the one that the artifact was made from.
        PlanError: the plan is damaged.
    """
    folder: Path = artifact.folder
    for name in ("plan.json", "plan.npz", "weights.npz"):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} is incomplete: {name} is missing; compile the model again")
    plan = load_plan(folder / "plan.json")
    graph = graph_from_record(artifact.manifest["graph"], _float_weights(folder / "weights.npz"))
    _check_plan(plan, graph, folder)
    program = ProgramBuilder(graph, plan.layer_weights).program(plan.precisions(), plan.scales)
    _check_formats(program, artifact)
    return plan, program


def _float_weights(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is damaged ({error}); compile the model again") from None


def _check_plan(plan: PrecisionPlan, graph: LayerGraph, folder: Path) -> None:
    """The artifact holds weights only for the precisions that it was compiled with."""
    for layer in graph.layers:
        precision = plan.layers[layer.name].weight_precision if layer.name in plan.layers else None
        if precision is not None and not layer.is_anchor:
            continue
        if precision is None or not (
            layer.weights is not None
            if precision.arithmetic is Arithmetic.FLOAT
            else plan.weight_precisions.get(layer.name) == precision.name
        ):
            raise ArtifactError(
                f"{folder / 'plan.json'} is not the plan that the artifact was made from: it has no weights for layer "
                f"{layer.name} in {precision or 'any precision'}; compile the model again with '--plan'"
            )


def _check_formats(program: Program, artifact: Artifact) -> None:
    """The manifest records how every tensor is stored; the plan must say the same."""
    recorded = artifact.manifest["quantization"]["tensors"]
    other = [name for name, f in program.formats.produced.items() if recorded.get(name) != to_jsonable(f)]
    other += [c.tensor for c in program.conversions if c.name not in {e["name"] for e in artifact.manifest["layers"]}]
    if other:
        raise ArtifactError(
            f"{artifact.folder / 'plan.json'} is not the plan that the artifact was made from: it has other scales or zero "
            f"points for {', '.join(dict.fromkeys(other))}; compile the model again with '--plan'"
        )


def _checked_sample(artifact: Artifact, sample: Mapping[str, Array]) -> dict[str, Array]:
    arrays = artifact.checked_inputs(sample)
    batch = artifact.manifest["inputs"][0]["shape"][0]
    count = len(next(iter(arrays.values())))
    if count != batch:
        raise DataError(f"a sample to verify with holds {count} rows, the model was compiled for {batch}")
    return arrays


def _compare_step(
    step: Step,
    kernel: Kernel | None,
    library: DeployedLibrary,
    values: Sequence[Mapping[int, Array]],
    tally: _Tally,
) -> None:
    """Adds to the tally how what a layer made of its inputs differs from the contract, over some samples."""
    if step.request is None or is_view(step.request):
        return
    inputs = [[own[key] for key in step.inputs] for own in values]
    for own, read, right in zip(values, inputs, _expected(step, kernel, inputs), strict=True):
        different, largest = right.differences(own[step.key])
        tally.elements += own[step.key].size
        tally.different += different
        tally.largest = max(tally.largest, largest)
        if different and not tally.cause:
            tally.cause = _cause(step, kernel, library, read, right)


def _expected(step: Step, kernel: Kernel | None, inputs: Sequence[Sequence[Array]]) -> Sequence[ExpectedTensor]:
    """What a layer must make of its inputs, for each of some samples."""
    assert step.request is not None
    assert step.constants is not None
    if _is_by_bound(kernel):
        limits = [numerics.tensor_core_limits(step.request, step.constants, read) for read in inputs]
        return [WithinLimits(found, step.request.output) for found in limits]
    return [ExactValues(right) for right in numerics.evaluate_samples(step.request, step.constants, inputs)]


def _is_by_bound(kernel: Kernel | None) -> bool:
    """Whether what a kernel makes is compared by bound."""
    return kernel is not None and not kernel.is_bit_exact


def _cause(
    step: Step, kernel: Kernel | None, library: DeployedLibrary, inputs: Sequence[Array], expected: ExpectedTensor
) -> str:
    """Why a layer differs: its kernel is called once more, with the plan's constants in place of the compiled ones."""
    assert step.constants is not None
    actual = library.run_kernel(kernel, step.constants, inputs) if kernel is not None else None
    if actual is None:
        return "the library has another kernel than the plan asks for"
    if expected.differences(actual)[0] == 0:
        return "the constants in the library are not those of the plan"
    return "the kernel computes something else than the contract"


def _check(step: Step, kernel: Kernel | None, tally: _Tally) -> TensorCheck:
    layer = step.layer.name if step.layer is not None else f"convert to {step.format.dtype}"
    if step.request is None:
        return TensorCheck(
            layer, step.tensor, "tvm", 0, 0, 0.0, False, "TVM's own operator, outside the contract", True
        )
    if is_view(step.request):
        return TensorCheck(layer, step.tensor, "view", 0, 0, 0.0, False, "the same memory in another shape")
    name, by_bound = kernel.name if kernel is not None else IN_PLACE, _is_by_bound(kernel)
    note = tally.cause or ("within the bound of tensor cores" if by_bound else "")
    return TensorCheck(layer, step.tensor, name, tally.elements, tally.different, tally.largest, by_bound, note)


def _input_names(manifest: Mapping[str, Any]) -> list[str]:
    return [str(entry["name"]) for entry in manifest["inputs"]]


def random_inputs(manifest: Mapping[str, Any], plan: PrecisionPlan) -> list[dict[str, Array]]:
    """Two samples that fill the calibrated range of every input, and go somewhat beyond it."""
    random = np.random.default_rng(0)
    samples = []
    for _ in range(2):
        sample: dict[str, Array] = {}
        for entry in manifest["inputs"]:
            formats = plan.scales.get(entry["name"], {})
            lower, upper = -2.0, 2.0
            if "uint8" in formats:
                f = formats["uint8"]
                lower, upper = (f.q_min - f.zero_point) * f.scale, (f.q_max - f.zero_point) * f.scale
            spread = 0.1 * (upper - lower)
            sample[entry["name"]] = random.uniform(lower - spread, upper + spread, entry["shape"]).astype(
                entry["dtype"]
            )
        samples.append(sample)
    return samples
