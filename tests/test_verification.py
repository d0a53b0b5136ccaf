"""``hquant verify`` is the last witness: protects that it holds for what is right and finds one changed number."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tvm import rpc

from tests.planned_models import host_spec, named_plan, partitioned, random_samples, shared_session
from tvm_hquant import numerics
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.deployed_library import DeployedLibrary
from tvm_hquant.errors import ArtifactError, DataError, HQuantError, PlanError
from tvm_hquant.kernels.interface import KernelRequest, LayerConstants
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.operators import Conv2D, Dense
from tvm_hquant.runtime import Artifact, load_artifact, read_manifest
from tvm_hquant.verification import artifact_program, verify_artifact

Array = npt.NDArray[Any]
Samples = Sequence[Sequence[Array]]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A saved artifact of each small model under its plan ``mixed``."""
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        model: compile_artifact(partitioned(model), named_plan(model, "mixed"), host_spec()).save(folder / model)
        for model in ("residual", "branches")
    }


@pytest.fixture
def residual(artifacts: dict[str, Artifact], tmp_path: Path) -> Path:
    """The folder of an artifact that a test may change."""
    return artifacts["residual"].save(tmp_path / "artifact").folder


def edit_plan(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites plan.json after a change to its document."""
    path = folder / "plan.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def adopt(folder: Path, name: str) -> None:
    """Writes the present hash of a file into the manifest, as somebody would who hides a change."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def packed_weights(folder: Path, layer: str) -> Array:
    """The weights of a layer as its kernel wants them, and as they stand in the library."""
    # Without loading the library: the loader gives one that is loaded again for the same path.
    _, program = artifact_program(Artifact(folder, read_manifest(folder)))
    (step,) = [s for s in program.steps if s.name == layer]
    assert step.request is not None
    assert step.constants is not None
    kernel = select_kernel(families_for_target(host_spec().instruction_sets), step.request)
    return kernel.pack(step.constants)[0]


def edit_weights(folder: Path, key: str, change: Callable[[Array], None]) -> None:
    """Changes an array of plan.npz, and the hash in plan.json with it, as somebody would who hides it."""
    with np.load(folder / "plan.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    change(arrays[key])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    (folder / "plan.npz").write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    edit_plan(folder, lambda document: document["weights"].update(sha256=digest))


@pytest.mark.parametrize("model", ["residual", "branches"])
def test_mixed_plans_hold(artifacts: dict[str, Artifact], model: str) -> None:
    """Every kernel of the compiled library gives the bits that the contract says, and the whole module those of its parts."""
    report = verify_artifact(artifacts[model])
    assert report.holds
    assert report.outputs_equal
    assert report.samples == 2
    compared = [check for check in report.checks if check.elements]
    assert {check.layer for check in compared} >= {layer.name for layer in shared_session(model).graph.anchors}
    _, program = artifact_program(artifacts[model])
    assert len(report.checks) == len(program.steps)
    assert {check.kernel for check in report.checks if not check.elements} <= {"view", "tvm", "in place"}
    assert all(check.note for check in report.checks if not check.elements)


def test_own_samples(artifacts: dict[str, Artifact]) -> None:
    """A user's own inputs count every element once for each sample."""
    data = random_samples(shared_session("residual"), 3)["x"]
    one = verify_artifact(artifacts["residual"], [{"x": data[:1]}])
    three = verify_artifact(artifacts["residual"], [{"x": data[i : i + 1]} for i in range(3)])
    assert three.holds
    assert [3 * check.elements for check in one.checks] == [check.elements for check in three.checks]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("conv1/scales", lambda scales: np.multiply(scales, np.float32(1.5), out=scales)),
        ("conv1/codes", lambda codes: np.negative(codes, out=codes)),
        ("conv2/bias", lambda bias: np.add(bias, np.float32(3), out=bias)),
    ],
)
def test_constants_inside_the_library_are_those_of_the_plan(
    residual: Path, key: str, change: Callable[[Array], None]
) -> None:
    """Scales, codes or a bias that differ from what was compiled: their layer is named, and that it is the constants."""
    edit_weights(residual, key, change)
    report = verify_artifact(load_artifact(residual))
    assert not report.holds
    assert report.outputs_equal, "the library agrees with itself"
    (wrong,) = [check for check in report.checks if check.different]
    assert wrong.layer == key.partition("/")[0]
    assert wrong.note == "the constants in the library are not those of the plan"


def test_a_byte_changed_in_the_library(residual: Path) -> None:
    """One bit of one weight, flipped in the file itself: the layer that computes with it is named, and no other."""
    path, library = residual / "model.so", (residual / "model.so").read_bytes()
    packed = packed_weights(residual, "conv1")
    position = library.index(packed.tobytes())
    changed = bytearray(library)
    changed[position + int(np.abs(packed).argmax())] ^= 0x40
    path.unlink()
    path.write_bytes(bytes(changed))
    adopt(residual, "model.so")
    report = verify_artifact(load_artifact(residual))
    (wrong,) = [check for check in report.checks if check.different]
    assert (wrong.layer, wrong.note) == ("conv1", "the constants in the library are not those of the plan")
    assert not report.holds


def test_a_wrong_kernel_is_named(artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one kernel and the contract disagree in one element, its tensor, layer and kernel are in the report."""
    evaluate = numerics.evaluate_samples

    def other_contract(request: KernelRequest, constants: LayerConstants, samples: Samples) -> list[Array]:
        results = [array.copy() for array in evaluate(request, constants, samples)]
        if isinstance(request.operator, Dense):
            for result in results:
                result[0, 0] += np.float32(0.25)
        return results

    monkeypatch.setattr(numerics, "evaluate_samples", other_contract)
    report = verify_artifact(artifacts["residual"])
    assert not report.holds
    assert report.outputs_equal, "the library agrees with itself"
    (wrong,) = [check for check in report.checks if check.different]
    assert (wrong.tensor, wrong.layer, wrong.elements, wrong.different) == ("head", "head", 20, 2)
    assert wrong.largest == pytest.approx(0.25, abs=1e-3)
    assert wrong.kernel
    assert wrong.note == "the kernel computes something else than the contract"


def test_nan_equals_nan_and_zero_is_not_minus_zero(
    artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits are compared, not values: a difference that NumPy's equality would not see is one."""
    evaluate = numerics.evaluate_samples

    def other_zero(request: KernelRequest, constants: LayerConstants, samples: Samples) -> list[Array]:
        results = evaluate(request, constants, samples)
        is_changed = request.output == "float32" and isinstance(request.operator, Conv2D)
        return [np.copysign(result, -1) for result in results] if is_changed else results

    monkeypatch.setattr(numerics, "evaluate_samples", other_zero)
    silent = verify_artifact(artifacts["residual"], [{"x": np.zeros((1, 3, 8, 8), "float32")}])
    (wrong,) = [check for check in silent.checks if check.different]
    assert wrong.tensor == "conv2"


def test_changed_scales_are_found(residual: Path) -> None:
    """Scales of tensors in plan.json that are not those that were compiled."""

    def widen(document: dict[str, Any]) -> None:
        for codes in document["tensors"].values():
            codes["uint8"]["scale"] *= 3

    edit_plan(residual, widen)
    with pytest.raises(ArtifactError, match=r"other scales or zero points for .*x; compile the model again"):
        verify_artifact(load_artifact(residual))


@pytest.mark.parametrize(("layer", "precision"), [("head", "a8w8"), ("conv1", "a8w4"), ("conv1", "float32")])
def test_an_edited_plan_is_not_that_of_the_artifact(residual: Path, layer: str, precision: str) -> None:
    """A precision that was edited after compiling has no weights in the artifact: layer, precision and way out are said."""
    edit_plan(residual, lambda document: document["layers"][layer].update(precision=precision))
    with pytest.raises(ArtifactError, match=rf"no weights for layer {layer} in {precision}; compile the model again"):
        verify_artifact(load_artifact(residual))


def test_a_plan_without_a_layer(residual: Path) -> None:
    """Nor has a layer that was deleted from the plan."""
    edit_plan(residual, lambda document: document["layers"].pop("max_pool2d_0"))
    with pytest.raises(ArtifactError, match="layer max_pool2d_0 in any precision"):
        verify_artifact(load_artifact(residual))


def test_a_library_of_another_plan_is_explained(residual: Path, artifacts: dict[str, Artifact]) -> None:
    """The library of another model in this folder: it has not the layers of this plan."""
    library = (artifacts["branches"].folder / "model.so").read_bytes()
    (residual / "model.so").unlink()
    (residual / "model.so").write_bytes(library)
    adopt(residual, "model.so")
    with pytest.raises(ArtifactError, match=r"the library has no layer .*compile the model again"):
        verify_artifact(load_artifact(residual))


@pytest.mark.parametrize("name", ["plan.json", "plan.npz", "weights.npz"])
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_damaged_files_are_explained(residual: Path, name: str, damage: str) -> None:
    """Every file that verification reads may be lost or broken: the error names the folder or the file."""
    path = residual / name
    data = path.read_bytes()
    path.unlink()
    if damage == "cut off":
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(HQuantError, match=rf"{residual}") as caught:
        verify_artifact(load_artifact(residual))
    assert isinstance(caught.value, (ArtifactError, PlanError))


@pytest.mark.parametrize("address", ["board", "board:", ":9090", "board:nine"])
def test_wrong_rpc_addresses(artifacts: dict[str, Artifact], address: str) -> None:
    """The form is checked before anything is sent."""
    with pytest.raises(DataError, match="is not HOST:PORT"):
        verify_artifact(artifacts["residual"], rpc=address)


def test_layers_that_write_in_place_are_verified_over_rpc(tmp_path: Path) -> None:
    """Such a layer gives back what it was given, which a server cannot send as it sends other tensors."""
    plan = named_plan("branches", "float32")
    artifact = compile_artifact(partitioned("branches"), plan, host_spec()).save(tmp_path / "artifact")
    stored = DeployedLibrary(artifact).stored_outputs(artifact_program(artifact)[1])
    assert [kernel for kernel in stored.kernels.values() if kernel.request.overwritten is not None]
    assert [part for part in stored.parts.values() if not part.makes_buffer]
    server = rpc.Server("127.0.0.1", port=19500, port_end=19700, silent=True)
    try:
        report = verify_artifact(artifact, rpc=f"127.0.0.1:{server.port}")
    finally:
        server.terminate()
    assert report.holds


def test_nobody_at_the_rpc_address(artifacts: dict[str, Artifact]) -> None:
    """And how to start a server is said."""
    with pytest.raises(ArtifactError, match=r"cannot use the RPC server at 127\.0\.0\.1:1: .*rpc_server"):
        verify_artifact(artifacts["residual"], rpc="127.0.0.1:1")


def test_wrong_samples(artifacts: dict[str, Artifact]) -> None:
    """Samples of another model are refused with the names and shapes that are expected."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("y", (1, 3, 8, 8)), ("x", (1, 3, 9, 9)), ("x", (2, 3, 8, 8))]
    for (name, shape), message in zip(shapes, ("x is missing", "expected samples×3×8×8", "holds 2 rows"), strict=True):
        with pytest.raises(DataError, match=message):
            verify_artifact(artifacts["residual"], [{name: np.zeros(shape, "float32")}])


def test_the_graph_of_the_artifact_is_the_model(artifacts: dict[str, Artifact]) -> None:
    """Verification needs no model file: the record has every layer, and the weights that the plan does not hold."""
    manifest = read_manifest(artifacts["branches"].folder)
    recorded = {entry["name"] for entry in manifest["graph"]["layers"]}
    assert recorded == set(shared_session("branches").graph.by_name)
    with np.load(artifacts["branches"].folder / "weights.npz") as weights:
        assert set(weights.files) == {"merge/weights", "merge/bias"}
