"""Integer codes of a layer's weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant import numerics
from tvm_hquant.calibration.input_moments import InputMoments
from tvm_hquant.layers import Layer
from tvm_hquant.precision import Precision
from tvm_hquant.rounding.multipoint import multipoint_codes
from tvm_hquant.rounding.output_error import least_error_codes
from tvm_hquant.rounding.weight_rounding import OUTPUT_ERROR, WeightRounding

Array = npt.NDArray[Any]

FEW_BITS = 6
"""Weights of so many bits and fewer have fitted step sizes."""


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """Weights as codes; real = Σ over points of codes · scales.

    Attributes:
        codes: int8 [points, out_channels, in_channels / groups, kernel_h, kernel_w].
        scales: float32 [points, out_channels].
        bias: float32 [out_channels], real values; a method may have corrected it.
    """

    codes: Array
    scales: Array
    bias: Array

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all values: two layers of one shape with equal digests compute the same."""
        state = hashlib.sha256()
        for values in (self.codes, self.scales, self.bias):
            state.update(f"{values.dtype.str}{values.shape}".encode())
            state.update(np.ascontiguousarray(values).tobytes())
        return state.hexdigest()

    def real(self) -> Array:
        """float32 [out_channels, in_channels / groups, kernel_h, kernel_w]: float32(code) · scale, of one point."""
        return numerics.dequantize_weights(self.codes[0], self.scales[0])


def quantize_layer_weights(
    layer: Layer,
    precision: Precision,
    rounding: WeightRounding = OUTPUT_ERROR,
    moments: InputMoments | None = None,
) -> QuantizedWeights:
    """Codes for the weights of a layer in an integer or weight-only precision.

    Args:
        layer: with its float weights.
        precision: of the layer.
        rounding: how weights become codes.
        moments: of the layer's input, where it was calibrated.
    """
    assert layer.weights is not None
    assert layer.bias is not None
    weights = layer.weights
    if _has_fitted_steps(precision, rounding, moments):
        bits = precision.point_widths[0]
        terms = precision.terms if precision.is_multipoint else float(precision.weight_points)
        codes, scales = multipoint_codes(weights, bits, terms, rounding.quantizer(moments), rounding.per_channel)
    elif precision.weight_points > 1:
        codes, scales = numerics.weight_points(weights, precision.point_widths)
    else:
        given = None
        if not rounding.per_channel:
            _, largest = numerics.quantize_weights(weights.reshape(1, *weights.shape), precision.weight_bits)
            given = np.broadcast_to(largest, weights.shape[:1]).astype(np.float32)
        one_code, one_scale = numerics.quantize_weights(weights, precision.weight_bits, given)
        if rounding.method == "output-error" and moments is not None:
            limit = numerics.weight_code_limit(precision.weight_bits)
            one_code = least_error_codes(weights, one_scale, limit, moments).astype(one_code.dtype)
        codes, scales = one_code[None], one_scale[None]
    return QuantizedWeights(codes, scales, layer.bias)


def _has_fitted_steps(precision: Precision, rounding: WeightRounding, moments: InputMoments | None) -> bool:
    """Whether step sizes are fitted to the weights; otherwise the largest weight gets the largest code.

    The largest weights of a channel are few. With few bits, clipping them loses less than long steps for all others do.
    """
    if precision.is_multipoint or rounding.method in ("floor", "power-of-two"):
        return True
    is_fitted = rounding.method == "output-error" and moments is not None
    return is_fitted and precision.weight_points == 1 and precision.weight_bits <= FEW_BITS
