"""Activations spelled as chains: protects that they are recognised by what they compute, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.onnx_models import node, onnx_model
from tvm_hquant.layers import Layer, read_layers
from tvm_hquant.numerics import unary_float32
from tvm_hquant.operator_codec import decode, encode
from tvm_hquant.operators import Add, Composition, Conv2D, Epilogue, Step, Unary
from tvm_hquant.preparation import prepare_module


def layers_of(*nodes: Any, outputs: str = "y", **constants: float) -> tuple[Layer, ...]:
    """The layers of a model of these nodes and numbers."""
    weights = {name: np.float32(value) for name, value in constants.items()}
    return read_layers(prepare_module(onnx_model(nodes, weights, outputs=outputs))).layers


@pytest.mark.parametrize("spelling", ["divide_last", "divide_before", "multiply_by_sixth", "hard_sigmoid", "operator"])
def test_hard_swish_in_every_spelling(spelling: str) -> None:
    """x · clip(x + 3, 0, 6) / 6, however the exporter put it (MobileNetV3, arXiv 1905.02244)."""
    clipped = [node("Add", "x three", "a"), node("Clip", "a zero six", "c")]
    nodes = {
        "divide_last": [*clipped, node("Mul", "x c", "m"), node("Div", "m six", "y")],
        "divide_before": [*clipped, node("Div", "c six", "d"), node("Mul", "d x", "y")],
        "multiply_by_sixth": [*clipped, node("Mul", "c sixth", "d"), node("Mul", "x d", "y")],
        "hard_sigmoid": [node("HardSigmoid", "x", "h", alpha=1 / 6, beta=0.5), node("Mul", "x h", "y")],
        "operator": [node("HardSwish", "x", "y")],
    }[spelling]
    weights = {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6), "sixth": np.float32(1 / 6)}
    layers = read_layers(prepare_module(onnx_model(nodes, weights, opset=14))).layers
    assert [(layer.name, layer.operator) for layer in layers] == [
        ("hard_swish_0", Unary((1, 4, 8, 8), "hard_swish")),
    ]


@given(alpha=st.floats(0.1, 3.0))
@settings(max_examples=5, deadline=None)
def test_elu_keeps_its_parameter(alpha: float) -> None:
    """The importer spells Elu as five operators; its alpha is read off the function."""
    (layer,) = layers_of(node("Elu", "x", "y", alpha=alpha))
    assert isinstance(layer.operator, Unary)
    assert layer.operator.function == "elu"
    assert layer.operator.parameters[0] == pytest.approx(alpha, rel=1e-5)


def test_nearly_the_same_function_is_another_one() -> None:
    """x · clip(x + 3, 0, 6) / 6.01 is no HardSwish: numbers of the model are never replaced by others."""
    layers = layers_of(
        node("Add", "x three", "a"), node("Clip", "a zero six", "c"), node("Div", "c other", "d"), node("Mul", "x d", "y"),
        three=3.0, zero=0.0, six=6.0, other=6.01,
    )  # fmt: skip
    assert "hard_swish_0" not in [layer.name for layer in layers]


@pytest.mark.parametrize("outputs", ["y", "y c"])
def test_what_something_else_reads_stays(outputs: str) -> None:
    """A chain is one layer only if nothing else needs what it computes on the way, be it a layer or the caller."""
    chain = [
        node("Add", "x three", "a"),
        node("Clip", "a zero six", "c"),
        node("Mul", "x c", "m"),
        node("Div", "m six", "h"),
    ]
    reader = node("Concat", "h c", "y", axis=1) if outputs == "y" else node("Identity", "h", "y")
    layers = layers_of(*chain, reader, outputs=outputs, three=3.0, zero=0.0, six=6.0)
    functions = [layer.operator.function for layer in layers if isinstance(layer.operator, Unary)]
    assert functions == [Composition((Step("add", (0, -1)), Step("clip", (1, -2, -3))))]


def test_two_tensors_are_no_function_of_one() -> None:
    """A gate from elsewhere (squeeze and excite) is no activation but a product of two tensors."""
    layers = layers_of(node("GlobalAveragePool", "x", "g"), node("Sigmoid", "g", "s"), node("Mul", "x s", "y"))
    assert [layer.name for layer in layers if layer.operator_kind == "multiply"] == ["multiply_0"]


def celu(alpha: float) -> list[Any]:
    """max(0, x) + min(0, α·(exp(x/α) − 1)), for which TVM has no importer."""
    return [
        node("Max", "x zero", "positive"), node("Div", "x alpha", "q"), node("Exp", "q", "e"), node("Sub", "e one", "s"),
        node("Mul", "alpha s", "m"), node("Min", "m zero", "negative"), node("Add", "positive negative", "y"),
    ]  # fmt: skip


def mish() -> list[Any]:
    """x · tanh(log(1 + exp(x))), as models before opset 18 spell it."""
    return [
        node("Exp", "x", "e"), node("Add", "one e", "a"), node("Log", "a", "l"), node("Tanh", "l", "t"),
        node("Mul", "x t", "y"),
    ]  # fmt: skip


FUNCTIONS = {
    "softplus": ([node("Softplus", "x", "y")], lambda x: np.logaddexp(x, 0)),
    "mish": (mish(), lambda x: x * np.tanh(np.logaddexp(x, 0))),
    "softsign": ([node("Softsign", "x", "y")], lambda x: x / (1 + np.abs(x))),
    "selu": ([node("Selu", "x", "y", alpha=1.5, gamma=1.1)], lambda x: 1.1 * np.where(x > 0, x, 1.5 * np.expm1(x))),
    "thresholded": ([node("ThresholdedRelu", "x", "y", alpha=0.31)], lambda x: np.where(x > 0.31, x, 0)),
    "celu": (celu(1.7), lambda x: np.maximum(x, 0) + np.minimum(0, 1.7 * np.expm1(x / 1.7))),
    "where": (
        [node("Greater", "x one", "g"), node("Pow", "x three", "p"), node("Where", "g p x", "y")],
        lambda x: np.where(x > 1, x**3, x),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_functions_are_compositions(name: str) -> None:
    """A chain that is no named function is one layer that computes what the chain does."""
    nodes, function = FUNCTIONS[name]
    constants = {"zero": 0.0, "one": 1.0, "three": 3.0, "alpha": 1.7}
    used = " ".join(i for n in nodes for i in n.input)
    (layer,) = layers_of(*nodes, **{k: v for k, v in constants.items() if k in used.split()})
    assert isinstance(layer.operator, Unary)
    assert isinstance(layer.operator.function, Composition)
    assert decode(encode(layer.operator)) == layer.operator
    x = np.linspace(-8, 8, 641).astype(np.float32)
    ours = unary_float32(layer.operator.function, layer.operator.parameters, x)
    np.testing.assert_allclose(ours, function(x.astype(np.float64)), rtol=3e-6, atol=1e-6)


def test_what_the_layer_before_absorbs_stays_out() -> None:
    """Bias and clamp belong to the convolution and cost nothing there; the chain begins behind them."""
    weights = {"w": np.ones((4, 4, 1, 1), np.float32), "b": np.full(4, 0.5, np.float32)}
    model = onnx_model(
        [node("Conv", "x w b", "c"), node("Relu", "c", "r"), node("Softsign", "r", "y")], weights, outputs="y"
    )
    _, convolution, softsign, _ = read_layers(prepare_module(model)).layers
    assert isinstance(convolution.operator, Conv2D)
    assert convolution.operator.epilogue == Epilogue(has_bias=True, lower=0.0)
    assert isinstance(softsign.operator, Unary)
    assert [step.function for step in softsign.operator.function.steps] == ["abs", "add", "divide"]  # type: ignore[union-attr]


def test_operators_with_kernels_stay_apart() -> None:
    """Sums of two tensors have kernels for more formats than tables."""
    layers = layers_of(node("Tanh", "x", "t"), node("Add", "x t", "y"))
    assert [type(layer.operator) for layer in layers] == [Unary, Add]
