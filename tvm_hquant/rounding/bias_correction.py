"""Bias correction: takes the mean error that rounding the weights makes out of the bias.

Rounded weights shift the mean of a layer's output by Δw · E[x], and behind a ReLU, where all activations are positive, the
shift of every channel adds up from layer to layer. The expected input is known from calibration, so the shift is
subtracted from the bias, at no cost when the network runs.

Source: M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2;
with means observed on data as in R. Banner et al., "Post training 4-bit quantization", NeurIPS 2019, section 5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.layers import Layer
from tvm_hquant.quantized_weights import QuantizedWeights

Array = npt.NDArray[Any]


def corrected(layer: Layer, weights: QuantizedWeights, input_means: Array) -> QuantizedWeights:
    """The same codes with a bias that makes up for their mean error.

    Args:
        layer: with its float weights.
        weights: its codes.
        input_means: float64 [groups, columns], means of what the layer's weights are multiplied with
            (:class:`tvm_hquant.calibration.input_moments.InputMoments`).
    """
    assert layer.weights is not None
    scales = weights.scales.astype(np.float64)[:, :, None, None, None]
    error = (weights.codes.astype(np.float64) * scales).sum(axis=0) - layer.weights.astype(np.float64)
    by_group = error.reshape(len(input_means), -1, input_means.shape[1])
    shift = (by_group * input_means[:, None, :]).sum(axis=2).reshape(-1)
    return replace(weights, bias=(weights.bias.astype(np.float64) - shift).astype(np.float32))
