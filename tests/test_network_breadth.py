"""What users bring: small ONNX models of many kinds go through the whole pipeline on this machine.

Protects that an operator without a kernel of this project costs speed and never the model: it stays in float32, between
conversions, and the rest is quantized around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from tests.network_cases import (
    NetworkCase,
    activation_cases,
    block_cases,
    merged_cases,
    network_cases,
    operator_cases,
    opset_cases,
)
from tests.onnx_models import random_inputs
from tests.pipeline_checks import (
    assert_deployed_as_simulated,
    import_model,
    signal_to_noise,
    simulated_outputs,
    uniform_plan,
)
from tvm_hquant.operators import Opaque
from tvm_hquant.plan import LayerDecision
from tvm_hquant.planning import make_plan
from tvm_hquant.precision import REALIZED

Array = npt.NDArray[Any]


def inputs_of(model: Any) -> Mapping[str, Array]:
    """Normal numbers for float inputs, small whole ones for the others."""
    normal = random_inputs(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    return {
        name: values if kinds[name] == onnx.TensorProto.FLOAT else np.arange(values.size).reshape(values.shape)
        for name, values in normal.items()
    }


@pytest.mark.parametrize("case", network_cases(), ids=lambda case: case.name)
def test_float_and_a8w8(case: NetworkCase) -> None:
    """Float32 gives what ONNX Runtime gives; a8w8 compiles, runs, is near it, and the module equals the simulator."""
    imported = import_model(case.model, inputs_of(case.model))
    outputs = imported.float_outputs()
    for output, expected in zip(outputs, imported.expected, strict=True):
        assert output.shape == expected.shape
        # What is left of large values that cancel has their rounding.
        largest = float(np.abs(expected).max())
        assert np.isfinite(largest)
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=max(1e-4, 1e-6 * largest))
    assert imported.opaque == case.opaque, "other operators than before are left to TVM"
    plan = uniform_plan(imported.session, "a8w8")
    assert all(decision.reason for decision in plan.layers.values())
    assert_deployed_as_simulated(imported, plan)
    for simulated, output in zip(simulated_outputs(imported, plan), outputs, strict=True):
        assert signal_to_noise(simulated, output) > 20.0


@pytest.mark.parametrize("case", block_cases()[::2], ids=lambda case: case.name)
def test_mixed_precisions(case: NetworkCase) -> None:
    """Blocks whose layers take realized precisions in turn: formats meet at every kind of layer."""
    imported = import_model(case.model, inputs_of(case.model))
    session = imported.session
    decisions = {
        layer.name: LayerDecision(REALIZED[7 * i % len(REALIZED)], "chosen by the user")
        for i, layer in enumerate(session.graph.anchors)
    }
    assert_deployed_as_simulated(imported, make_plan(session, decisions))


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "a16w8"])
def test_opaque_layers_give_float32(precision: str) -> None:
    """An operator that TVM computes gives float32, whatever float or integer format its readers ask for."""
    case = next(c for c in operator_cases() if c.name == "mean_over_rows")
    imported = import_model(case.model, inputs_of(case.model))
    plan = uniform_plan(imported.session, precision)
    formats = imported.session.builder.program(plan.precisions(), plan.scales).formats
    opaque = [layer.name for layer in imported.session.graph.layers if isinstance(layer.operator, Opaque)]
    assert [formats.produced[name].dtype for name in opaque] == ["float32"]
    assert_deployed_as_simulated(imported, plan)


def test_activations_with_kernels_need_no_conversions() -> None:
    """However a model spells an activation that has a kernel, under a8w8 it is a table between codes."""
    names = {
        "hardswish",
        "gelu_by_erf",
        "elu",
        "prelu_of_one_slope",
        "erf",
        "sigmoid",
        "leakyrelu",
        "abs",
        "neg",
        "floor",
        "selu",
        "softplus",
        "mish",
        "thresholdedrelu",
        "softsign",
    }
    cases = [case for case in activation_cases() if case.name in names]
    merged = merged_cases("activations", cases, 20)
    session = import_model(merged.model, inputs_of(merged.model)).session
    plan = uniform_plan(session, "a8w8")
    program = session.builder.program(plan.precisions(), plan.scales)
    assert [(c.tensor, c.kind) for c in program.conversions] == [(f"{case.name}_x", "quantize") for case in cases]


@pytest.mark.parametrize(
    "case", [c for c in block_cases() if c.name in ("mobilenet_v3", "efficientnet")], ids=lambda c: c.name
)
def test_gates_stay_in_codes(case: NetworkCase) -> None:
    """Squeeze-and-excitation multiplies codes by codes: only the input is converted."""
    session = import_model(case.model, inputs_of(case.model)).session
    plan = uniform_plan(session, "a8w8")
    program = session.builder.program(plan.precisions(), plan.scales)
    assert [(c.tensor, c.kind) for c in program.conversions] == [("x", "quantize")]


def test_attention_stays_in_codes() -> None:
    """Queries, keys and values are multiplied as they are written: only what a float operator makes is converted."""
    (case,) = (c for c in block_cases() if c.name == "transformer")
    session = import_model(case.model, inputs_of(case.model)).session
    plan = uniform_plan(session, "a8w8")
    program = session.builder.program(plan.precisions(), plan.scales)
    products = [step for step in program.steps if step.layer is not None and step.layer.operator_kind == "batch_matmul"]
    assert [step.format.dtype for step in products] == ["float32", "uint8"]
    assert [(c.tensor, c.kind) for c in program.conversions] == [(tensor, "quantize") for tensor in ("x", "wo")]


def test_spelling_of_opsets_does_not_matter() -> None:
    """One classifier in any opset has the same layers with the same names, and computes what ONNX Runtime does."""
    layers = []
    for case in opset_cases():
        imported = import_model(case.model, inputs_of(case.model))
        np.testing.assert_allclose(imported.float_outputs()[0], imported.expected[0], rtol=1e-4, atol=1e-6)
        layers.append([(layer.name, layer.operator) for layer in imported.session.graph.layers])
    assert all(found == layers[0] for found in layers)
