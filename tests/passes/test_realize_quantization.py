"""Realized layers are calls of one kernel: protects their form, and that they compute what was simulated, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.planned_models import (
    PRECISIONS,
    built_outputs,
    named_plan,
    one_sample,
    shared_session,
    simulated,
    stages,
    through_text,
)
from tvm_hquant.layers import FORMATS_ATTRIBUTE, PRECISION_ATTRIBUTE, read_layers
from tvm_hquant.operator_codec import decode
from tvm_hquant.operators import Convert, Opaque
from tvm_hquant.precision import parse_precision
from tvm_hquant.realization import realize_conversion, realize_layer
from tvm_hquant.relax_ir.kernel_calls import is_view, read_realized

CASES = [("residual", p) for p in (*PRECISIONS, "mixed")] + [("branches", "mixed")]


def layer_calls(mod: tvm.IRModule) -> dict[str, Any]:
    """The one call in the body of every layer function, by the layer's name."""
    calls = {}
    for layer in read_layers(mod).layers:
        (block,) = mod[layer.function_name].body.blocks
        calls[layer.name] = block.bindings[0].value
    return calls


def test_every_layer_is_one_kernel_call() -> None:
    """After the pass only kernels, views, and what TVM itself legalizes are left."""
    mod = stages("branches", "mixed")["realize_quantization"]
    calls = layer_calls(mod)
    for layer in read_layers(mod).layers:
        call, attributes = calls[layer.name], mod[layer.function_name].attrs
        if isinstance(layer.operator, Opaque):
            assert call.op.name == "relax.power"
            assert "hquant.request" not in attributes
            assert attributes["global_symbol"], "verification calls it by name"
            continue
        request = decode(str(attributes["hquant.request"]))
        if is_view(request):
            assert call.op.name == "relax.reshape"
        else:
            assert call.op.name == "relax.call_tir"
            assert str(attributes["hquant.kernel"]).startswith("reference.")
            assert isinstance(mod[call.args[0]], tvm.tirx.PrimFunc)
        assert "global_symbol" not in attributes, "a layer is private, so that it can be inlined"


def test_equal_requests_share_one_function() -> None:
    """Two conversions of one shape and kind are one kernel with other constants."""
    mod = stages("branches", "a8w8")["realize_quantization"]
    requests = [
        str(mod[layer.function_name].attrs["hquant.request"])
        for layer in read_layers(mod).layers
        if "hquant.request" in mod[layer.function_name].attrs
        and not is_view(decode(str(mod[layer.function_name].attrs["hquant.request"])))
    ]
    kernels = [f for _, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    assert len(kernels) == len(set(requests))


@pytest.mark.parametrize("model", ["residual", "branches"])
def test_request_and_constants_can_be_decode(model: str) -> None:
    """lower_layers packs for the target what it reads here, so nothing may be lost: neither a code nor a bit of a scale."""
    session = shared_session(model)
    plan = named_plan(model, "mixed")
    mod = stages(model, "mixed")["realize_quantization"]
    compared = 0
    for layer in read_layers(mod).layers:
        function = mod[layer.function_name]
        found = read_realized(function)
        if found is None:
            continue
        inputs, output = decode(str(function.attrs[FORMATS_ATTRIBUTE]))
        if isinstance(layer.operator, Convert):
            request, constants = realize_conversion(layer.operator.shape, inputs[0], output)
        else:
            original = session.graph.by_name[layer.name]
            precision = parse_precision(str(function.attrs[PRECISION_ATTRIBUTE]))
            weights = plan.layer_weights(original, precision)
            request, constants = realize_layer(original, precision, inputs, output, weights)
        assert found[0] == request
        assert type(found[1]) is type(constants)
        for field in dataclasses.fields(constants):
            ours, theirs = getattr(found[1], field.name), getattr(constants, field.name)
            if isinstance(theirs, np.ndarray):
                assert ours.dtype == theirs.dtype
            as_bits = [np.atleast_1d(np.asarray(_plain(v), np.float64)) for v in (ours, theirs)]
            np.testing.assert_array_equal(as_bits[0].reshape(-1), as_bits[1].reshape(-1), f"{layer.name} {field.name}")
        compared += 1
    assert compared >= len(session.graph.layers) - 1


def _plain(value: Any) -> Any:
    """Numbers of a field: a requantization is float32 bounds and a zero point."""
    if dataclasses.is_dataclass(value):
        return [np.float32(v) for v in dataclasses.astuple(value)]  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return np.concatenate([np.asarray(v, np.float32).reshape(-1) for v in value]) if value else []
    return np.float32(value) if isinstance(value, float) else value


@pytest.mark.parametrize(("model", "name"), CASES)
def test_realized_module_equals_the_simulator_bit_for_bit(model: str, name: str) -> None:
    """The plain loops of the contract and this machine's vector kernels give the same bits, in every precision."""
    session = shared_session(model)
    outputs = built_outputs(stages(model, name)["realize_quantization"], *one_sample(session).values())
    for realized, expected in zip(outputs, simulated(model, name), strict=True):
        np.testing.assert_array_equal(realized, expected)


def test_quantizing_changes_something() -> None:
    """Guards the comparisons of this file: the plans that they run are no float models in disguise."""
    session = shared_session("residual")
    floats = session.engine.run(one_sample(session), [session.float_program])[0][0]
    outputs = {name: simulated("residual", name)[0] for name in (*PRECISIONS, "mixed")}
    for name, output in outputs.items():
        assert np.array_equal(output, floats) == (name == "float32")
        np.testing.assert_allclose(output, floats, atol=0.2)
    assert len({output.tobytes() for output in outputs.values()}) == len(outputs)


def test_attributes_survive_text() -> None:
    """A request with infinite bounds, written to TVMScript and parsed again, is the same request."""
    mod = stages("residual", "a8w8")["realize_quantization"]
    builder = relax.BlockBuilder()
    for layer in read_layers(mod).layers:
        parameter = relax.Var("x", relax.TensorType([1], "float32"))
        function = relax.Function([parameter], parameter, parameter.ty)
        builder.add_func(function.with_attrs(dict(mod[layer.function_name].attrs)), layer.function_name)
    again = through_text(builder.get())
    for layer in read_layers(mod).layers:
        before, after = mod[layer.function_name].attrs, again[layer.function_name].attrs
        assert dict(after) == dict(before)
        assert decode(str(after["hquant.request"])) == decode(str(before["hquant.request"]))
