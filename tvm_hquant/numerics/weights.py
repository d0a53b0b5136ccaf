"""Codes of weights: per output channel, zero point 0, within −127…127 at 8 bits and fewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import PrecisionError
from tvm_hquant.fused_multiply_add import FloatArray

Array = npt.NDArray[Any]

SMALLEST_RELATIVE_SCALE = 2.0**-24
"""No scale of a channel is less than this part of the layer's largest."""
ACCUMULATOR_LIMIT = 2**31
_LARGEST_ACTIVATION_CODE = 255


def weight_code_limit(bits: int) -> int:
    """The largest magnitude of symmetric codes of 2 to 8 bits: 2^(bits − 1) − 1, so 127 at 8 bits.

    Raises:
        PrecisionError: fewer than 2 bits or more than 8.
    """
    if not 2 <= bits <= 8:
        raise PrecisionError(f"codes of weights cannot have {bits} bits: use 2 to 8, or a sum of several points")
    return int(2 ** (bits - 1) - 1)


def _channels(weights: npt.ArrayLike) -> npt.NDArray[np.float64]:
    matrix = np.asarray(weights, np.float64)
    return matrix.reshape(matrix.shape[0], -1)


def smallest_scale(scales: npt.ArrayLike) -> float:
    """The lower limit of the scales of a layer: 2⁻²⁴ of its largest, at least 2⁻¹²⁶; 0 where all are 0."""
    largest = float(np.max(np.asarray(scales, np.float64), initial=0.0))
    return max(largest * SMALLEST_RELATIVE_SCALE, float(np.finfo(np.float32).smallest_normal)) if largest > 0 else 0.0


def limited_scales(scales: npt.ArrayLike, floor: float | None = None) -> FloatArray:
    """Scales as float32, raised to the lower limit of their layer (or ``floor``); 1 everywhere if all are 0."""
    values = np.asarray(scales, np.float64)
    lowest = smallest_scale(values) if floor is None else floor
    if lowest == 0:
        return np.ones(values.shape, np.float32)
    return np.maximum(values, lowest).astype(np.float32)


def round_weights(weights: npt.ArrayLike, scales: npt.ArrayLike, bits: int) -> Array:
    """clamp(rint(w / s)) in float64, ties to even, per output channel.

    Args:
        weights: [out, …].
        scales: [out], positive.
        bits: 2 to 8.

    Returns:
        int8 of the shape of ``weights``, within ±(2^(bits − 1) − 1).
    """
    limit = weight_code_limit(bits)
    matrix = _channels(weights)
    codes = np.clip(np.rint(matrix / np.asarray(scales, np.float64)[:, None]), -limit, limit)
    return codes.astype(np.int8).reshape(np.shape(weights))


def quantize_weights(
    weights: npt.ArrayLike, bits: int, scales: npt.ArrayLike | None = None
) -> tuple[Array, FloatArray]:
    """Weights rounded to nearest, per output channel, symmetric.

    Args:
        weights: float32 [out, …].
        bits: 2 to 8.
        scales: [out]; the largest magnitude of each channel over the largest code if not given.

    Returns:
        Codes (int8, shape of ``weights``) and scales (float32 [out]). Scales are raised to 2⁻²⁴ of the layer's largest; a
        layer of zeros has scales 1.

    Raises:
        PrecisionError: fewer than 2 bits or more than 8.
    """
    if scales is None:
        scales = np.abs(_channels(weights)).max(axis=1, initial=0.0) / weight_code_limit(bits)
    limited = limited_scales(scales)
    return round_weights(weights, limited, bits), limited


def dequantize_weights(codes: npt.ArrayLike, scales: npt.ArrayLike) -> FloatArray:
    """float32(code) · scale per output channel, the product rounded alone: the weights of weight-only precisions.

    Args:
        codes: [out, …].
        scales: float32 [out].
    """
    values = np.asarray(codes, np.float32)
    factors = np.asarray(scales, np.float32).reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(values * factors, np.float32)


def weight_points(weights: npt.ArrayLike, widths: Sequence[int]) -> tuple[Array, FloatArray]:
    """Weights as a sum of tensors of few bits, each rounding what the ones before it left (greedy multipoint quantization,
    X. Liu, M. Ye, D. Zhou, Q. Liu: Post-training Quantization with Multiple Points, AAAI 2021).

    Args:
        weights: float32 [out, …].
        widths: bits of each point, 2 to 8; at least one.

    Returns:
        int8 codes [points, out, …] and float32 scales [points, out], by descending scale. No scale is less than 2⁻²⁴
        of the largest of the first point.
    """
    residual = np.asarray(weights, np.float64)
    codes, scales = [], []
    floor: float | None = None
    for bits in widths:
        largest = np.abs(_channels(residual)).max(axis=1, initial=0.0) / weight_code_limit(bits)
        point_scales = limited_scales(largest, floor)
        floor = smallest_scale(largest) if floor is None else floor
        point_codes = round_weights(residual, point_scales, bits)
        shape = (-1, *[1] * (residual.ndim - 1))
        residual = residual - point_scales.astype(np.float64).reshape(shape) * point_codes
        codes.append(point_codes)
        scales.append(point_scales)
    return np.stack(codes), np.stack(scales)


def check_accumulator(codes: npt.ArrayLike, zero_point: int, layer: str = "the layer") -> None:
    """Whether the int32 accumulators of a layer are safe: |start| + 255 · Σ|w| < 2³¹ for every output channel.

    Args:
        codes: int8 weights of one point, [out, …].
        zero_point: of the stored codes; of 16-bit codes, both its bytes are checked.
        layer: its name, for the message.

    Raises:
        PrecisionError: an accumulator could overflow.
    """
    matrix = np.asarray(codes).astype(np.int64).reshape(np.shape(codes)[0], -1)
    planes = [zero_point] if zero_point <= _LARGEST_ACTIVATION_CODE else [zero_point & 255, zero_point >> 8]
    start = max(planes) * np.abs(matrix.sum(axis=1))
    worst = start + _LARGEST_ACTIVATION_CODE * np.abs(matrix).sum(axis=1)
    channel = int(worst.argmax())
    if worst[channel] >= ACCUMULATOR_LIMIT:
        raise PrecisionError(
            f"{layer}: the int32 accumulator of output channel {channel} could reach {int(worst[channel])}, at most "
            f"{ACCUMULATOR_LIMIT - 1} is allowed: use a float precision or fewer weight bits for this layer"
        )
