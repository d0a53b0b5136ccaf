"""The roofline of a kernel: which limit holds, from a spec's rates and the sizes of what is read."""

from __future__ import annotations

import pytest

from tests.onnx_models import node, onnx_model, random_weights
from tvm_hquant import api
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.layers import Layer
from tvm_hquant.operators import Conv2D, Convert, Softmax, Window
from tvm_hquant.roofline import CallEvent, Roof, outermost_calls, profile_artifact
from tvm_hquant.simulator.program import Step
from tvm_hquant.target_spec import load_target_spec
from tvm_hquant.tensor_format import FLOAT32_FORMAT

SPEC = load_target_spec("x86-64-avx2")  # 3.3 GHz, 20 GB/s, 16 MiB of L3
CONV = Conv2D((1, 56, 56, 64), 64, Window((3, 3), padding=(1, 1, 1, 1)))
MACS = 56 * 56 * 64 * 64 * 9
WEIGHTS = 64 * 64 * 9


def _step(layer: Layer | None, request: KernelRequest) -> Step:
    return Step("t", layer, "t", request, None, (0,), 1, 0, FLOAT32_FORMAT)


def _conv(operator: Conv2D = CONV) -> Step:
    request = KernelRequest(operator, ("uint8",), "uint8", "int8")
    return _step(Layer("conv", "conv", operator, ("x",)), request)


def test_arithmetic_bounds_what_fits_the_caches() -> None:
    """Time is multiply-accumulates over the rate, shared by the threads; half of it as achieved is 50 %."""
    roof = Roof(SPEC, {"conv": "a8w8"}, 2, weights=WEIGHTS)
    seconds = MACS / (SPEC.macs_per_cycle("a8w8", "conv2d") * 3.3e9 * 2)
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


def test_conversions_have_rates_of_their_own() -> None:
    """1000 values quantized at 1.5 a cycle."""
    step = _step(None, KernelRequest(Convert((1, 1000)), ("float32",), "uint8"))
    kernel = Roof(SPEC, {}, 1, 0).kernel(step, "symbol", 1.0)
    assert (kernel.layer, kernel.precision) == ("convert t", "float32 → uint8")
    assert kernel.possible_microseconds == pytest.approx(1e-3 * 1000 / (1.5 * 3.3))


def test_no_roof_where_the_spec_has_no_rate() -> None:
    """A softmax runs as floats in every plan; a spec that offers it in none says nothing of its time."""
    layer = Layer("softmax", "softmax", Softmax((1, 10), 1), ("x",))
    step = _step(layer, KernelRequest(Softmax((1, 10), 1), ("float32",), "float32"))
    kernel = Roof(SPEC, {"softmax": "a8w8"}, 1, 0).kernel(step, "symbol", 1.0)
    assert (kernel.bound, kernel.fraction) == (None, None)
    assert Roof(SPEC, {}, 1, 0).kernel(None, "tvm_function", 1.0).operations == 0


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
