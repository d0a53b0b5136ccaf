"""Trained networks through the whole pipeline; skipped where the folder of networks is missing (``HQUANT_ZOO``)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnxruntime
import pytest

from benchmarks.bit_exact import compare_model, zoo_plan
from benchmarks.zoo import ZooModel
from tests.onnx_models import zoo_model
from tvm_hquant import api
from tvm_hquant.precision import FLOAT32
from tvm_hquant.session import QuantizationSession

NETWORKS = (
    "kws_dscnn", "cifar10_resnet8_mlperftiny", "cifar10_resnet14_mlperftiny", "cifar10_resnet20", "cifar10_resnet56",
    "cifar10_resnet50", "cifar10_googlenet", "cifar10_shufflenetv1", "vww_mobilenetv1_0.25", "imagenet_mobilenetv1_0.25",
    "imagenet_mobilenetv2_1.0", "imagenet_squeezenet1.1",
)  # fmt: skip

CALIBRATION_SAMPLES = 8

ON_ONE_TARGET = {"cifar10_resnet50": "x86-64-avx2", "cifar10_googlenet": "host"}
"""Networks that take long to compile; their kinds of layers are in smaller ones for the other target."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network of the zoo, imported and calibrated once for all its tests: enough for formats, not for accuracy."""

    model: ZooModel
    session: QuantizationSession


@pytest.fixture(scope="module")
def network(request: pytest.FixtureRequest) -> Network:
    """The network that a test names."""
    model = ZooModel(zoo_model(request.param).name)
    session = api.open_session(str(model.path), "host")
    session.calibrate(model.calibration(), CALIBRATION_SAMPLES)
    return Network(model, session)


@pytest.mark.parametrize("network", NETWORKS, indirect=True)
def test_float32_agrees_with_onnxruntime(network: Network) -> None:
    """Import, canonical form, layout, partition and float kernels together compute what the file says."""
    session = network.session
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = str(network.model.path)
    reference = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for sample in islice(network.model.evaluation(), 2):
        expected = reference.run(None, dict(sample.inputs))
        simulated = session.engine.run(sample.inputs, [session.float_program])[0]
        for ours, theirs in zip(simulated, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "network", ["cifar10_shufflenetv1", "imagenet_mobilenetv1_0.25", "imagenet_squeezenet1.1"], indirect=True
)
def test_uniform_a8w8_converts_only_the_input(network: Network) -> None:
    """Shuffles, slices, pools, additions and concatenations stay in codes from the input to the last layer."""
    session = network.session
    plan = zoo_plan(session, "a8w8")
    program = session.builder.program(plan.precisions(), plan.scales)
    assert [(c.tensor, c.kind) for c in program.conversions] == [("input", "quantize")]
    in_float = [layer for layer in session.graph.layers if plan.precisions()[layer.name] == FLOAT32]
    behind = {layer.name for layer in in_float} | {"output"}
    readers = [n for layer in in_float for n, _ in session.graph.consumers[layer.name] or [("output", 0)]]
    assert set(readers) <= behind, "what is in float stands between the last layer with weights and the output"


@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "cifar10_resnet56"], indirect=True)
def test_mixed_plan_is_deployed_as_simulated(network: Network) -> None:
    """Nine precisions in turn over all layers: module and simulator agree on every sample, layers and contract too.

    On this machine's own instructions, and on plain AVX2. ResNet-56 is ResNet-20 with more layers of the same shapes.
    """
    only = ON_ONE_TARGET.get(network.model.title)
    targets = [only] if only else ["host", "x86-64-avx2"]
    (compared,) = compare_model(network.session, network.model, targets, ["mixed"], 2, 1)
    assert len(compared) == len(targets)
    for comparison in compared:
        assert comparison.samples == 2
        assert comparison.layers > 0
        assert comparison.values > 0
        assert comparison.holds, comparison
