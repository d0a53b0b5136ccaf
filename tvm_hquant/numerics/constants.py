"""Constants of layers from formats and weights: the one place where m, c, L and H are put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.interface import (
    DequantizeConstants,
    IntegerAnchorConstants,
    IntegerElementwiseConstants,
    QuantizeConstants,
)
from tvm_hquant.numerics.codes import multiplier, offset, requantization, residual_multiplier
from tvm_hquant.operators import AveragePool2D, BatchMatmul, Epilogue
from tvm_hquant.tensor_format import TensorFormat


def integer_anchor_constants(
    weight_codes: npt.NDArray[Any],
    weight_scales: npt.ArrayLike,
    bias: npt.ArrayLike,
    input_format: TensorFormat,
    output_format: TensorFormat,
    epilogue: Epilogue,
    residual_format: TensorFormat | None = None,
) -> IntegerAnchorConstants:
    """Constants of an integer convolution or dense layer.

    Args:
        weight_codes: int8 [points, out, in / groups, kh, kw] (or [points, out, in] for a dense layer).
        weight_scales: float32 [points, out].
        bias: float [out]; zeros where there is none.
        input_format, output_format: of the activations; a float output has scale 1.
        epilogue: its bounds are clamped to.
        residual_format: of a fused residual.
    """
    scale = output_format.scale
    return IntegerAnchorConstants(
        weight_codes=weight_codes,
        input_zero_point=input_format.storage_zero_point,
        multiplier=multiplier(input_format.scale, weight_scales, scale),
        offset=offset(bias, scale),
        requantization=requantization(output_format, epilogue.lower, epilogue.upper),
        residual_multiplier=0.0 if residual_format is None else residual_multiplier(residual_format.scale, scale),
        residual_zero_point=0 if residual_format is None else residual_format.storage_zero_point,
    )


def elementwise_constants(
    input_formats: Sequence[TensorFormat],
    output_format: TensorFormat,
    lower: float = -math.inf,
    upper: float = math.inf,
) -> IntegerElementwiseConstants:
    """Constants of an add of codes (two inputs), or of a requantize or clip of codes (one input)."""
    return IntegerElementwiseConstants(
        input_zero_points=tuple(f.storage_zero_point for f in input_formats),
        multipliers=tuple(multiplier(f.scale, 1.0, output_format.scale) for f in input_formats),
        requantization=requantization(output_format, lower, upper),
    )


def multiply_constants(
    input_formats: Sequence[TensorFormat], output_format: TensorFormat
) -> IntegerElementwiseConstants:
    """Constants of a product of codes: m = float32(s_a · s_b / s_y), one for both inputs."""
    a, b = input_formats
    return IntegerElementwiseConstants(
        input_zero_points=(a.storage_zero_point, b.storage_zero_point),
        multipliers=(multiplier(a.scale, b.scale, output_format.scale),),
        requantization=requantization(output_format),
    )


def matmul_constants(
    operator: BatchMatmul, input_formats: Sequence[TensorFormat], output_format: TensorFormat
) -> IntegerElementwiseConstants:
    """Constants of products of matrices of codes: m = float32(s_a · s_b · scale / s_y)."""
    a, b = input_formats
    factor = np.float64(a.scale) * b.scale * operator.scale / output_format.scale
    return IntegerElementwiseConstants(
        input_zero_points=(a.storage_zero_point, b.storage_zero_point),
        multipliers=(np.asarray(factor, np.float32),),
        requantization=requantization(output_format),
    )


def average_pool_constants(
    operator: AveragePool2D, input_format: TensorFormat, output_format: TensorFormat
) -> IntegerElementwiseConstants:
    """Constants of an average pool of codes: m = float32(s_x / (n · s_y)) for every output position."""
    rows, columns = operator.divisors
    divisors = np.outer(rows, columns).astype(np.float64) * output_format.scale
    return IntegerElementwiseConstants(
        input_zero_points=(input_format.storage_zero_point,),
        multipliers=((input_format.scale / divisors).astype(np.float32),),
        requantization=requantization(output_format),
    )


def quantize_constants(output_format: TensorFormat) -> QuantizeConstants:
    """Constants of a quantize to codes."""
    return QuantizeConstants(output_format.scale, requantization(output_format))


def dequantize_constants(input_format: TensorFormat) -> DequantizeConstants:
    """Constants of a dequantize from codes."""
    return DequantizeConstants(input_format.scale, input_format.storage_zero_point)
