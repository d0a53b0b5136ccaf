"""Real architectures with random weights, from the files inside the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from benchmarks.light_networks import NETWORKS
from tests.light_models import light_model_path, load_random_weights, without_final_softmax
from tests.onnx_models import random_inputs
from tests.pipeline_checks import assert_deployed_as_simulated, import_model, uniform_plan
from tvm_hquant.layers import read_layers
from tvm_hquant.operators import LocalResponseNormalization, Opaque
from tvm_hquant.preparation import prepare_module


def test_every_network_is_in_the_benchmark() -> None:
    """The benchmark lists what the onnx package holds."""
    folder = light_model_path("squeezenet").parent
    assert sorted(NETWORKS) == sorted(path.stem.removeprefix("light_") for path in folder.glob("light_*.onnx"))


@pytest.mark.parametrize(
    "name", ["squeezenet", "shufflenet", "inception_v1", "inception_v2", "resnet50", "densenet121"]
)
def test_every_operator_has_a_kernel(name: str) -> None:
    """None of these networks leaves an operator to TVM; local response normalization is one layer."""
    graph = read_layers(prepare_module(load_random_weights(onnx.load(light_model_path(name)), 0)))
    assert [layer.name for layer in graph.layers if isinstance(layer.operator, Opaque)] == []
    normalizations = [layer.name for layer in graph.layers if isinstance(layer.operator, LocalResponseNormalization)]
    numbers = range(2 if name == "inception_v1" else 0)
    assert normalizations == [f"local_response_normalization_{number}" for number in numbers]


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "inception_v1"])
def test_float_and_a8w8(name: str) -> None:
    """Float32 gives what ONNX Runtime gives; a8w8 compiles, every layer has a reason, the module equals the simulator."""
    model = without_final_softmax(load_random_weights(onnx.load(light_model_path(name)), 0))
    imported = import_model(model, random_inputs(model))
    for output, expected in zip(imported.float_outputs(), imported.expected, strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))
    plan = uniform_plan(imported.session, "a8w8")
    assert set(plan.layers) == {layer.name for layer in imported.session.graph.layers}
    assert all(decision.precision and decision.reason for decision in plan.layers.values())
    assert_deployed_as_simulated(imported, plan)
