"""Protects gradients of layers and weights against central differences in float64, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.float64_network import Float64Network, cross_entropy, linear
from tests.onnx_models import node, onnx_model, random_weights
from tests.planned_models import host_spec
from tvm_hquant.calibration.samples import Sample
from tvm_hquant.errors import DataError
from tvm_hquant.kernels.registry import families_for_target, host_instruction_sets
from tvm_hquant.layers import read_layers
from tvm_hquant.operators import Conv2D, Dense, Window
from tvm_hquant.preparation import prepare_module
from tvm_hquant.sensitivity.gradient import GradientEvaluator
from tvm_hquant.sensitivity.weight_gradient import weight_gradient

Array = npt.NDArray[Any]


def _windows_model() -> Any:
    """Strided, dilated, grouped and depthwise convolutions with uneven padding, and pools."""
    nodes = [
        node("Conv", "x w0 b0", "a", strides=[2, 2], pads=[1, 0, 2, 1]),
        node("LeakyRelu", "a", "b", alpha=0.2),
        node("Conv", "b w1", "c", group=6, dilations=[2, 2], pads=[2, 2, 2, 2]),
        node("Clip", "c low high", "d"),
        node("MaxPool", "d", "e", kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1]),
        node("Conv", "d w2", "f", group=2, pads=[1, 1, 1, 1]),
        node("Concat", "e f", "g", axis=1),
        node("AveragePool", "g", "h", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Flatten", "h", "i"),
        node("Gemm", "i w3 b3", "y", transB=1),
    ]
    weights = random_weights(w0=(6, 4, 3, 3), b0=(6,), w1=(6, 1, 3, 3), w2=(4, 3, 3, 3), w3=(5, 160), b3=(5,))
    limits = {"low": np.float32(-0.6), "high": np.float32(0.7)}
    return onnx_model(nodes, {**weights, **limits}, {"x": (1, 4, 15, 14)})


def _movement_model() -> Any:
    """Slices, pads, channel shuffle, activations, local response normalization, residual, and a softmax at the end."""
    nodes = [
        node("Conv", "x w0 b0", "a", pads=[1, 1, 1, 1]),
        node("LRN", "a", "b", size=3, alpha=0.5, beta=0.75, bias=1.0),
        node("Slice", "b starts ends axes steps", "c"),
        node("Pad", "c pads", "d"),
        node("Conv", "d w1", "e", pads=[1, 1, 1, 1]),
        node("Add", "e d", "f"),
        node("Relu", "f", "g"),
        node("Sigmoid", "g", "h"),
        node("Mul", "g h", "i"),
        node("GlobalAveragePool", "i", "j"),
        node("Flatten", "j", "k"),
        node("Gemm", "k w2", "l", transB=1),
        node("Softmax", "l", "y", axis=1),
    ]
    constants = {
        "starts": np.array([1, 0]), "ends": np.array([8, 8]), "axes": np.array([2, 3]), "steps": np.array([2, 3]),
        "pads": np.array([0, 1, 0, 1, 0, 1, 0, 0]),
    }  # fmt: skip
    return onnx_model(nodes, {**random_weights(w0=(6, 4, 3, 3), b0=(6,), w1=(8, 8, 3, 3), w2=(4, 8)), **constants})


def _evaluator(model: Any) -> tuple[GradientEvaluator, Float64Network]:
    mod = prepare_module(model)
    families = families_for_target(host_instruction_sets())
    return GradientEvaluator(mod, families, host_spec().tvm_target()), Float64Network(read_layers(mod))


@pytest.mark.parametrize("model", [_windows_model, _movement_model])
def test_gradients_are_central_differences(model: Callable[[], Any]) -> None:
    """At the input of every layer and for all weights, in a random direction; and the same again, bit for bit."""
    evaluator, network = _evaluator(model())
    graph, random = network.graph, np.random.default_rng(1)
    shape = graph.inputs["x"].shape
    samples = [Sample({"x": random.normal(size=shape).astype(np.float32)}, label) for label in (1, 3)]
    found = evaluator.mean(samples, evaluator.label, of_weights=True)

    def loss(**changes: Any) -> float:
        ends_in_softmax = graph.by_name[graph.outputs[0]].operator_kind == "softmax"
        losses = []
        for sample in samples:
            outputs = network.logits(sample.inputs, **changes)
            losses.append(cross_entropy(np.log(outputs) if ends_in_softmax else outputs, [sample.label or 0])[0])
        return float(np.mean(losses))

    np.testing.assert_allclose(found.loss, loss(), rtol=1e-5)
    assert found.samples == 2
    step = 1e-6
    for layer in graph.anchors:
        at_input = random.normal(size=graph.tensor_shape(layer.inputs[0]))
        difference = loss(added={layer.name: step * at_input}) - loss(added={layer.name: -step * at_input})
        expected = float(np.sum(found.inputs[layer.name] * at_input))
        np.testing.assert_allclose(difference / (2 * step), expected, rtol=1e-3, atol=1e-5, err_msg=layer.name)
        own = network.weights[layer.name]
        turn = random.normal(size=own.shape)
        difference = loss(weights={layer.name: own + step * turn}) - loss(weights={layer.name: own - step * turn})
        expected = float(np.sum(found.weights[layer.name] * turn))
        np.testing.assert_allclose(difference / (2 * step), expected, rtol=1e-3, atol=1e-5, err_msg=layer.name)
    again = evaluator.mean(samples, evaluator.label)
    for name, values in found.inputs.items():
        np.testing.assert_array_equal(again.inputs[name], values)


def _small_model() -> Any:
    nodes = [
        node("Conv", "x w0", "a"), node("Tanh", "a", "b"), node("Conv", "b w1", "c", group=2), node("Flatten", "c", "d"),
        node("Gemm", "d w2", "y", transB=1),
    ]  # fmt: skip
    return onnx_model(nodes, random_weights(w0=(4, 2, 3, 3), w1=(4, 2, 1, 1), w2=(3, 16)), {"x": (1, 2, 4, 4)})


def test_other_weights() -> None:
    """Gradients at other weights are those of a network that has them, and the model's own come back afterwards."""
    evaluator, network = _evaluator(_small_model())
    sample = Sample({"x": np.random.default_rng(2).normal(size=(1, 2, 4, 4)).astype(np.float32)}, 2)
    own = evaluator.mean([sample], evaluator.label)
    name = network.graph.anchors[1].name
    other = {name: (network.weights[name] * 1.5).astype(np.float32)}
    changed = evaluator.mean([sample], evaluator.label, other, of_weights=True)
    expected = cross_entropy(network.logits(sample.inputs, weights=other), [2])[0]
    np.testing.assert_allclose(changed.loss, expected, rtol=1e-5)
    first = network.graph.anchors[0].name
    turn = np.ones_like(network.weights[first])
    losses = [
        cross_entropy(network.logits(sample.inputs, weights={**other, first: network.weights[first] + s * turn}), [2])[
            0
        ]
        for s in (1e-6, -1e-6)
    ]
    np.testing.assert_allclose(np.sum(changed.weights[first]), (losses[0] - losses[1]) / 2e-6, rtol=1e-3)
    assert evaluator.mean([sample], evaluator.label).loss == own.loss != changed.loss


def test_without_label_the_predicted_class_counts() -> None:
    """The divergence from the model itself has the gradient 0 everywhere, so something else must stand for the label."""
    evaluator, network = _evaluator(_small_model())
    inputs = {"x": np.random.default_rng(4).normal(size=(1, 2, 4, 4)).astype(np.float32)}
    predicted = int(network.logits(inputs)[0].argmax())
    labelled = evaluator.mean([Sample(inputs, predicted)], evaluator.label)
    assert evaluator.mean([Sample(inputs, None)], evaluator.label).loss == labelled.loss
    stationary = evaluator.mean([Sample(inputs, None)], evaluator.probabilities)
    assert max(np.abs(g).max() for g in stationary.inputs.values()) < 1e-6
    with pytest.raises(DataError, match="no sample"):
        evaluator.mean([], evaluator.label)


@pytest.mark.parametrize(
    "operator",
    [
        Conv2D((2, 7, 6, 4), 6, Window((3, 2), (2, 1), (1, 0, 0, 1), (1, 2)), 2),
        Conv2D((1, 5, 5, 3), 3, Window((3, 3), (1, 1), (1, 1, 1, 1)), 3),
        Dense(5, 4, 3),
    ],
)
def test_weight_gradient_is_that_of_a_linear_map(operator: Conv2D | Dense) -> None:
    """⟨g, op(x, W)⟩ is linear in W, so ⟨∂/∂W, W⟩ is its value for every W."""
    random = np.random.default_rng(0)
    x, g = random.normal(size=operator.input_shape), random.normal(size=operator.output_shape)
    shape = operator.weight_shape if isinstance(operator, Conv2D) else (*operator.weight_shape, 1, 1)
    found = weight_gradient(operator, x, g)
    assert found.shape == shape
    for seed in range(3):
        weights = np.random.default_rng(seed).normal(size=shape)
        value = np.sum(g * linear(operator, x, weights))
        np.testing.assert_allclose(np.sum(found * weights), value, rtol=1e-10)
