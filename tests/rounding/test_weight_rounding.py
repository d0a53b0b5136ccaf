"""The choice of a rounding reaches the codes of a plan, and a target whose scales are shifts gets nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tests.planned_models import shared_session
from tvm_hquant.calibration.input_moments import InputMoments
from tvm_hquant.errors import PrecisionError
from tvm_hquant.layers import Layer
from tvm_hquant.operators import Dense
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantized_weights import quantize_layer_weights
from tvm_hquant.rounding.point_quantizers import FloorQuantizer
from tvm_hquant.rounding.weight_rounding import METHODS, OUTPUT_ERROR, WeightRounding, check_method, rounding_for
from tvm_hquant.target_spec.schema import Rules


@pytest.mark.parametrize("precision", ["a8w8", "a8w4", "a16w16", "a8w9", "a8w4x1.5", "w6"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_rounds_every_kind_of_weights(method: str, precision: str) -> None:
    """The sum of all points stays near the weights; floor never rounds up; powers of two are what they say."""
    layer = shared_session("residual").graph.anchors[0]
    assert layer.weights is not None
    parsed = parse_precision(precision)
    found = quantize_layer_weights(layer, parsed, WeightRounding(check_method(method)))
    steps = found.scales.astype(np.float64).reshape(*found.scales.shape, 1, 1, 1)
    rest = layer.weights - np.sum(found.codes * steps, axis=0)
    assert found.codes.shape[0] == parsed.weight_points
    assert np.linalg.norm(rest) < (0.4 if method == "floor" else 0.2) * np.linalg.norm(layer.weights)
    mantissas, _ = np.frexp(found.scales)
    assert method != "power-of-two" or (mantissas == 0.5).all()


def test_floor_rounds_down() -> None:
    """⌊v/α⌋, as the paper writes it; the step is what makes up for it."""
    rows, steps = np.array([[0.9, -0.1, 5.0, -5.0]]), np.array([0.5])
    np.testing.assert_array_equal(FloorQuantizer().codes(rows, steps, 3), [[1, -1, 3, -3]])


def test_rules_of_the_target_come_first() -> None:
    """Scales that must be powers of two leave one method."""
    shifts = Rules(power_of_two_scales=True, weight_scales="per-tensor")
    assert rounding_for(shifts, "floor") == WeightRounding("power-of-two", per_channel=False)
    assert rounding_for(Rules(), "floor") == WeightRounding("floor")


def test_an_unknown_method_is_refused() -> None:
    """With the names of those that there are."""
    with pytest.raises(PrecisionError, match="unknown rounding 'up': use output-error, nearest, floor, power-of-two"):
        check_method("up")


@pytest.mark.parametrize("bits", [3, 4])
def test_few_bits_have_fitted_steps(bits: int) -> None:
    """A single large weight would make the steps of all others long; with the moments of the input it is clipped."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(4, 64, 1, 1)).astype(np.float32)
    weights[:, 0] = 9.0
    layer = Layer("l", "l", Dense(1, 64, 4), ("x",), weights, np.zeros(4, np.float32))
    moments = InputMoments(1000, np.zeros((1, 64)), (np.eye(64)[None],))
    precision, errors = parse_precision(f"a8w{bits}"), []
    for known in (moments, None):
        found = quantize_layer_weights(layer, precision, OUTPUT_ERROR, known)
        assert np.abs(found.codes).max() <= 2 ** (bits - 1) - 1
        errors.append(float(np.sum((found.real() - weights) ** 2)))
    assert errors[0] < 0.95 * errors[1]
