"""Integer layers: exact sums of products of codes, and the epilogue that makes them codes again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.fused_multiply_add import FloatArray, fma, integer_fma
from tvm_hquant.kernels.interface import (
    IntegerAnchorConstants,
    IntegerElementwiseConstants,
    KernelRequest,
    Requantization,
)
from tvm_hquant.numerics.functions import clamp
from tvm_hquant.numerics.integer_sums import IntegerSums
from tvm_hquant.numerics.storage import narrow
from tvm_hquant.numerics.windows import pad_spatial, positions
from tvm_hquant.operators import Anchor, AveragePool2D, Conv2D, Dense, MaxPool2D
from tvm_hquant.tensor_format import STORAGE_DTYPE, Storage

Array = npt.NDArray[Any]
_BLOCK = 1 << 16
"""Outputs whose epilogue is computed at once: they stay in the second-level cache."""


def requantize(v: FloatArray, end: Requantization, storage: Storage) -> Array:
    """The end of an epilogue, for float32 ``v`` of any shape.

    v = v > lower ? v : lower; v = v < upper ? v : upper; then for codes int(rint(v)) + zero point, for float storage v
    rounded once to it.

    Returns:
        The storage's dtype.
    """
    if storage not in ("uint8", "uint16"):
        return narrow(clamp(v, end.lower, end.upper), storage)
    # Like clamp, fmax and fmin take the bound in place of a NaN; they may differ from it in the sign of a 0, which codes
    # do not have. The code is an integer of at most 16 bits, so float32 holds it.
    clamped = np.fmax(v, np.float32(end.lower))
    np.fmin(clamped, np.float32(end.upper), out=clamped)
    np.rint(clamped, out=clamped)
    clamped += np.float32(end.zero_point)
    return clamped.astype(STORAGE_DTYPE[storage])


def centred(stored: Array, zero_point: int) -> FloatArray:
    """float32(code − zero point); exact."""
    return (stored.astype(np.int32) - np.int32(zero_point)).astype(np.float32)


def _planes(stored: Array, zero_point: int) -> list[tuple[Array, int, np.float32]]:
    """The byte planes of codes with the zero point and factor of each: low first. 8-bit codes are one plane."""
    if stored.dtype == np.uint8:
        return [(stored, zero_point, np.float32(1))]
    low, high = (stored & np.uint16(255)).astype(np.uint8), (stored >> np.uint16(8)).astype(np.uint8)
    return [(low, zero_point & 255, np.float32(1)), (high, zero_point >> 8, np.float32(256))]


def as_convolution(operator: Anchor) -> Conv2D:
    """An anchor as a convolution: a dense layer is a 1×1 one over its rows."""
    return operator.as_conv2d() if isinstance(operator, Dense) else operator


def integer_anchor(request: KernelRequest, constants: IntegerAnchorConstants, inputs: Sequence[Array]) -> Array:
    """An integer convolution or dense layer.

    v = c; for every point ascending, for every plane (low, high): v = fma(float32(acc), m · (1 or 256), v); a fused
    residual: v = fma(float32(r − zp_r), m_r, v); then :func:`requantize`.

    Returns:
        The operator's output shape, in the output storage.
    """
    anchor = request.operator
    assert isinstance(anchor, (Conv2D, Dense))
    operator = as_convolution(anchor)
    points = [np.asarray(codes).reshape(operator.weight_shape) for codes in constants.weight_codes]
    multipliers = np.asarray(constants.multiplier, np.float32)
    planes = [
        (IntegerSums(operator, plane, zero_point, points), factor)
        for plane, zero_point, factor in _planes(inputs[0].reshape(operator.input_shape), constants.input_zero_point)
    ]
    result = np.empty((math.prod(operator.output_shape[:3]), operator.out_channels), STORAGE_DTYPE[request.output])
    block = max(1, _BLOCK // operator.out_channels)
    for first in range(0, len(result), block):
        rows = slice(first, first + block)
        v: FloatArray = np.asarray(constants.offset, np.float32)
        for point, multiplier in enumerate(multipliers):
            for sums, factor in planes:
                v = integer_fma(sums.rows(point, rows), multiplier * factor, v)
        if anchor.epilogue.has_residual:
            residual = centred(inputs[-1].reshape(result.shape)[rows], constants.residual_zero_point)
            v = integer_fma(residual, np.float32(constants.residual_multiplier), v)
        result[rows] = requantize(v, constants.requantization, request.output)
    return result.reshape(anchor.output_shape)


def integer_elementwise(
    request: KernelRequest, constants: IntegerElementwiseConstants, inputs: Sequence[Array]
) -> Array:
    """Add, requantize, or a clip of codes: v = 0; for each input v = fma(float32(q − zp), m, v); :func:`requantize`."""
    v: FloatArray = np.zeros(inputs[0].shape, np.float32)
    for stored, zero_point, factor in zip(inputs, constants.input_zero_points, constants.multipliers, strict=True):
        v = integer_fma(centred(stored, zero_point), factor, v)
    return requantize(v, constants.requantization, request.output)


def integer_multiply(request: KernelRequest, constants: IntegerElementwiseConstants, inputs: Sequence[Array]) -> Array:
    """Product of codes: v = fma(float32(q_a − zp_a) · float32(q_b − zp_b), m, 0); :func:`requantize`.

    The product is rounded alone; of 8-bit codes it is exact.
    """
    a, b = (centred(stored, zero) for stored, zero in zip(inputs, constants.input_zero_points, strict=True))
    # Not the product of integers that integer_fma wants: that of 16-bit codes is rounded.
    v = fma(a * b, np.asarray(constants.multipliers[0], np.float32), np.float32(0))
    return requantize(v, constants.requantization, request.output)


def integer_average_pool(
    request: KernelRequest, constants: IntegerElementwiseConstants, inputs: Sequence[Array]
) -> Array:
    """Average pool of codes: v = fma(float32(Σ (q − zp)), m[out_h, out_w], 0); padding adds nothing."""
    operator = request.operator
    assert isinstance(operator, AveragePool2D)
    _, out_h, out_w, _ = operator.output_shape
    difference = inputs[0].astype(np.int64) - constants.input_zero_points[0]
    sums = np.zeros(operator.output_shape, np.int64)
    for view in positions(pad_spatial(difference, operator.window, 0), operator.window, (out_h, out_w)):
        sums += view
    factors = np.asarray(constants.multipliers[0], np.float32).reshape(out_h, out_w, 1)
    return requantize(integer_fma(sums, factors, np.float32(0)), constants.requantization, request.output)


def max_pool(operator: MaxPool2D, stored: Array) -> Array:
    """The largest code under the window; padding takes no part."""
    _, out_h, out_w, _ = operator.output_shape
    largest = np.zeros(operator.output_shape, stored.dtype)
    for view in positions(pad_spatial(stored, operator.window, 0), operator.window, (out_h, out_w)):
        np.maximum(largest, view, out=largest)
    return largest
