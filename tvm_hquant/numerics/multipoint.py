"""Weights as sums of low-bit tensors, the number of terms chosen for each output channel.

Sources: X. Liu, M. Ye, D. Zhou, Q. Liu, "Post-training Quantization with Multiple Points" (AAAI 2021): each point rounds
what the points before it left. I. Zharikov, A. Sedova, "Post Training Quantization. Flexible continuous modification": the
number of terms is a continuous knob between cost and loss, the step sizes α are variables, and the sum tends to the weights
as terms are added. A channel that has fewer terms than the layer's largest number gets zero codes in the others:
float32(0) · m adds nothing to a sum, so there is one arithmetic.
"""

from __future__ import annotations

import heapq
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tvm_hquant.fused_multiply_add import FloatArray
from tvm_hquant.numerics.weights import limited_scales, smallest_scale, weight_code_limit

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
RoundingMode = Literal["nearest", "floor"]

_STEP_PARTS = np.linspace(0.4, 1.0, 25)
"""Step sizes that are tried, over the one that reaches the largest weight of a channel: it comes last and wins ties."""


def multipoint_codes(
    weights: npt.ArrayLike, bits: int, terms: float, mode: RoundingMode = "nearest"
) -> tuple[Array, FloatArray]:
    """Codes and scales of points whose sum stands for the weights.

    Args:
        weights: float32 [out, …].
        bits: of each point, 2 to 8.
        terms: mean number of points over the output channels, at least 1. Every channel has one; the others go one by one to
            the channel whose squared error they lower most.
        mode: ``nearest``, or ``floor``, which is the quantizer of Zharikov and Sedova.

    Returns:
        int8 codes [ceil(terms), out, …] and float32 scales [ceil(terms), out]. The step size of each point and channel is the
        one with the least squared error among 25.
    """
    own = np.asarray(weights, np.float64)
    residual = own.reshape(own.shape[0], -1)
    count = math.ceil(terms)
    codes, scales, errors = [], [], [np.sum(residual**2, axis=1)]
    floor: float | None = None
    for _ in range(count):
        largest = np.abs(residual).max(axis=1, initial=0.0) / weight_code_limit(bits)
        floor = smallest_scale(largest) if floor is None else floor
        point, step, residual = _best_point(residual, largest, floor, bits, mode)
        codes.append(point)
        scales.append(step)
        errors.append(np.sum(residual**2, axis=1))
    kept = allocated_terms(np.array(errors), terms)
    stacked = np.stack(codes) * (np.arange(count)[:, None, None] < kept[None, :, None])
    return stacked.astype(np.int8).reshape(count, *own.shape), np.stack(scales)


def allocated_terms(errors: Doubles, terms: float) -> npt.NDArray[np.int64]:
    """How many points each channel gets.

    Args:
        errors: squared errors [points + 1, channels] with 0, 1, … points.
        terms: mean number of points.

    Returns:
        [channels], each at least 1, together rint(terms · channels). The next point always goes where it lowers the error most;
        ties go to the first channel.
    """
    points, channels = errors.shape[0] - 1, errors.shape[1]
    kept = np.ones(channels, np.int64)
    if points < 2:
        return kept
    queue = [(errors[2, c] - errors[1, c], c) for c in range(channels)]
    heapq.heapify(queue)
    for _ in range(round(terms * channels) - channels):
        if not queue:
            break
        _, channel = heapq.heappop(queue)
        kept[channel] += 1
        if kept[channel] < points:
            following = errors[kept[channel] + 1, channel] - errors[kept[channel], channel]
            heapq.heappush(queue, (following, channel))
    return kept


def _best_point(
    residual: Doubles, largest: Doubles, floor: float, bits: int, mode: RoundingMode
) -> tuple[Doubles, FloatArray, Doubles]:
    """Codes, scales and what is left of one point: for each channel the step with the least squared error."""
    limit = weight_code_limit(bits)
    best = np.full(len(residual), np.inf)
    codes = np.zeros_like(residual)
    chosen = limited_scales(largest, floor)
    left = residual.copy()
    for part in _STEP_PARTS:
        step = limited_scales(largest * part, floor)
        scaled = residual / step.astype(np.float64)[:, None]
        rounded = np.clip(np.rint(scaled) if mode == "nearest" else np.floor(scaled), -limit, limit)
        rest = residual - step.astype(np.float64)[:, None] * rounded
        error = np.sum(rest**2, axis=1)
        better = error <= best
        best = np.where(better, error, best)
        codes[better], left[better] = rounded[better], rest[better]
        chosen = np.where(better, step, chosen).astype(np.float32)
    return codes, chosen, left
