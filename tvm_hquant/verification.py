"""Checks a compiled artifact against the arithmetic contract, tensor by tensor, on the machine where it runs.

The steps of the plan are derived again from the artifact's own files. Every kernel of the compiled library is called, here
or over TVM's RPC on a board, with the tensors that the kernels before it made, and its result is compared bit for bit
with what :func:`tvm_hquant.numerics.evaluate` says for the same inputs. Then the whole module runs, and its outputs are
compared with those of the chain.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvm_hquant import numerics
from tvm_hquant.errors import ArtifactError, DataError
from tvm_hquant.kernels.interface import KernelFamily
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.layer_record import graph_from_record
from tvm_hquant.layers import LayerGraph
from tvm_hquant.plan import PrecisionPlan, load_plan
from tvm_hquant.precision import Arithmetic
from tvm_hquant.progress import Progress, silent_progress
from tvm_hquant.relax_ir.kernel_calls import is_view, kernel_symbol
from tvm_hquant.relax_ir.relax_functions import function_identifier
from tvm_hquant.runtime import Artifact
from tvm_hquant.simulator.program import Program, ProgramBuilder, Step
from tvm_hquant.target_spec import read_target_spec
from tvm_hquant.tensor_format import STORAGE_DTYPE

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TensorCheck:
    """One tensor, over all samples that were compared.

    ``kernel`` is the compiled function, ``elements`` how many values were compared, ``different`` how many differ, and
    ``largest`` the largest difference in stored units. ``note`` says why a tensor was not compared.
    """

    layer: str
    tensor: str
    kernel: str
    elements: int
    different: int
    largest: float
    note: str = ""


@dataclass(frozen=True)
class VerificationReport:
    """``checks`` in execution order; ``outputs_equal`` compares the whole module with the chain of its kernels."""

    checks: tuple[TensorCheck, ...]
    outputs_equal: bool
    samples: int
    device: str

    @property
    def holds(self) -> bool:
        """Whether everything that was compared is equal, bit for bit."""
        return self.outputs_equal and all(check.different == 0 for check in self.checks)


class _Board:
    """Where the library runs: this machine, or one behind an RPC server."""

    def __init__(self, artifact: Artifact, rpc: str | None) -> None:
        self.name = rpc or "this machine"
        if rpc is None:
            self.device = artifact.device
            self.library = artifact.library
            self.machine = artifact.machine
            return
        host, _, port = rpc.rpartition(":")
        if not host or not port.isdigit():
            raise DataError(f"--rpc {rpc!r} is not HOST:PORT, such as 192.0.2.7:9090")
        try:
            session = tvm.rpc.connect(host, int(port), session_timeout=600)
            session.upload(str(artifact.folder / artifact.manifest["library"]))
            self.library = session.load_module(artifact.manifest["library"])
        except (RuntimeError, OSError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ArtifactError(
                f"cannot use the RPC server at {rpc}: {lines[-1]}; start it on the board with "
                f"'python3 -m tvm.exec.rpc_server --port {port}'"
            ) from None
        self.device = session.cuda(0) if artifact.manifest["target"]["device"] == "cuda" else session.cpu(0)
        self.machine = tvm.relax.VirtualMachine(self.library, self.device)

    def function(self, symbol: str) -> Any:
        return self.library.get_function(symbol, query_imports=True)

    def tensor(self, array: Array) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self.device)


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
        ArtifactError: files are missing or damaged, or the library lacks a kernel that the plan needs.
        DataError: a sample does not fit the model.
    """
    plan, program = artifact_program(artifact)
    spec = read_target_spec(artifact.manifest["target"]["spec"], "the artifact's target spec")
    families = families_for_target(spec.instruction_sets)
    board = _Board(artifact, rpc)
    given = list(inputs) if inputs is not None else random_inputs(artifact.manifest, plan)
    samples = [_checked_sample(artifact, sample) for sample in given]
    tallies: dict[int, list[float]] = {}
    equal = True
    for sample in progress("verifying", samples, len(samples)):
        chain = _check_sample(program, families, board, sample, tallies)
        results = board.machine["main"](*(board.tensor(sample[name]) for name in _input_names(artifact.manifest)))
        outputs = [results] if hasattr(results, "numpy") else list(results)
        expected = [chain[key] for key in program.outputs]
        equal &= all(_differences(o.numpy(), e)[0] == 0 for o, e in zip(outputs, expected, strict=True))
    checks = tuple(_check(step, families, tallies[number]) for number, step in enumerate(program.steps))
    return VerificationReport(checks, equal, len(samples), board.name)


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
    builder = ProgramBuilder(graph, plan.layer_weights)
    return plan, builder.program(plan.precisions(), plan.scales)


def _float_weights(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is damaged ({error}); compile the model again") from None


def _check_plan(plan: PrecisionPlan, graph: LayerGraph, folder: Path) -> None:
    """The artifact holds weights only for the precisions that it was compiled with."""
    precisions = plan.precisions()
    for layer in graph.layers:
        precision = precisions.get(layer.name)
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


def _checked_sample(artifact: Artifact, sample: Mapping[str, Array]) -> dict[str, Array]:
    arrays = artifact.checked_inputs(sample)
    batch = artifact.manifest["inputs"][0]["shape"][0]
    count = len(next(iter(arrays.values())))
    if count != batch:
        raise DataError(f"a sample to verify with holds {count} rows, the model was compiled for {batch}")
    return arrays


def _check_sample(
    program: Program,
    families: Sequence[KernelFamily],
    board: _Board,
    sample: Mapping[str, Array],
    tallies: dict[int, list[float]],
) -> dict[int, Array]:
    values: dict[int, Array] = dict(enumerate(sample.values()))
    for number, step in enumerate(program.steps):
        tally = tallies.setdefault(number, [0, 0, 0.0])
        inputs = [values[key] for key in step.inputs]
        if step.request is None:
            assert step.layer is not None
            own = board.machine[function_identifier(step.layer.name)]
            values[step.key] = own(*map(board.tensor, inputs)).numpy()
            continue
        assert step.constants is not None
        if is_view(step.request):
            values[step.key] = inputs[0].reshape(step.request.operator.output_shape)
            continue
        actual = _call(step, families, board, inputs)
        expected = numerics.evaluate(step.request, step.constants, inputs)
        different, largest = _differences(actual, expected)
        tally[0] += actual.size
        tally[1] += different
        tally[2] = max(tally[2], largest)
        values[step.key] = actual
    return values


def _call(step: Step, families: Sequence[KernelFamily], board: _Board, inputs: Sequence[Array]) -> Array:
    assert step.request is not None
    assert step.constants is not None
    kernel = select_kernel(families, step.request)
    output = board.tensor(np.zeros(step.request.operator.output_shape, STORAGE_DTYPE[step.request.output]))
    arguments = [board.tensor(a) for a in (*inputs, *kernel.pack(step.constants))]
    try:
        function = board.function(kernel_symbol(kernel))
    except (AttributeError, RuntimeError):
        raise ArtifactError(
            f"the library has no kernel {kernel_symbol(kernel)} for {step.tensor}: it was made by another release or from "
            "another plan; compile the model again"
        ) from None
    function(*arguments, output)
    result: Array = output.numpy()
    return result


def _check(step: Step, families: Sequence[KernelFamily], tally: Sequence[float]) -> TensorCheck:
    layer = step.layer.name if step.layer is not None else f"convert to {step.format.dtype}"
    if step.request is None:
        return TensorCheck(layer, step.tensor, "tvm", 0, 0, 0.0, "TVM's own operator, outside the contract")
    if is_view(step.request):
        return TensorCheck(layer, step.tensor, "view", 0, 0, 0.0, "the same memory in another shape")
    kernel = select_kernel(families, step.request).name
    return TensorCheck(layer, step.tensor, kernel, int(tally[0]), int(tally[1]), float(tally[2]))


def _differences(actual: Array, expected: Array) -> tuple[int, float]:
    """How many elements differ in their bits (all NaN count as one value), and by how much at most."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return max(actual.size, 1), float("inf")
    both_nan = np.isnan(actual) & np.isnan(expected) if actual.dtype.kind == "f" else np.zeros(actual.shape, bool)
    bits = f"u{actual.dtype.itemsize}"
    different = (np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)) & ~both_nan
    count = int(different.sum())
    if count == 0:
        return 0, 0.0
    with np.errstate(invalid="ignore"):
        gaps = np.abs(actual[different].astype(np.float64) - expected[different].astype(np.float64))
    return count, float(np.nan_to_num(gaps, nan=np.inf).max())


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
