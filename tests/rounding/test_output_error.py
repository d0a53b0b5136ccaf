"""Weights are rounded for the least error of the layer's output: protects the method on cases that can be solved by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tvm_hquant.calibration.input_moments import InputMoments, InputMomentsCollector
from tvm_hquant.layers import Layer
from tvm_hquant.operators import Conv2D, Dense, Window
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantized_weights import quantize_layer_weights
from tvm_hquant.rounding.output_error import closest_codes, least_error_codes, regularized, squared_error
from tvm_hquant.rounding.weight_rounding import WeightRounding


def test_two_equal_columns_make_up_for_each_other() -> None:
    """0.4 + 0.4 of the same input is nearly 1 of it, not 0: solved by hand."""
    moments = InputMoments(10**6, np.zeros((1, 2)), (np.ones((1, 2, 2)),))
    codes = least_error_codes(np.array([[[[0.4]], [[0.4]]]]), [1.0], 127, moments)
    assert sorted(codes.ravel()) == [0, 1]


def test_columns_without_correlation_are_rounded_to_nearest() -> None:
    """Nothing can make up for an error there, whatever the variances."""
    weights = np.random.default_rng(0).normal(size=(5, 8, 3, 3))
    moments = InputMoments(100, np.zeros((1, 72)), (np.diag(np.arange(1.0, 73.0))[None],))
    scales = np.full(5, 0.02)
    np.testing.assert_array_equal(
        least_error_codes(weights, scales, 127, moments), np.clip(np.rint(weights / 0.02), -127, 127)
    )


def test_constant_columns_are_rounded_to_nearest() -> None:
    """The bias makes up for them, so nothing is known that would be better."""
    weights = np.random.default_rng(0).normal(size=(5, 8, 1, 1))
    moments = InputMoments(100, np.ones((1, 8)), (np.zeros((1, 8, 8)),))
    np.testing.assert_array_equal(least_error_codes(weights, np.full(5, 0.1), 127, moments), np.rint(weights / 0.1))


def test_near_the_best_of_all_codes() -> None:
    """Against all 8^5 codes around the weights: never worse than rounding to nearest, on average near the optimum."""
    rng = np.random.default_rng(0)
    offsets = np.array(list(itertools.product(range(-3, 5), repeat=5)))
    totals = np.zeros(3)
    for _ in range(5):
        factor = rng.normal(size=(5, 5))
        covariance = regularized((factor @ factor.T)[None], 1000)
        targets = rng.uniform(-3, 3, size=(1, 8, 5))
        found = squared_error(closest_codes(targets, covariance, 7), targets, covariance)[0]
        nearest = squared_error(np.rint(targets), targets, covariance)[0]
        every = np.floor(targets)[0][:, None, :] + offsets[None]
        best = squared_error(every, targets[0][:, None, :], covariance).min(axis=1)
        assert (found <= nearest).all()
        assert (found >= best - 1e-9).all()
        totals += best.sum(), found.sum(), nearest.sum()
    best_total, found_total, nearest_total = totals
    assert found_total - best_total < 0.3 * (nearest_total - best_total)


def test_codes_stay_within_the_limit() -> None:
    """Making up for errors must not lead out of the codes."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(130, 3))
    targets = rng.uniform(-7, 7, size=(1, 4, 130))
    codes = closest_codes(targets, regularized((factor @ factor.T)[None], 1000), 7)
    assert np.abs(codes).max() <= 7
    np.testing.assert_array_equal(codes, np.rint(codes))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("precision", ["a8w8", "a8w4"])
def test_outputs_of_a_layer_come_out_closer(groups: int, precision: str) -> None:
    """On inputs that were not used to estimate the covariance, the layer's output has much less error than with
    weights rounded to nearest."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 8))

    def inputs(count: int) -> np.ndarray:
        smooth = np.repeat(np.repeat(rng.normal(size=(count, 4, 4, 3)), 2, axis=1), 2, axis=2)
        return np.maximum(smooth @ mixing + 0.1 * rng.normal(size=(count, 8, 8, 8)), 0).astype(np.float32)

    weights = rng.normal(size=(16, 8 // groups, 3, 3)).astype(np.float32)
    operator = Conv2D((1, 8, 8, 8), 16, Window((3, 3)), groups)
    layer = Layer("l", "l", operator, ("x",), weights, np.zeros(16, np.float32))
    seen, unseen = InputMomentsCollector([layer]), InputMomentsCollector([layer])
    for x in inputs(200):
        seen.observe("x", x[None])
    for x in inputs(200):
        unseen.observe("x", x[None])
    moments, truth = seen.moments()["l"], unseen.moments()["l"]
    errors = []
    for known in (None, moments):
        made = quantize_layer_weights(layer, parse_precision(precision), moments=known)
        difference = (made.real().astype(np.float64) - weights).reshape(groups, 16 // groups, -1)
        errors.append(float(((difference @ truth.covariances[0]) * difference).sum()))
    assert errors[1] < 0.7 * errors[0]


def test_one_scale_for_the_layer_is_kept() -> None:
    """Targets without a scale per channel get the better codes too."""
    rng = np.random.default_rng(0)
    weights = (rng.normal(size=(6, 10)) * np.arange(1, 7)[:, None]).astype(np.float32)[:, :, None, None]
    layer = Layer("l", "l", Dense(1, 10, 6), ("x",), weights, np.zeros(6, np.float32))
    factor = rng.normal(size=(10, 2))
    moments = InputMoments(1000, np.zeros((1, 10)), ((factor @ factor.T)[None],))
    codes = quantize_layer_weights(layer, parse_precision("a8w8"), WeightRounding(per_channel=False), moments)
    assert len(np.unique(codes.scales)) == 1
    assert codes.codes.dtype == np.int8
