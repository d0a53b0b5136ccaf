"""The folder that is deployed: protects that it is whole or not there, runs anywhere it says, and explains refusals."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.planned_models import (
    host_spec,
    mixed_plan,
    named_plan,
    one_sample,
    partitioned,
    random_samples,
    shared_session,
    simulated,
)
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.errors import ArtifactError, DataError, ToolchainError
from tvm_hquant.plan import load_plan
from tvm_hquant.runtime import Artifact, check_machine, load_artifact, read_manifest
from tvm_hquant.target_spec import load_target_spec

Array = npt.NDArray[Any]


def compiled(model: str, name: str) -> Artifact:
    """The artifact of a small model under a plan, for this machine."""
    return compile_artifact(partitioned(model), named_plan(model, name), host_spec(), name=f"{model}.onnx")


@pytest.fixture(scope="module")
def residual() -> Artifact:
    return compiled("residual", "mixed")


@pytest.fixture(scope="module")
def branches() -> Artifact:
    return compiled("branches", "mixed")


@pytest.fixture
def folder(residual: Artifact, tmp_path: Path) -> Path:
    """A saved artifact that a test may damage."""
    return residual.save(tmp_path / "artifact").folder


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites manifest.json after a change."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def expected_outputs(model: str, inputs: dict[str, Array]) -> tuple[Array, ...]:
    """What the simulator gives sample by sample, joined."""
    session, plan = shared_session(model), named_plan(model, "mixed")
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    count = len(next(iter(inputs.values())))
    rows = [session.engine.run({k: v[i : i + 1] for k, v in inputs.items()}, [program])[0] for i in range(count)]
    return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))


# What it gives.


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_samples_equals_the_simulator(residual: Artifact, branches: Artifact, count: int) -> None:
    """Deployed is what was simulated, bit for bit, for one sample and for more than the compiled batch."""
    for artifact, model in ((residual, "residual"), (branches, "branches")):
        inputs = random_samples(shared_session(model), count, seed=count)
        outputs = artifact.run(inputs)
        assert list(outputs) == list(shared_session(model).graph.output_names)
        for ours, theirs in zip(outputs.values(), expected_outputs(model, inputs), strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_array_equal(ours, theirs)


def test_single_input_needs_no_name_and_labels_are_ignored(residual: Artifact) -> None:
    """An array alone serves a model with one input; an evaluation file's labels do no harm."""
    inputs = random_samples(shared_session("residual"), 2)
    named = residual.run({**inputs, "labels": np.zeros(2)})
    np.testing.assert_array_equal(residual.run(inputs["x"])["logits"], named["logits"])


def test_strided_and_narrower_inputs_are_taken(residual: Artifact) -> None:
    """Views of any strides, and types that float32 holds exactly."""
    values = np.random.default_rng(0).integers(-3, 3, (2, 3, 8, 8))
    expected = residual.run(values.astype("float32"))["logits"]
    np.testing.assert_array_equal(residual.run(values.astype("int16"))["logits"], expected)
    strided = np.ascontiguousarray(values.astype("float32").transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    np.testing.assert_array_equal(residual.run(strided)["logits"], expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "inputs are x; x is missing"),
        ({"y": np.zeros((1, 3, 8, 8), "float32")}, "x is missing; y is unknown"),
        ({"x": np.zeros((1, 3, 8, 9), "float32")}, "input x has shape 1×3×8×9, expected samples×3×8×8"),
        ({"x": np.zeros((3, 8, 8), "float32")}, "input x has shape 3×8×8, expected samples×3×8×8"),
        ({"x": np.zeros((1, 3, 8, 8), "float64")}, "input x is float64, expected float32"),
        ({"x": np.zeros((0, 3, 8, 8), "float32")}, "no samples"),
        ({"x": np.full((1, 3, 8, 8), "a")}, "input x is <U1, expected float32"),
    ],
)
def test_wrong_inputs_are_explained(residual: Artifact, inputs: dict[str, Array], message: str) -> None:
    """Names, shapes and types, each with what was expected."""
    with pytest.raises(DataError) as caught:
        residual.run(inputs)
    assert message in str(caught.value)


def test_timing_runs_the_whole_module(residual: Artifact) -> None:
    """As many times as asked for, in seconds."""
    times = residual.time(random_samples(shared_session("residual"), 1), repeat=3)
    assert len(times) == 3
    assert all(0 < t < 1 for t in times)


# What the folder holds.


def test_manifest_says_what_runs(folder: Path) -> None:
    """Inputs, outputs, target, a kernel for every layer, and the hash of every file."""
    manifest = read_manifest(folder)
    assert manifest["model"] == "residual.onnx"
    assert manifest["inputs"] == [{"name": "x", "shape": [1, 3, 8, 8], "dtype": "float32"}]
    assert manifest["outputs"] == [{"name": "logits", "shape": [1, 10], "dtype": "float32"}]
    assert manifest["target"]["name"] == host_spec().name
    layers = {entry["name"]: entry for entry in manifest["layers"]}
    assert {n: layers[n]["precision"] for n in ("conv1", "conv2", "head")} == {
        "conv1": "a8w8", "conv2": "a16w8", "head": "bfloat16",
    }  # fmt: skip
    assert all(entry["kernel"] for entry in layers.values())
    files = {path.name: path for path in folder.iterdir()}
    assert set(files) == {*manifest["files"], "manifest.json"}
    assert set(manifest["files"]) == {"model.so", "plan.json", "plan.npz", "weights.npz"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
    assert load_plan(folder / "plan.json").layers == named_plan("residual", "mixed").layers


def test_same_plan_gives_the_same_artifact() -> None:
    """A build can be repeated: library, plan and manifest are the same to the last byte."""
    first, second = compiled("residual", "a8w8"), compiled("residual", "a8w8")
    assert first.manifest == second.manifest
    assert first.manifest["files"]["model.so"], "the manifest holds the hash of the library"


def test_temporary_folder_goes_with_the_object() -> None:
    """An artifact that is not saved leaves nothing behind."""
    artifact = compiled("residual", "float32")
    where = artifact.folder
    assert where.is_dir()
    del artifact
    assert not where.exists()


# Saving.


def names_beside(path: Path) -> list[str]:
    """All names in the folder that holds ``path``, hidden ones too."""
    return sorted(p.name for p in path.parent.iterdir())


def test_saved_artifact_stands_alone(residual: Artifact, tmp_path: Path) -> None:
    """Nothing else is left in the parent folder, missing parents are made, and saving onto itself is no harm."""
    saved = residual.save(tmp_path / "deep" / "artifact")
    assert names_beside(saved.folder) == ["artifact"]
    assert saved.save(saved.folder).folder == saved.folder
    inputs = random_samples(shared_session("residual"), 1, seed=7)
    np.testing.assert_array_equal(load_artifact(saved.folder).run(inputs)["logits"], simulated("residual", "mixed")[0])


def test_an_existing_artifact_is_replaced(residual: Artifact, branches: Artifact, tmp_path: Path) -> None:
    """As a whole: no file of the old one stays."""
    target = tmp_path / "artifact"
    residual.save(target)
    (target / "old.txt").write_text("from before", encoding="utf-8")
    branches.save(target)
    assert read_manifest(target)["model"] == "branches.onnx"
    assert not (target / "old.txt").exists()
    assert names_beside(target) == ["artifact"]


def test_a_replaced_artifact_is_loaded_anew(residual: Artifact, branches: Artifact, tmp_path: Path) -> None:
    """A process that has run what stood in the folder before runs what stands there now, and keeps what it has loaded."""
    before = load_artifact(residual.save(tmp_path / "artifact").folder)
    inputs, other = (random_samples(shared_session(model), 1) for model in ("residual", "branches"))
    outputs = before.run(inputs)
    after = load_artifact(branches.save(tmp_path / "artifact").folder)
    for found, expected in zip(after.run(other).values(), expected_outputs("branches", other), strict=True):
        np.testing.assert_array_equal(found, expected)
    for name, found in before.run(inputs).items():
        np.testing.assert_array_equal(found, outputs[name])


def test_an_empty_folder_may_become_an_artifact(residual: Artifact, tmp_path: Path) -> None:
    """Such as the one that mktemp made."""
    (tmp_path / "empty").mkdir()
    assert read_manifest(residual.save(tmp_path / "empty").folder)["model"] == "residual.onnx"


def test_the_current_folder_may_become_an_artifact(
    residual: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``-o .`` in an empty folder: a path without a name."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    residual.save(".")
    assert read_manifest(tmp_path / "here")["model"] == "residual.onnx"
    assert names_beside(tmp_path / "here") == ["here"]


def test_foreign_folders_and_files_are_not_touched(residual: Artifact, tmp_path: Path) -> None:
    """A wrong -o must never delete somebody's work."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("words", encoding="utf-8")
    with pytest.raises(ArtifactError, match="with other files in it"):
        residual.save(precious)
    with pytest.raises(ArtifactError, match="is a file"):
        residual.save(precious / "thesis.txt")
    with pytest.raises(ArtifactError, match="cannot write the artifact"):
        residual.save(precious / "thesis.txt" / "below")
    assert (precious / "thesis.txt").read_text(encoding="utf-8") == "words"
    assert names_beside(precious / "thesis.txt") == ["thesis.txt"]


@contextmanager
def full_disk(largest_file: int = 4096) -> Iterator[None]:
    """The system refuses to write more than so many bytes to a file, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_no_half_artifact(residual: Artifact, tmp_path: Path) -> None:
    """The error says why, and the folder is not there at all."""
    with full_disk(), pytest.raises(ArtifactError, match=r"cannot write the artifact .*: File too large"):
        residual.save(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_artifact(residual: Artifact, branches: Artifact, folder: Path) -> None:
    """A deployment that fails does not take down what runs."""
    with full_disk(), pytest.raises(ArtifactError):
        branches.save(folder)
    assert read_manifest(folder)["model"] == "residual.onnx"
    assert names_beside(folder) == ["artifact"]
    load_artifact(folder)


def test_a_failing_last_step_keeps_the_old_artifact(
    branches: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the new folder cannot be renamed into place after the old one was moved away."""
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtifactError, match="Input/output error"):
        branches.save(folder)
    assert read_manifest(folder)["model"] == "residual.onnx"
    assert names_beside(folder) == ["artifact"]


def test_full_disk_while_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message, and no temporary folder left behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with full_disk(), pytest.raises((ArtifactError, ToolchainError)):
        compiled("residual", "mixed")
    assert list(tmp_path.glob("tvm_hquant_*")) == []


# Loading.


def test_other_architecture_is_refused(folder: Path) -> None:
    """Before the loader sees a library that it cannot load; what to do is said."""
    edit_manifest(folder, lambda m: m["target"].update(machine="riscv64"))
    with pytest.raises(
        ArtifactError, match=rf"\(riscv64\), this machine is {os.uname().machine}: copy it to the target"
    ):
        load_artifact(folder)
    assert read_manifest(folder)["model"], "its manifest can still be read here"


def test_missing_cpu_features_are_named(folder: Path) -> None:
    """Instead of an illegal instruction."""
    edit_manifest(folder, lambda m: m["target"]["required_cpu_features"].extend(["avx9000", "amx_imaginary"]))
    with pytest.raises(ArtifactError, match=r"does not have \(amx_imaginary, avx9000\)"):
        load_artifact(folder)


def test_a_foreign_artifact_can_be_made_here_and_is_refused_at_run() -> None:
    """Cross-compiled artifacts are made, saved and inspected on a machine that cannot run them."""
    manifest = {"target": {"name": "pi", "machine": "aarch64x", "required_cpu_features": []}}
    with pytest.raises(ArtifactError, match="pi"):
        check_machine(manifest)


def test_folders_that_are_no_artifact(tmp_path: Path) -> None:
    """Missing, empty, a file."""
    with pytest.raises(ArtifactError, match="there is no such folder; 'hquant compile"):
        load_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"cannot read manifest\.json"):
        load_artifact(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="not an artifact"):
        load_artifact(tmp_path / "file")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"version": 99}', '{"version": 1}', '{"version": 1, "inputs": 3}']
)
def test_damaged_manifests(folder: Path, text: str) -> None:
    """Whatever stands in the file, the error names it and says what to do."""
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"manifest\.json.*compile the model again"):
        load_artifact(folder)


def test_missing_library(folder: Path) -> None:
    """A copy that lost a file."""
    (folder / "model.so").unlink()
    with pytest.raises(ArtifactError, match=r"incomplete: model\.so is missing"):
        load_artifact(folder)


def test_damaged_library(folder: Path) -> None:
    """A copy that was cut off."""
    path = folder / "model.so"
    path.unlink()
    path.write_bytes(b"\x7fELF and then nothing")
    with pytest.raises(ArtifactError, match=r"cannot load .*model\.so"):
        load_artifact(folder)


# Other machines.


def test_missing_cross_compiler_is_named() -> None:
    """Which program, and which package has it."""
    spec = load_target_spec("cortex-a72")
    absent = spec.model_copy(update={"target": spec.target.model_copy(update={"cross_compiler": "no-such-compiler"})})
    with pytest.raises(ToolchainError, match="no-such-compiler, which this machine does not have"):
        compile_artifact(partitioned("residual"), named_plan("residual", "a8w8"), absent)


RUNTIME_ONLY = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    names = ("onnx", "onnxruntime", "scipy", "sklearn", "pydantic", "typer", "rich", "ml_dtypes", "tvm.relax")
    def find_spec(self, name, path=None, target=None):
        if any(name == n or name.startswith(n + ".") for n in self.names):
            raise ModuleNotFoundError(f"{name} is not on this board", name=name)

sys.meta_path.insert(0, Absent())
import numpy as np
from tvm_hquant.runtime import load_artifact

outputs = load_artifact(sys.argv[1]).run(dict(np.load(sys.argv[2])))
np.savez(sys.argv[3], **outputs)
print(json.dumps(sorted(name for name in sys.modules if name.startswith("tvm_hquant"))))
"""


def test_runs_where_only_the_runtime_is_installed(folder: Path, tmp_path: Path) -> None:
    """On a board there is TVM's runtime library and NumPy: no compiler, no onnx, nothing else of this package."""
    inputs = random_samples(shared_session("residual"), 2, seed=5)
    np.savez(tmp_path / "inputs.npz", **inputs)  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME_ONLY, str(folder), str(tmp_path / "inputs.npz"), str(tmp_path / "outputs.npz")],
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        "tvm_hquant", "tvm_hquant.bfloat16", "tvm_hquant.cpu_features", "tvm_hquant.errors", "tvm_hquant.mapped_library",
        "tvm_hquant.runtime", "tvm_hquant.stored_weights",
    ]  # fmt: skip
    with np.load(tmp_path / "outputs.npz") as outputs:
        np.testing.assert_array_equal(outputs["logits"], expected_outputs("residual", inputs)[0])


def test_weights_of_9_to_16_bits(tmp_path: Path) -> None:
    """They are two points of few bits: what is deployed is what was simulated, and the file packs both."""
    session = shared_session("residual")
    plan = mixed_plan(session, {"conv1": "a8w9", "conv2": "a12w12", "head": "a16w15"})
    assert {codes.codes.shape[0] for codes in plan.weights.values()} == {2}
    artifact = compile_artifact(partitioned("residual"), plan, host_spec()).save(tmp_path / "wide")
    inputs = one_sample(session)
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    expected = session.engine.run(inputs, [program])[0][0]
    np.testing.assert_array_equal(artifact.run(inputs)["logits"], expected)
    packed = {entry["layer"]: entry["bits"] for entry in read_manifest(artifact.folder)["packed_weights"]}
    assert packed["conv1"] == 5
    assert packed["conv2"] == 6
