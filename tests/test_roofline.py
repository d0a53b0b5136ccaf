"""The roofline of a kernel: which limit holds, from a spec's rates and the sizes of what is read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.onnx_models import node, onnx_model, random_weights
from tvm_hquant import api
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.layers import Layer
from tvm_hquant.operators import (
    AveragePool2D,
    Concat,
    Conv2D,
    Convert,
    Dense,
    Epilogue,
    Movement,
    Opaque,
    Operator,
    Softmax,
    Window,
)
from tvm_hquant.roofline import CallEvent, Roof, outermost_calls, profile_artifact
from tvm_hquant.simulator.program import Step
from tvm_hquant.target_spec import load_target_spec
from tvm_hquant.tensor_format import FLOAT32_FORMAT

SPEC = load_target_spec("x86-64-avx2")  # 3.3 GHz, 20 GB/s, 16 MiB of L3
CONV = Conv2D((1, 56, 56, 64), 64, Window((3, 3), padding=(1, 1, 1, 1)))
MACS = 56 * 56 * 64 * 64 * 9
PEAK = 72  # with Winograd's algorithm
WEIGHTS = 64 * 64 * 9


def _step(layer: Layer | None, request: KernelRequest) -> Step:
    return Step("t", layer, "t", request, None, (0,), 1, 0, FLOAT32_FORMAT)


def _conv(operator: Conv2D = CONV) -> Step:
    request = KernelRequest(operator, ("uint8",), "uint8", "int8")
    return _step(Layer("conv", "conv", operator, ("x",)), request)


def test_arithmetic_bounds_what_fits_the_caches() -> None:
    """Time is multiply-accumulates over the rate, shared by the threads; half of it as achieved is 50 %."""
    roof = Roof(SPEC, {"conv": "a8w8"}, 2, weights=WEIGHTS)
    seconds = MACS * (1 - 2 / (3 * 56)) ** 2 / (PEAK * 3.3e9 * 2)  # of each axis, but for what reads padding
    kernel = roof.kernel(_conv(), "symbol", 2e6 * seconds)
    assert kernel.bound == "compute"
    assert kernel.possible_microseconds == pytest.approx(1e6 * seconds)
    assert kernel.fraction == pytest.approx(0.5)
    assert kernel.operations == 2 * MACS
    assert kernel.bytes == 2 * 56 * 56 * 64 + WEIGHTS


def test_memory_bounds_weights_that_no_cache_keeps() -> None:
    """A layer of one pixel reads every weight once: with more weights in all than the cache holds, that is the limit."""
    operator = Conv2D((1, 1, 1, 4096), 4096, Window((1, 1)))
    roof = Roof(SPEC, {"conv": "a8w8"}, 1, weights=17 * 2**20)
    kernel = roof.kernel(_conv(operator), "symbol", 1.0)
    assert kernel.bound == "memory"
    assert kernel.possible_microseconds == pytest.approx(1e6 * 4096**2 / 20e9)
    assert Roof(SPEC, {"conv": "a8w8"}, 1, weights=2**20).kernel(_conv(operator), "symbol", 1.0).bound == "compute"


@pytest.mark.parametrize(
    ("operator", "storages", "operations", "read", "written"),
    [
        (Conv2D((1, 7, 9, 16), 8, Window((1, 1))), "uint8", 2 * 63 * 8 * 16, 63 * 16 + 16 * 8, 63 * 8),
        # Of seven rows those between the strides are in no window; of nine columns, all are.
        (Conv2D((1, 7, 9, 16), 8, Window((1, 3), (2, 2))), "uint8", 2 * 16 * 8 * 48, 36 * 16 + 48 * 8, 16 * 8),
        (Conv2D((1, 8, 8, 4), 6, Window((3, 3), (2, 2), (1, 1, 1, 1))), "uint8", 2 * 16 * 6 * 36, 64 * 4 + 216, 96),
        (Conv2D((1, 8, 8, 32), 32, Window((3, 3)), 32), "uint8", 2 * 36 * 32 * 9, 64 * 32 + 288, 36 * 32),
        (Conv2D((1, 4, 4, 8), 8, Window((1, 1)), 1, Epilogue(has_residual=True)), "float32",
         2 * 16 * 64, 4 * (128 + 64 + 128), 4 * 128),
        (Dense(3, 40, 10), "uint8", 2 * 1200, 120 + 400, 30),
        (AveragePool2D((1, 7, 7, 64), Window((7, 7))), "uint8", 49 * 64, 49 * 64, 64),
        (Concat(((1, 4, 4, 8), (1, 4, 4, 24)), 3), "uint16", 512, 2 * 512, 2 * 512),
        (Movement("strided_slice", (1, 8, 8, 4), (1, 4, 8, 4), (1, 0, 2)), "float32", 128, 4 * 128, 4 * 128),
    ],
    ids=["1x1", "strided", "3x3 strided", "depthwise", "residual", "dense", "pool", "concat", "slice"],
)  # fmt: skip
def test_operations_and_bytes_are_counted(
    operator: Operator, storages: str, operations: int, read: int, written: int
) -> None:
    """Protects against what no kernel needs being counted, and against what it needs being forgotten: counts by hand."""
    inputs = (storages,) * len(input_shapes(operator))
    request = KernelRequest(operator, inputs, storages, "int8" if storages == "uint8" else "float32")
    kernel = Roof(SPEC, {"layer": "float32"}, 1, 0).kernel(
        _step(Layer("layer", "layer", operator, ("x",)), request), "kernel", 1.0
    )
    assert (kernel.operations, kernel.bytes) == (operations, read + written)


def test_no_roof_of_another_machine() -> None:
    """What is compiled for a microcontroller runs here: how fast says nothing of it."""
    assert Roof(load_target_spec("c-source"), {"conv": "a8w8"}, 1, 0).kernel(_conv(), "c", 1.0).fraction is None


def test_conversions_have_rates_of_their_own() -> None:
    """1000 values quantized at most at 4 a cycle."""
    step = _step(None, KernelRequest(Convert((1, 1000)), ("float32",), "uint8"))
    kernel = Roof(SPEC, {}, 1, 0).kernel(step, "symbol", 1.0)
    assert (kernel.layer, kernel.precision) == ("convert t", "float32 → uint8")
    assert kernel.possible_microseconds == pytest.approx(1e-3 * 1000 / (4 * 3.3))


def test_no_roof_where_the_spec_has_no_rate() -> None:
    """A softmax runs as floats in every plan; a spec that offers it in none says nothing of its time."""
    layer = Layer("softmax", "softmax", Softmax((1, 10), 1), ("x",))
    step = _step(layer, KernelRequest(Softmax((1, 10), 1), ("float32",), "float32"))
    kernel = Roof(SPEC, {"softmax": "a8w8"}, 1, 0).kernel(step, "symbol", 1.0)
    assert (kernel.bound, kernel.fraction) == (None, None)
    opaque = Layer("erf", "erf", Opaque("relax.erf", ((1, 10),), (1, 10)), ("x",))
    kernel = Roof(SPEC, {"erf": "a8w8"}, 1, 0).kernel(replace(step, layer=opaque, request=None), "tvm", 1.0)
    assert (kernel.operator, kernel.precision, kernel.operations, kernel.bytes) == ("opaque", "float32", 0, 80)
    assert kernel.fraction is None


def test_calls_inside_a_call_are_part_of_it() -> None:
    """Times belong to the functions that took them, whatever these call in turn."""
    seconds = iter(range(100))
    order = [("a", True), ("a", False), ("outer", True), ("b", True), ("b", False), ("c", True), ("c", False)]
    order += [("outer", False), ("a", True), ("a", False)]
    events = [CallEvent(symbol, is_start, float(next(seconds))) for symbol, is_start in order]
    assert outermost_calls(events) == [("a", 1.0), ("outer", 5.0), ("a", 1.0)]


def test_profile_of_a_layer_that_tvm_computes() -> None:
    """It is one call under the layer's name, and the layers around it keep their own times."""
    weights = random_weights(w=(4, 4, 3, 3))
    model = onnx_model([node("Conv", "x w", "c"), node("Sin", "c", "s"), node("Relu", "s", "y")], weights)
    artifact = api.compile(api.plan_without_search(api.open_session(model, "host"), precision="float32"))
    profile = profile_artifact(artifact, 1, repeat=2)
    assert [(k.layer, k.operator) for k in profile.kernels][-2:] == [("sin_0", "opaque"), ("relu_0", "unary")]
    assert [k.kernel for k in profile.kernels if k.operator == "opaque"] == ["tvm"]


def test_kernels_have_the_names_of_the_artifact() -> None:
    """Protects artifacts that another release made, whose kernels this one would not choose: the manifest knows them."""
    model = onnx_model([node("Conv", "x w", "c"), node("Concat", "c c", "y", axis=1)], random_weights(w=(4, 4, 3, 3)))
    artifact = api.compile(api.plan_without_search(api.open_session(model, "host"), precision="float32"))
    for entry in artifact.manifest["layers"]:
        entry["kernel"] = entry["kernel"].replace("conv2d[", "conv2d[earlier ")
    kernels = {k.operator: k.kernel for k in profile_artifact(artifact, 1, repeat=2).kernels}
    assert "conv2d[earlier " in kernels["conv2d"]
    assert kernels["concat"].startswith("common.concat")
