"""Weight codes keep the limits that kernels rely on."""

from __future__ import annotations

import numpy as np
import pytest
from exact_arithmetic import float32_array
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant import numerics
from tvm_hquant.errors import PrecisionError


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e4]))
def test_codes_keep_their_limits(bits: int, seed: int, spread: float) -> None:
    """Symmetric, at most 2^bits consecutive codes, never −128 at 8 bits; the error is half a step."""
    rng = np.random.default_rng(seed)
    weights = (rng.standard_t(2, (5, 3, 2, 2)) * spread).astype(np.float32)
    codes, scales = numerics.quantize_weights(weights, bits)
    limit = 2 ** (bits - 1) - 1
    assert codes.dtype == np.int8
    assert scales.dtype == np.float32
    assert np.abs(codes.astype(int)).max() <= limit
    error = np.abs(codes * scales.astype(np.float64)[:, None, None, None] - weights)
    assert np.all(error <= 0.5001 * scales[:, None, None, None])


def test_dead_and_tiny_channels() -> None:
    """A channel of zeros, or one far below the others, gets 2⁻²⁴ of the layer's largest scale, not 0."""
    weights = float32_array([[127.0, -5.0], [0.0, 0.0], [1e-30, 1e-38]])
    codes, scales = numerics.quantize_weights(weights, 8)
    np.testing.assert_array_equal(scales, float32_array([1.0, 2.0**-24, 2.0**-24]))
    np.testing.assert_array_equal(codes, [[127, -5], [0, 0], [0, 0]])
    zeros, ones = numerics.quantize_weights(np.zeros((3, 4), np.float32), 8)
    assert not zeros.any()
    np.testing.assert_array_equal(ones, np.ones(3, np.float32))


def test_given_scales_clip() -> None:
    """A method that clips gives smaller scales: codes stop at the limit."""
    codes, scales = numerics.quantize_weights(float32_array([[10.0, -10.0, 1.0]]), 4, scales=[0.5])
    np.testing.assert_array_equal(codes, [[7, -7, 2]])
    np.testing.assert_array_equal(numerics.dequantize_weights(codes, scales), [[3.5, -3.5, 1.0]])


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    """1 bit has no symmetric codes, 9 do not fit int8: wider weights are sums of points."""
    with pytest.raises(PrecisionError, match=f"{bits} bits"):
        numerics.quantize_weights(np.ones((1, 1)), bits)


def test_every_point_makes_the_error_smaller() -> None:
    """Two points are about 16-bit weights: each must bring the error down by about 254."""
    weights = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    first, _ = numerics.quantize_weights(weights, 8)
    errors = []
    for points in (1, 2, 3):
        codes, scales = numerics.weight_points(weights, [8] * points)
        assert codes.shape == (points, 6, 40)
        assert codes.dtype == np.int8
        assert scales.shape == (points, 6)
        np.testing.assert_array_equal(codes[0], first)
        assert np.abs(codes.astype(int)).max() <= 127
        errors.append(np.abs((codes * scales.astype(np.float64)[:, :, None]).sum(axis=0) - weights).max())
    assert errors[1] < errors[0] / 200
    assert errors[2] < errors[1] / 200


@pytest.mark.parametrize("bits", range(9, 17))
def test_two_points_are_nearly_as_exact_as_one_of_all_bits(bits: int) -> None:
    """The largest error is at most 1.4 times that of plain codes of so many bits."""
    weights = np.random.default_rng(bits).normal(size=(6, 200)).astype(np.float32)
    codes, scales = numerics.weight_points(weights, ((bits + 1) // 2, bits // 2))
    limits = [2 ** (width - 1) - 1 for width in ((bits + 1) // 2, bits // 2)]
    assert [np.abs(own.astype(int)).max() for own in codes] <= limits
    error = np.abs((codes * scales.astype(np.float64)[:, :, None]).sum(axis=0) - weights).max(axis=1)
    plain = np.abs(weights).max(axis=1) / (2 ** (bits - 1) - 1) / 2
    assert np.all(error <= 1.4 * plain)


def test_points_of_exact_weights() -> None:
    """Nothing left to round: the next point is zero, with a scale that is neither 0 nor far off."""
    weights = float32_array([[127, 3], [0, 0]])
    codes, scales = numerics.weight_points(weights, [8, 8])
    assert not codes[1].any()
    np.testing.assert_array_equal(scales[1], float32_array([2.0**-24, 2.0**-24]))


def test_accumulators_that_could_overflow_are_refused() -> None:
    """|start| + 255·Σ|w| < 2³¹ is tight: the last length that fits passes, the next is refused with its reason."""
    longest = (2**31 - 1) // (2 * 255 * 127)
    numerics.check_accumulator(np.full((1, longest), 127, np.int8), 255)
    rows = np.stack([np.zeros(longest + 1, np.int8), np.full(longest + 1, -127, np.int8)])
    with pytest.raises(PrecisionError, match=r"head: .*channel 1 .*float precision"):
        numerics.check_accumulator(rows, 255, "head")
    numerics.check_accumulator(np.full((1, longest + 1), 127, np.int8), 128)
    with pytest.raises(PrecisionError):
        numerics.check_accumulator(np.full((1, longest + 1), 127, np.int8), 0x01FF)
