"""Trained networks through the whole pipeline; skipped where the folder of networks is missing (``HQUANT_ZOO``)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnxruntime
import pytest

from benchmarks.bit_exact import compare_model, zoo_plan
from benchmarks.zoo import ZooModel, ZooSource
from tests.onnx_models import zoo_model
from tvm_hquant import api
from tvm_hquant.precision import FLOAT32

NETWORKS = (
    "kws_dscnn", "cifar10_resnet8_mlperftiny", "cifar10_resnet14_mlperftiny", "cifar10_resnet20", "cifar10_resnet56",
    "cifar10_resnet50", "cifar10_googlenet", "cifar10_shufflenetv1", "vww_mobilenetv1_0.25", "imagenet_mobilenetv1_0.25",
    "imagenet_mobilenetv2_1.0", "imagenet_squeezenet1.1",
)  # fmt: skip

CALIBRATION_SAMPLES = 8


@dataclass(frozen=True)
class _SparinglyCalibrated(ZooModel):
    """Calibrated with few samples: enough for formats, too few for accuracy, which nothing here measures."""

    def calibration(self) -> ZooSource:
        return super().calibration().subset(range(CALIBRATION_SAMPLES))


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_agrees_with_onnxruntime(name: str) -> None:
    """Import, canonical form, layout, partition and float kernels together compute what the file says."""
    model = ZooModel(zoo_model(name).name)
    session = api.open_session(str(model.path), "host")
    session.engine.compile([session.float_program])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    reference = onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
    for sample in islice(model.evaluation(), 2):
        expected = reference.run(None, dict(sample.inputs))
        simulated = session.engine.run(sample.inputs, [session.float_program])[0]
        for ours, theirs in zip(simulated, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["cifar10_shufflenetv1", "imagenet_mobilenetv1_0.25", "imagenet_squeezenet1.1"])
def test_uniform_a8w8_converts_only_the_input(name: str) -> None:
    """Shuffles, slices, pools, additions and concatenations stay in codes from the input to the last layer."""
    model = _SparinglyCalibrated(zoo_model(name).name)
    session = api.open_session(str(model.path), "host")
    session.calibrate(model.calibration())
    plan = zoo_plan(session, "a8w8")
    program = session.builder.program(plan.precisions(), plan.scales)
    assert [(c.tensor, c.kind) for c in program.conversions] == [("input", "quantize")]
    in_float = [layer for layer in session.graph.layers if plan.precisions()[layer.name] == FLOAT32]
    behind = {layer.name for layer in in_float} | {"output"}
    readers = [n for layer in in_float for n, _ in session.graph.consumers[layer.name] or [("output", 0)]]
    assert set(readers) <= behind, "what is in float stands between the last layer with weights and the output"


@pytest.mark.parametrize("name", NETWORKS)
def test_mixed_plan_is_deployed_as_simulated(name: str) -> None:
    """Nine precisions in turn over all layers: module and simulator agree on every sample, kernels and contract on one.

    On this machine's own instructions, and on plain AVX2.
    """
    model = _SparinglyCalibrated(zoo_model(name).name)
    (compared,) = compare_model(model, ["host", "x86-64-avx2"], ["mixed"], 2, 1)
    assert len(compared) == 2
    for comparison in compared:
        assert comparison.samples == 2
        assert comparison.layers > 0
        assert comparison.values > 0
        assert comparison.holds, comparison
