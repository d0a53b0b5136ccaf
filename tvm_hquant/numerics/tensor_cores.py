"""What a tensor core may make of a layer of 16-bit floats: the smallest and the largest value of every output.

A tensor core adds several products at once. NVIDIA does not document how; it was found out by experiment: products are exact;
the running sum and four, eight or sixteen products are aligned to the largest exponent among them and cut off behind 23 bits of
fraction or more; what they add up to is cut off to a float32. Blocks and bits differ from one generation to the next, so the
bound here takes the coarsest of them for all.

Sources: M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, *Numerical behavior of NVIDIA tensor cores*, PeerJ Computer Science
7:e330, 2021 (V100, T4, A100); F. A. Khattak, M. Mikaitis, *Accurate models of NVIDIA tensor cores*, arXiv:2512.07004, 2025
(V100, A100, H100, B200). Running error bounds: N. J. Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import KernelError
from tvm_hquant.fused_multiply_add import FloatArray
from tvm_hquant.kernels.interface import FloatAnchorConstants, KernelRequest, LayerConstants
from tvm_hquant.numerics.float_layers import float_epilogue, widened_convolution
from tvm_hquant.numerics.storage import widen
from tvm_hquant.numerics.windows import columns, grouped_weights, pad_spatial
from tvm_hquant.operators import Conv2D

Array = npt.NDArray[Any]
DoubleArray = npt.NDArray[np.float64]

STEP = 16
"""Input channels that one instruction multiplies at most, in whatever order."""
_SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126}
"""Operands below this, zeros included, count with its exponent when products are aligned."""
_SMALLEST_SUM = 2.0**-126
_UNIT = 24 * 2.0**-23 * (1 + 2.0**-16)
"""Error of a step, relative to the sum before it and all magnitudes that it adds: in each of four blocks of four products all
numbers but the largest are cut off, then the block's sum, and once more where it is added apart: (4 + 2) · 4 errors of 2⁻²³.
The last factor is for errors of errors, and for float64."""


@dataclass(frozen=True, eq=False)
class ValueLimits:
    """The stored values between which a layer's output must lie, both included; equal where it must be that one."""

    lower: Array
    upper: Array


def tensor_core_limits(request: KernelRequest, constants: LayerConstants, inputs: Sequence[Array]) -> ValueLimits:
    """Limits for a convolution or dense layer of 16-bit floats that is summed in float32 on tensor cores.

    The exact sum and its limits are computed in float64; the epilogue is the contract's, which never turns the order of two
    values round. Where an operand is infinite or NaN, both limits are what it makes of the sum. Nothing is said of sums that
    overflow on their way, nor of bfloat16 values, products and sums below 2⁻¹²⁶ but zero.

    Args:
        request, constants, inputs: as of :func:`tvm_hquant.numerics.evaluate`.

    Raises:
        KernelError: the request is not for such a layer.
    """
    if not isinstance(constants, FloatAnchorConstants) or request.inputs[0] not in _SMALLEST_NORMAL:
        raise KernelError(f"{request.operator} from {', '.join(request.inputs)} is no layer of 16-bit floats")
    operator, x, weights, start = widened_convolution(request, constants, inputs)
    sums, errors = sum_limits(operator, x, weights, start, _SMALLEST_NORMAL[request.inputs[0]])
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(errors)
        lower = np.where(finite, sums - errors, sums)
        upper = np.where(finite, sums + errors, sums)
    return ValueLimits(
        float_epilogue(request, constants, inputs, _towards(lower, -np.inf)),
        float_epilogue(request, constants, inputs, _towards(upper, np.inf)),
    )


def sum_limits(
    operator: Conv2D, x: FloatArray, weights: FloatArray, start: FloatArray, smallest: float
) -> tuple[DoubleArray, DoubleArray]:
    """Exact sums (in float64), and how far a tensor core may be from them; both [n · out_h · out_w, out_channels].

    After the products of every step: error += unit · (|sum before| + error + Σ|x|·|w| + smallest sum), where magnitudes of
    operands are at least ``smallest``.

    Args:
        operator: the convolution.
        x: float32 [n, h, w, in_channels].
        weights: float32 [out, in / groups, kh, kw].
        start: float32 [out].
        smallest: magnitude of the smallest normal number of the operands' storage.
    """
    values = columns(pad_spatial(x, operator.window, 0.0), operator).transpose(1, 2, 0, 3).astype(np.float64)
    factors = grouped_weights(weights, operator).astype(np.float64)
    taps, groups, rows, depth = values.shape
    shape = (groups, rows, operator.out_channels // groups)
    sums = np.broadcast_to(start.astype(np.float64).reshape(groups, 1, -1), shape)
    errors: DoubleArray = np.zeros(shape)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for tap in range(taps):
            for first in range(0, depth, STEP):
                operands = values[tap, :, :, first : first + STEP]
                others = factors[tap, :, first : first + STEP]
                added = np.maximum(np.abs(operands), smallest) @ np.maximum(np.abs(others), smallest)
                errors = errors + _UNIT * (np.abs(sums) + errors + added + _SMALLEST_SUM)
                sums = sums + operands @ others
    return _by_pixel(sums), _by_pixel(errors)


def _by_pixel(values: DoubleArray) -> DoubleArray:
    """[groups, rows, out / groups] as [rows, out]."""
    return np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(values.shape[1], -1)


def _towards(values: DoubleArray, direction: float) -> FloatArray:
    """The nearest float32 that is not on the other side."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = values.astype(np.float32)
        beyond = rounded > values if direction < 0 else rounded < values
        return np.where(beyond, np.nextafter(rounded, np.float32(direction)), rounded)


def beyond_limits(actual: Array, limits: ValueLimits, storage: str) -> tuple[int, float]:
    """How many values of a float storage lie outside of their limits, and how far at most; any NaN is a NaN."""
    if actual.shape != limits.lower.shape or actual.dtype != limits.lower.dtype:
        return max(actual.size, 1), float("inf")
    values, lower, upper = (widen(a, storage).astype(np.float64) for a in (actual, limits.lower, limits.upper))
    is_nan = np.isnan(values)
    with np.errstate(invalid="ignore"):
        inside = np.where(is_nan, np.isnan(lower) & np.isnan(upper), (values >= lower) & (values <= upper))
        distance = np.where(inside, 0.0, np.fmax(lower - values, values - upper))
    count = int((~inside).sum())
    return count, float(np.nan_to_num(distance, nan=np.inf, posinf=np.inf).max()) if count else 0.0
