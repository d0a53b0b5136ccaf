"""Artifacts for Cortex-A76 and Cortex-A72 run on the emulated board: protects that deployed is what was simulated here.

``benchmarks/emulated_boards.py`` does the same with trained networks.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.emulated_board.board import Board
from tests.emulated_board.board_artifacts import BoardResults, Job, run_artifacts
from tests.planned_models import mixed_plan, named_plan, random_samples, shared_session
from tvm_hquant import api
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.calibration.data import open_data
from tvm_hquant.cli.application import application
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.quickstart import calibration_path, evaluation_path, model_path
from tvm_hquant.runtime import Artifact
from tvm_hquant.session import QuantizationSession
from tvm_hquant.target_spec import load_target_spec

Array = npt.NDArray[Any]

CPUS = ("cortex-a76", "cortex-a72")
MIXED = ("a8w8", "a16w8", "float32", "int8", "a8w4", "a16w16", "w4")
RUNTIME_MODULES = {
    "tvm_hquant",
    *(
        f"tvm_hquant.{name}"
        for name in ("bfloat16", "cpu_features", "errors", "mapped_library", "runtime", "stored_weights")
    ),
}
SAMPLES = 5


@cache
def digits_session() -> QuantizationSession:
    """The quickstart network, calibrated with a part of its data."""
    session = api.open_session(str(model_path()), "host", observer="min-max")
    with np.load(calibration_path()) as data:
        session.calibrate(open_data({"input": data["input"][:16]}, session.signature))
    return session


@cache
def plan_and_inputs(model: str) -> tuple[QuantizationSession, PrecisionPlan, Mapping[str, Array]]:
    """A model with a plan in which many precisions meet, and samples for it."""
    if model == "residual":
        session = shared_session(model)
        return session, named_plan(model, "mixed"), random_samples(session, SAMPLES)
    session = digits_session()
    names = [layer.name for layer in session.graph.anchors]
    plan = mixed_plan(session, {name: MIXED[i % len(MIXED)] for i, name in enumerate(names)})
    with np.load(evaluation_path()) as data:
        return session, plan, {"input": data["input"][:SAMPLES]}


@cache
def artifact(model: str, cpu: str) -> Artifact:
    """A model's artifact for the shipped spec of a CPU."""
    session, plan, _ = plan_and_inputs(model)
    return compile_artifact(session.mod, plan, load_target_spec(cpu), name=model)


def simulated(model: str) -> dict[str, Array]:
    """What the simulator gives on this machine, sample by sample."""
    session, plan, inputs = plan_and_inputs(model)
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    rows = [session.engine.run({n: a[i : i + 1] for n, a in inputs.items()}, [program])[0] for i in range(SAMPLES)]
    joined = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    return dict(zip(session.graph.output_names, joined, strict=True))


@pytest.fixture(scope="module")
def results(emulated_board: Board, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BoardResults]:
    """What each CPU gave for the artifacts made for it, and the Cortex-A72 for one made for the Cortex-A76."""
    found = {}
    for cpu in CPUS:
        jobs = [Job(model, artifact(model, cpu), plan_and_inputs(model)[2]) for model in ("residual", "digits")]
        if cpu == "cortex-a72":
            jobs.append(Job("other_cpu", artifact("residual", "cortex-a76"), plan_and_inputs("residual")[2]))
        found[cpu] = run_artifacts(emulated_board, cpu, jobs, tmp_path_factory.mktemp(cpu))
    return found


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("model", ["residual", "digits"])
def test_outputs_equal_the_simulation_on_this_machine(results: dict[str, BoardResults], model: str, cpu: str) -> None:
    """A plan is judged on an x86 processor and runs on an Arm one: every bit of the outputs has to be the same."""
    expected = simulated(model)
    outputs = results[cpu].outputs[model]
    assert list(outputs) == list(expected)
    for name, values in expected.items():
        assert np.ptp(values) > 0, "outputs that are all alike compare nothing"
        assert outputs[name].dtype == np.float32
        np.testing.assert_array_equal(outputs[name].view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("cpu", CPUS)
def test_the_runtime_needs_few_files_of_this_package(results: dict[str, BoardResults], cpu: str) -> None:
    """What is deployed must not drag the compiler, onnx or pydantic onto the board."""
    assert set(results[cpu].modules) == RUNTIME_MODULES


def test_missing_instructions_are_refused_by_name(results: dict[str, BoardResults]) -> None:
    """Code with dot products would end with an illegal instruction on a Cortex-A72."""
    assert list(results["cortex-a72"].refusals) == ["other_cpu"]
    refusal = results["cortex-a72"].refusals["other_cpu"]
    assert refusal.startswith("ArtifactError: the artifact for cortex-a76 needs instructions")
    assert "(asimddp)" in refusal
    assert not results["cortex-a76"].refusals


@pytest.mark.parametrize(
    ("cpu", "present", "absent"), [("cortex-a76", "sdot", "sadalp"), ("cortex-a72", r"smlal2?|mla", "[su]dot")]
)
def test_libraries_use_the_instructions_of_their_cpu(
    emulated_board: Board, cpu: str, present: str, absent: str
) -> None:
    """The whole way from the spec to the linked library keeps the multiplications that the spec's rates stand for."""
    made = artifact("digits", cpu)
    library = made.folder / made.manifest["library"]
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    mnemonics = re.findall(r"^\s+[0-9a-f]+:\s+(\S+)\s+v", listing, re.MULTILINE)
    assert len(mnemonics) > 100
    assert sum(re.fullmatch(present, mnemonic) is not None for mnemonic in mnemonics) >= 8
    assert not [mnemonic for mnemonic in mnemonics if re.fullmatch(absent, mnemonic)]


def test_verify_checks_every_tensor_on_the_board(
    emulated_board: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``hquant verify --rpc`` calls the kernels on the board, not on this machine, and compares all their outputs."""
    saved = artifact("residual", "cortex-a72").save(tmp_path / "artifact")
    with emulated_board.start_rpc_server(cpu="cortex-a72") as server:
        address = f"{server.host}:{server.port}"
        application(["verify", str(saved.folder), "--rpc", address, "--verbose"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert all(re.search(rf"\b{layer}\b", printed) for layer in ("conv1", "conv2", "head"))
    found = re.search(rf"(\d+) of (\d+) tensors equal bit for bit on {re.escape(address)}", printed)
    assert found is not None
    assert int(found[1]) == int(found[2]) >= 3
    assert "whole module equal" in printed
