"""Rounded weights must not shift the means of a layer's outputs: protects the formula, for plain and grouped layers."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_hquant.layers import Layer
from tvm_hquant.operators import Conv2D, Window
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantized_weights import quantize_layer_weights
from tvm_hquant.rounding.bias_correction import corrected


def grouped_outputs(x: np.ndarray, weights: np.ndarray, groups: int) -> np.ndarray:
    """1×1 products per group: x [samples, in], weights [out, in / groups]."""
    parts = np.split(x, groups, axis=1), np.split(weights, groups, axis=0)
    return np.concatenate([a @ w.T for a, w in zip(*parts, strict=True)], axis=1)


@pytest.mark.parametrize(("groups", "outputs"), [(1, 6), (3, 6), (4, 12)])
@pytest.mark.parametrize("precision", ["a8w8", "a8w4", "a16w16"])
def test_mean_output_is_that_of_float_weights(groups: int, outputs: int, precision: str) -> None:
    """With the corrected bias the mean over the calibration inputs is what the float layer has."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(outputs, 12 // groups, 1, 1)).astype(np.float32)
    bias = rng.normal(size=outputs).astype(np.float32)
    layer = Layer("l", "l", Conv2D((1, 1, 1, 12), outputs, Window((1, 1)), groups), ("x",), weights, bias)
    x = np.abs(rng.normal(size=(500, 12)))
    codes = quantize_layer_weights(layer, parse_precision(precision))
    result = corrected(layer, codes, x.mean(axis=0).reshape(groups, -1))
    rounded = (codes.codes.astype(np.float64) * codes.scales[:, :, None, None, None]).sum(axis=0)[:, :, 0, 0]
    expected = (grouped_outputs(x, weights[:, :, 0, 0].astype(np.float64), groups) + bias).mean(axis=0)
    actual = (grouped_outputs(x, rounded, groups) + result.bias).mean(axis=0)
    uncorrected = (grouped_outputs(x, rounded, groups) + bias).mean(axis=0)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert np.abs(uncorrected - expected).max() > np.abs(actual - expected).max()
    assert result.codes is codes.codes
