"""Codes of activations, real = scale · (code − zero point): scales, quantize, dequantize, and requantization."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import DataError
from tvm_hquant.fused_multiply_add import FloatArray
from tvm_hquant.kernels.interface import Requantization
from tvm_hquant.precision import Precision
from tvm_hquant.tensor_format import STORAGE_DTYPE, TensorFormat, code_limits, float_format

_SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)
_LARGEST_SCALE = float(np.finfo(np.float32).max)


def activation_range_to_scale(
    lower: float, upper: float, q_min: int, q_max: int, symmetric: bool = False
) -> tuple[float, int]:
    """Scale (a float32 value) and zero point of codes q_min…q_max for reals from ``lower`` to ``upper``.

    The range is widened to include 0. Asymmetric: scale = (upper − lower) / (q_max − q_min), zero point =
    rint(q_min − lower / scale), clamped into the codes. Symmetric: the zero point is 0 and the larger bound gets the
    code q_max. An all-zero tensor has scale 1.

    Raises:
        DataError: a bound is NaN or infinite, or ``lower`` is above ``upper``.
    """
    if not (math.isfinite(lower) and math.isfinite(upper) and lower <= upper):
        raise DataError(
            f"[{lower}, {upper}] is no range of activations: look for NaN or infinity in the calibration data"
        )
    lower, upper = min(float(lower), 0.0), max(float(upper), 0.0)
    if lower == upper:
        return 1.0, 0 if symmetric else q_min
    width = max(-lower, upper) / q_max if symmetric else (upper - lower) / (q_max - q_min)
    scale = float(np.float32(min(max(width, _SMALLEST_SCALE), _LARGEST_SCALE)))
    if symmetric:
        return scale, 0
    return scale, int(min(max(np.rint(q_min - lower / scale), q_min), q_max))


def activation_format(lower: float, upper: float, precision: Precision) -> TensorFormat:
    """The format of activations of a precision for reals from ``lower`` to ``upper`` (unused for float storage).

    Raises:
        DataError: a bound is NaN or infinite, or ``lower`` is above ``upper``.
    """
    if not precision.is_integer:
        return float_format(precision)
    dtype, q_min, q_max = code_limits(precision)
    scale, zero_point = activation_range_to_scale(lower, upper, q_min, q_max, precision.symmetric)
    return TensorFormat(dtype, scale, zero_point, q_min, q_max)


def code_dtype(q_min: int, q_max: int) -> np.dtype[Any]:
    """The narrowest of uint8, int8 and uint16 (else int32) that holds the codes q_min…q_max."""
    for name in ("uint8", "int8", "uint16"):
        limits = np.iinfo(name)
        if limits.min <= q_min and q_max <= limits.max:
            return np.dtype(name)
    return np.dtype("int32")


def stored_codes(codes: npt.ArrayLike, tensor_format: TensorFormat) -> npt.NDArray[Any]:
    """Canonical codes as kernels keep them: int8 codes become uint8, larger by 128."""
    shifted = np.asarray(codes).astype(np.int32) + tensor_format.storage_offset
    return shifted.astype(STORAGE_DTYPE[tensor_format.storage])


def canonical_codes(stored: npt.ArrayLike, tensor_format: TensorFormat) -> npt.NDArray[Any]:
    """The inverse of :func:`stored_codes`."""
    return (np.asarray(stored).astype(np.int32) - tensor_format.storage_offset).astype(tensor_format.dtype)


def quantize(x: npt.ArrayLike, scale: float, zero_point: int, q_min: int, q_max: int) -> npt.NDArray[Any]:
    """Codes of float32 reals of any shape: rint(x / scale), ties to even, clamped, plus the zero point.

    The division is a true one in float32. The clamp to [q_min − zero_point, q_max − zero_point] comes before the
    conversion to an integer, so infinities give the outermost codes; a NaN gives the lowest.

    Returns:
        uint8, int8 or uint16, whichever holds q_min…q_max.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        v = np.rint(np.asarray(x, np.float32) / np.float32(scale))
    low, high = np.float32(q_min - zero_point), np.float32(q_max - zero_point)
    v = np.where(v > low, v, low)
    v = np.where(v < high, v, high)
    return (v.astype(np.int32) + np.int32(zero_point)).astype(code_dtype(q_min, q_max))


def dequantize(codes: npt.ArrayLike, scale: float, zero_point: int) -> FloatArray:
    """float32(code − zero_point) · scale; canonical codes and zero point, or stored codes and zero point."""
    difference = np.asarray(codes).astype(np.int32) - np.int32(zero_point)
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(difference.astype(np.float32) * np.float32(scale), np.float32)


def multiplier(input_scale: float, weight_scales: npt.ArrayLike, output_scale: float) -> FloatArray:
    """m = float32(float64(s_x) · s_w / s_y), from left to right, of the shape of ``weight_scales``."""
    with np.errstate(over="ignore", under="ignore"):
        product = np.float64(input_scale) * np.asarray(weight_scales, np.float64) / np.float64(output_scale)
        return np.asarray(product, np.float64).astype(np.float32)


def offset(bias: npt.ArrayLike, output_scale: float) -> FloatArray:
    """c = float32(float64(bias) / s_y), of the shape of ``bias``."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.asarray(bias, np.float64) / np.float64(output_scale), np.float64).astype(np.float32)


def residual_multiplier(residual_scale: float, output_scale: float) -> float:
    """m_r = float32(float64(s_r) / s_y) of a residual, and of every input of an add or a requantize."""
    return float(multiplier(residual_scale, 1.0, output_scale))


def requantization(output_format: TensorFormat, lower: float = -math.inf, upper: float = math.inf) -> Requantization:
    """The end of the epilogue for an output format and the real bounds of a fused activation.

    For codes: lo = max(q_min, zp_y + rint(lower / s_y)) and hi = min(q_max, zp_y + rint(upper / s_y)) in float64, both
    kept within the codes, and the clamp is to [lo − zp_y, hi − zp_y]: the same for canonical and stored codes, only the
    zero point is the stored one. For float storage the bounds are the real ones and the zero point is 0.
    """
    if not output_format.is_integer:
        return Requantization(float(np.float32(lower)), float(np.float32(upper)), 0)
    lowest, highest = output_format.q_min - output_format.zero_point, output_format.q_max - output_format.zero_point

    def bound(real: float) -> float:
        return float(min(max(np.rint(np.float64(real) / output_format.scale), lowest), highest))

    return Requantization(bound(lower), bound(upper), output_format.storage_zero_point)
