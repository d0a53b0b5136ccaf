"""Activations spelled as chains: protects that they are recognised by what they compute, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.onnx_models import node, onnx_model
from tvm_hquant.layers import Layer, read_layers
from tvm_hquant.operators import Unary
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
    reader = node("Add", "h c", "y") if outputs == "y" else node("Identity", "h", "y")
    names = [layer.name for layer in layers_of(*chain, reader, outputs=outputs, three=3.0, zero=0.0, six=6.0)]
    assert not any(name.startswith("hard_swish") for name in names)
    assert any(name.startswith("clip") for name in names)


def test_two_tensors_are_no_function_of_one() -> None:
    """A gate from elsewhere (squeeze and excite) is no activation but a product of two tensors."""
    layers = layers_of(node("GlobalAveragePool", "x", "g"), node("Sigmoid", "g", "s"), node("Mul", "x s", "y"))
    assert [layer.name for layer in layers if layer.operator_kind == "multiply"] == ["multiply_0"]
