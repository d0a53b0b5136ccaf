"""Sums of low-bit tensors: how good they get, who gets the terms, and that channels may differ in their number."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant import numerics
from tvm_hquant.calibration.input_moments import InputMoments
from tvm_hquant.errors import PrecisionError
from tvm_hquant.precision import parse_precision
from tvm_hquant.rounding.multipoint import allocated_terms, multipoint_codes
from tvm_hquant.rounding.point_quantizers import (
    FloorQuantizer,
    NearestQuantizer,
    OutputErrorQuantizer,
    PointQuantizer,
    PowerOfTwoQuantizer,
)

QUANTIZERS = (NearestQuantizer(), FloorQuantizer(), PowerOfTwoQuantizer())


def _error(weights: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> float:
    total = np.sum(codes.astype(np.float64) * scales.astype(np.float64)[:, :, None], axis=0)
    return float(np.linalg.norm(total - weights) / np.linalg.norm(weights))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "quantizer", [NearestQuantizer(), FloorQuantizer(), PowerOfTwoQuantizer()], ids=lambda q: type(q).__name__
)
def test_lossless_in_the_limit(bits: int, quantizer: PointQuantizer) -> None:
    """Every term lowers the error, and with enough of them nothing is left but float32's own rounding."""
    weights = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    errors = [_error(weights, *multipoint_codes(weights, bits, terms, quantizer)) for terms in range(1, 9)]
    assert all(later < earlier or earlier < 1e-6 for earlier, later in pairwise(errors))
    assert errors[-1] < {2: 0.01, 3: 1e-4, 4: 1e-6, 8: 1e-6}[bits] * (
        1 if isinstance(quantizer, NearestQuantizer) else 20
    )
    limit = 127 if isinstance(quantizer, PowerOfTwoQuantizer) else numerics.weight_code_limit(bits)
    codes, _ = multipoint_codes(weights, bits, 3, quantizer)
    assert np.abs(codes).max() <= limit


def test_fractional_terms_lie_between_whole_ones() -> None:
    """The knob is continuous: zero codes where a channel has fewer terms, and as many terms as were asked for."""
    random = np.random.default_rng(1)
    weights = (random.normal(size=(8, 30)) * np.geomspace(1, 30, 8)[:, None]).astype(np.float32)
    errors = []
    for terms in (1.0, 1.25, 1.5, 2.0):
        codes, scales = multipoint_codes(weights, 4, terms)
        used = np.any(codes, axis=2).sum()
        assert used == round(8 * terms)
        errors.append(_error(weights, codes, scales))
    assert errors == sorted(errors, reverse=True)
    codes, _ = multipoint_codes(weights, 4, 1.5)
    assert np.any(codes[1], axis=1).tolist() == [False] * 4 + [True] * 4


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_terms_go_where_they_help_most(channels: int, points: int, data: st.DataObject) -> None:
    """Against all ways to spread the terms, for errors that fall ever more slowly, as those of points do."""
    errors = np.array(
        [[data.draw(st.floats(0.5, 8)) * 0.2**point for _ in range(channels)] for point in range(points + 1)]
    )
    errors = np.minimum.accumulate(errors, axis=0)
    gains = -np.diff(errors, axis=0)
    if (np.diff(gains, axis=0) > 0).any():
        return
    total = data.draw(st.integers(channels, channels * points))
    kept = allocated_terms(errors, total / channels)
    assert kept.sum() == total
    best = min(
        sum(errors[k, c] for c, k in enumerate(choice))
        for choice in product(range(1, points + 1), repeat=channels)
        if sum(choice) == total
    )
    np.testing.assert_allclose(sum(errors[k, c] for c, k in enumerate(kept)), best, rtol=1e-9)


def test_zero_weights_and_names() -> None:
    """A layer of zeros has codes 0; names say bits and terms, and one term is the plain precision."""
    codes, scales = multipoint_codes(np.zeros((3, 4), np.float32), 4, 2)
    assert not codes.any()
    assert (scales == 1).all()
    precision = parse_precision("a8w4x1.5")
    assert (precision.point_bits, precision.weight_points, precision.terms, precision.weight_bits) == (4, 2, 1.5, 6)
    assert parse_precision("A8W4X1.50") == precision
    assert parse_precision("a8w4x1") == parse_precision("a8w4")
    for wrong in ("a8w4x0.5", "a8w4x9", "a8w9x2", "w4x2"):
        with pytest.raises(PrecisionError, match="unknown precision"):
            parse_precision(wrong)


def test_steps_and_codes_fit_each_other() -> None:
    """Two 2-bit points for four weights: neither other steps for these codes nor another code for these steps are better."""
    weights = np.array([[0.9, -0.31, 0.6, 0.3]], np.float32)
    codes, scales = multipoint_codes(weights, 2, 2)
    found = _error(weights, codes, scales)
    points = codes[:, 0].astype(np.float64)
    steps, *_ = np.linalg.lstsq(points.T, weights[0].astype(float), rcond=None)
    np.testing.assert_allclose(steps, scales[:, 0], rtol=1e-6)
    for point, column, code in product((0, 1), range(4), (-1, 0, 1)):
        changed = codes.copy()
        changed[point, 0, column] = code
        assert found <= _error(weights, changed, scales) + 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_steps_fitted_together_are_better_than_one_after_the_other(bits: int) -> None:
    """Each point by itself, its step the best of 33 for what is left, is what the paper's greedy sum would be."""
    weights = np.random.default_rng(2).normal(size=(6, 64)).astype(np.float32)
    quantizer, rest, smallest = NearestQuantizer(), weights.astype(np.float64), 1e-9
    for points in (1, 2, 3):
        codes, steps = quantizer.point(rest, bits, smallest, tied=False)
        rest = rest - steps[:, None] * codes
        greedy = float(np.linalg.norm(rest) / np.linalg.norm(weights))
        assert _error(weights, *multipoint_codes(weights, bits, points, quantizer)) < greedy


def test_points_for_the_least_error_of_the_output() -> None:
    """With the moments of the input each further point lowers the output's error, and it is below that of nearest points."""
    random = np.random.default_rng(3)
    weights = random.normal(size=(8, 40)).astype(np.float32)
    mixing = random.normal(size=(6, 40))
    moments = InputMoments(10**5, np.zeros((2, 40)), (np.stack([mixing.T @ mixing] * 2),))
    quantizer = OutputErrorQuantizer(moments)

    def output_error(codes: np.ndarray, scales: np.ndarray) -> float:
        rest = np.sum(codes * scales.astype(np.float64)[:, :, None], axis=0) - weights
        return float(quantizer.inner(rest, rest).sum())

    errors = [output_error(*multipoint_codes(weights, 3, terms, quantizer)) for terms in (1, 1.25, 1.5, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * output_error(*multipoint_codes(weights, 3, 2))


@pytest.mark.parametrize("quantizer", [NearestQuantizer(), PowerOfTwoQuantizer()], ids=lambda q: type(q).__name__)
def test_one_scale_for_the_layer(quantizer: PointQuantizer) -> None:
    """Targets without a scale per channel get points whose steps all channels share."""
    weights = np.random.default_rng(4).normal(size=(5, 12)) * np.arange(1, 6)[:, None]
    codes, scales = multipoint_codes(weights, 4, 1.5, quantizer, per_channel=False)
    assert codes.shape[0] == 2
    assert (scales == scales[:, :1]).all()
    assert _error(weights, codes, scales) < 0.05
