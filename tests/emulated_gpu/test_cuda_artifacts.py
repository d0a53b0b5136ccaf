"""Artifacts for CUDA on an emulated GPU: protects that the kernels, their launches and the exported library are right.

What only a real GPU can show (nvcc's code, threads that run at once, speed) is not shown here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.emulated_gpu.gpu import EmulatedGpu, GpuMissingError, build_gpu
from tests.planned_models import named_plan, partitioned, random_samples, shared_session
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.errors import ToolchainError
from tvm_hquant.target_spec import load_target_spec

SAMPLES = 3


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGpu:
    try:
        return build_gpu(tmp_path_factory.mktemp("gpu"))
    except GpuMissingError as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def _emulated_compiler(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(gpu.home))
    monkeypatch.setenv("EMULATED_GPU_LIBRARIES", str(gpu.kernels))


@pytest.mark.parametrize(
    ("model", "plan"), [("residual", "mixed"), ("residual", "a8w8"), ("residual", "float32"), ("branches", "mixed")]
)
def test_outputs_equal_the_simulation(gpu: EmulatedGpu, tmp_path: Path, model: str, plan: str) -> None:
    """Integers, float32, bfloat16, float16, pools, softmax, sigmoid, two outputs: every bit is that of the simulator.

    Without what is within a bound only: so ``rules.bit_exact`` has it.
    """
    session, made = shared_session(model), named_plan(model, plan)
    artifact = compile_artifact(partitioned(model), made, load_target_spec("cuda-sm90").bit_exact_part(), name=model)
    assert all(layer["bit_exact"] for layer in artifact.manifest["layers"])
    inputs = random_samples(session, SAMPLES)
    outputs = gpu.run(artifact.save(tmp_path / "artifact").folder, inputs, tmp_path)
    program = session.builder.program(made.precisions(), made.scales, made.layer_weights)
    session.engine.compile([program])
    rows = [session.engine.run({n: a[i : i + 1] for n, a in inputs.items()}, [program])[0] for i in range(SAMPLES)]
    expected = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    for name, values in zip(session.graph.output_names, expected, strict=True):
        assert np.ptp(values) > 0
        np.testing.assert_array_equal(outputs[name].view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize(("target", "bounded"), [("cuda-sm90", ["merge"]), ("cuda-sm75", ["stem", "merge"])])
def test_layers_on_tensor_cores_are_verified_by_bound(
    gpu: EmulatedGpu, tmp_path: Path, target: str, bounded: list[str]
) -> None:
    """Layers that tensor cores sum in float are compared with their limits and named; all others, behind them too, bit for bit.

    A bound is no excuse: weights that are not those of the plan are found, and that it is them.
    """
    made = named_plan("branches", "float16")
    artifact = compile_artifact(partitioned("branches"), made, load_target_spec(target)).save(tmp_path / "artifact")
    assert [layer["name"] for layer in artifact.manifest["layers"] if not layer["bit_exact"]] == bounded
    done = gpu.hquant("verify", artifact.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"compared by bound, not bit for bit: {', '.join(bounded)}" in done.stdout
    assert f"{len(bounded)} of {len(bounded)} within their bound" in done.stdout
    assert "whole module equal" in done.stdout
    _scale_weights(artifact.folder / "weights.npz", "merge", 1.02)
    done = gpu.hquant("verify", artifact.folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the constants in the library are not those of the plan" in done.stdout
    assert f"{len(bounded) - 1} of {len(bounded)} within their bound" in done.stdout


def _scale_weights(path: Path, layer: str, factor: float) -> None:
    """Multiplies the weights of a layer in an artifact's file."""
    with np.load(path) as archive:
        arrays = {name: array * np.float32(factor if name.startswith(layer) else 1) for name, array in archive.items()}
    np.savez(path, allow_pickle=False, **arrays)


def test_kernels_that_share_memory_would_be_refused(gpu: EmulatedGpu, tmp_path: Path) -> None:
    """Threads run one after the other here, so a kernel that synchronizes them would seem to work and prove nothing."""
    from tvm_hquant.cuda_compilation import compile_kernels

    with pytest.raises(ToolchainError, match="__shared__"):
        compile_kernels("__shared__ int x[4];", "sm_90")
