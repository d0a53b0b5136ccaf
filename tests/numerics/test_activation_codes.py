"""Scales, zero points and codes of activations, and the terms of a requantization."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from exact_arithmetic import float32_array, round_to_float32
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tvm_hquant import numerics
from tvm_hquant.errors import DataError
from tvm_hquant.precision import parse_precision
from tvm_hquant.tensor_format import FLOAT32_FORMAT, TensorFormat

REALS = st.floats(-1e6, 1e6, width=32)
INTEGER_PRECISIONS = st.sampled_from(["a8w8", "int8", "a4w4", "a16w8", "a10w6"])


@settings(max_examples=150, deadline=None)
@given(INTEGER_PRECISIONS, REALS, REALS)
def test_formats_hold_zero_and_the_range(name: str, a: float, b: float) -> None:
    """0 has a code of its own; both bounds are represented within one step; the scale is a positive float32."""
    lower, upper = min(a, b), max(a, b)
    tensor_format = numerics.activation_format(lower, upper, parse_precision(name))
    assert tensor_format.q_min <= tensor_format.zero_point <= tensor_format.q_max
    assert tensor_format.scale > 0
    assert float(np.float32(tensor_format.scale)) == tensor_format.scale
    assert tensor_format.zero_point == 0 or name != "int8"
    for bound in (lower, upper, 0.0):
        limits = (tensor_format.q_min, tensor_format.q_max)
        code = numerics.quantize(bound, tensor_format.scale, tensor_format.zero_point, *limits)
        value = float(numerics.dequantize(code, tensor_format.scale, tensor_format.zero_point))
        assert abs(value - bound) <= 1.001 * tensor_format.scale
    zero = numerics.quantize(0.0, tensor_format.scale, tensor_format.zero_point, *limits)
    assert int(zero) == tensor_format.zero_point


@settings(max_examples=100, deadline=None)
@given(st.floats(-1000.0, -0.0078125, width=32), st.floats(0.0078125, 1000.0, width=32))
def test_zero_point_is_the_nearest_code(lower: float, upper: float) -> None:
    """Rounded, not cut off: half a step of the range at most is lost at either end."""
    scale, zero_point = numerics.activation_range_to_scale(lower, upper, 0, 255)
    exact = Fraction(lower) / Fraction(scale)
    assert abs(zero_point + exact) <= Fraction(1, 2) + Fraction(1, 10**6)


def test_all_zero_tensor_has_scale_one() -> None:
    """A dead tensor must not get scale 0, which would make every code NaN."""
    assert numerics.activation_range_to_scale(0.0, 0.0, 0, 255) == (1.0, 0)
    assert numerics.activation_range_to_scale(0.0, 0.0, -128, 127, symmetric=True) == (1.0, 0)
    assert numerics.activation_range_to_scale(0.0, 1e-45, 0, 255)[0] > 0


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (math.nan, 1.0), (1.0, -1.0)])
def test_impossible_ranges_are_refused(bounds: tuple[float, float]) -> None:
    """NaN and infinity come from bad data: an error, not a scale."""
    with pytest.raises(DataError, match="no range"):
        numerics.activation_range_to_scale(*bounds, 0, 255)


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-30, 2.0**30, width=32), st.sampled_from([(0, 255), (-128, 127), (0, 65535)]), st.data())
def test_codes_survive_a_round_trip(scale: float, limits: tuple[int, int], data: st.DataObject) -> None:
    """quantize(dequantize(q)) is q for every code."""
    zero_point = 0 if limits[0] < 0 else data.draw(st.integers(*limits))
    codes = np.arange(limits[0], limits[1] + 1)
    values = numerics.dequantize(codes, scale, zero_point)
    back = numerics.quantize(values, scale, zero_point, *limits)
    np.testing.assert_array_equal(back, codes)
    assert back.dtype == {(0, 255): np.uint8, (-128, 127): np.int8, (0, 65535): np.uint16}[limits]


def test_quantize_rounds_ties_to_even_and_clamps_before_converting() -> None:
    """Out-of-range conversions differ between x86, Arm and LLVM: infinities and huge values must not reach them."""
    x = float32_array([-0.5, 0.5, 1.5, 2.5, 3.5, 1e30, -1e30, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(numerics.quantize(x, 1.0, 10, 0, 255), [10, 10, 12, 12, 14, 255, 0, 255, 0, 0])


def test_quantize_divides_truly() -> None:
    """x · (1/s) gives other codes than x / s for values midway between two codes; the quotient is rounded once."""
    differing = 0
    for scale in np.random.default_rng(0).uniform(0.01, 1, 8).astype(np.float32):
        x = ((np.arange(200) + 0.5) * scale.astype(np.float64)).astype(np.float32)
        codes = numerics.quantize(x, float(scale), 0, 0, 65535)
        exact = [round(round_to_float32(Fraction(float(v)) / Fraction(float(scale)))) for v in x]
        np.testing.assert_array_equal(codes, exact)
        differing += int(np.count_nonzero(codes != np.rint(x * (np.float32(1) / scale))))
    assert differing > 50


@settings(max_examples=50, deadline=None)
@given(st.floats(2.0**-20, 2.0**20, width=32))
def test_stored_int8_codes_mean_the_same_reals(scale: float) -> None:
    """int8 codes are kept as uint8, larger by 128; with the stored zero point the reals are equal."""
    tensor_format = TensorFormat("int8", scale, 0, -128, 127)
    canonical = np.arange(-128, 128, dtype=np.int8)
    stored = numerics.stored_codes(canonical, tensor_format)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, np.arange(256))
    np.testing.assert_array_equal(numerics.canonical_codes(stored, tensor_format), canonical)
    np.testing.assert_array_equal(
        numerics.dequantize(stored, scale, tensor_format.storage_zero_point), numerics.dequantize(canonical, scale, 0)
    )


@settings(max_examples=100, deadline=None)
@given(st.floats(0.0078125, 1.0, width=32), st.integers(0, 255), REALS, REALS)
def test_requantization_keeps_within_codes_and_bounds(scale: float, zero_point: int, a: float, b: float) -> None:
    """The clamp ends within the codes, is made of integers, and stands for the activation's bounds where they fit."""
    lower, upper = min(a, b), max(a, b)
    assume(lower < upper)
    tensor_format = TensorFormat("uint8", scale, zero_point, 0, 255)
    end = numerics.requantization(tensor_format, lower, upper)
    assert -zero_point <= end.lower <= end.upper <= 255 - zero_point
    assert end.lower == int(end.lower)
    assert end.upper == int(end.upper)
    assert end.zero_point == zero_point
    if -zero_point * scale < lower < (255 - zero_point) * scale:
        assert abs(end.lower * scale - lower) <= 0.51 * scale


def test_requantization_of_int8_float_and_open_bounds() -> None:
    """int8 clamps to −128…127 around the stored zero point 128; float outputs keep their real bounds."""
    symmetric = numerics.requantization(TensorFormat("int8", 0.5, 0, -128, 127), 0.0, 6.0)
    assert (symmetric.lower, symmetric.upper, symmetric.zero_point) == (0.0, 12.0, 128)
    open_bounds = numerics.requantization(TensorFormat("uint16", 0.5, 1000, 0, 65535))
    assert (open_bounds.lower, open_bounds.upper, open_bounds.zero_point) == (-1000.0, 64535.0, 1000)
    float_bounds = numerics.requantization(FLOAT32_FORMAT, 0.0, math.inf)
    assert (float_bounds.lower, float_bounds.upper, float_bounds.zero_point) == (0.0, math.inf, 0)


def test_multipliers_are_computed_from_left_to_right_in_float64() -> None:
    """float32 arithmetic, or s_w / s_y first, gives another multiplier for some scales: both are shown."""
    rng = np.random.default_rng(1)
    s_x, s_w, s_y = rng.uniform(1e-3, 1, (3, 2000)).astype(np.float32)
    ours = np.array([numerics.multiplier(float(a), [b], float(c))[0] for a, b, c in zip(s_x, s_w, s_y, strict=True)])
    expected = (s_x.astype(np.float64) * s_w.astype(np.float64) / s_y.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(ours, expected)
    assert np.any(ours != s_x * s_w / s_y)
    assert numerics.residual_multiplier(float(s_x[0]), float(s_y[0])) == float(
        np.float32(float(s_x[0]) / float(s_y[0]))
    )
    np.testing.assert_array_equal(numerics.offset([1.0, -2.0], 0.5), float32_array([2, -4]))
