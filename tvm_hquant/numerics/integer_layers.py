"""Integer layers: exact sums of products of codes, and the epilogue that makes them codes again.

Sums are matrix products of floating-point numbers: exact, in whatever order a BLAS adds, as long as no partial sum
can pass 2²⁴ (float32) or 2⁵³ (float64). Which of the two is read off the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.fused_multiply_add import FloatArray, fma
from tvm_hquant.kernels.interface import (
    IntegerAnchorConstants,
    IntegerElementwiseConstants,
    KernelRequest,
    Requantization,
)
from tvm_hquant.numerics.functions import clamp
from tvm_hquant.numerics.storage import narrow
from tvm_hquant.numerics.windows import columns, grouped_weights, pad_spatial, positions
from tvm_hquant.operators import Anchor, AveragePool2D, Conv2D, Dense, MaxPool2D
from tvm_hquant.tensor_format import STORAGE_DTYPE, Storage

Array = npt.NDArray[Any]
_EXACT_IN_FLOAT32 = 2**24
_EXACT_IN_FLOAT64 = 2**53


def requantize(v: FloatArray, end: Requantization, storage: Storage) -> Array:
    """The end of an epilogue, for float32 ``v`` of any shape.

    v = v > lower ? v : lower; v = v < upper ? v : upper; then for codes int(rint(v)) + zero point, for float storage v
    rounded once to it.

    Returns:
        The storage's dtype.
    """
    v = clamp(v, end.lower, end.upper)
    if storage not in ("uint8", "uint16"):
        return narrow(v, storage)
    return (np.rint(v).astype(np.int32) + np.int32(end.zero_point)).astype(STORAGE_DTYPE[storage])


def centred(stored: Array, zero_point: int) -> FloatArray:
    """float32(code − zero point); exact."""
    return (stored.astype(np.int32) - np.int32(zero_point)).astype(np.float32)


def integer_sums(operator: Conv2D, stored: Array, zero_point: int, codes: Array) -> npt.NDArray[np.float64]:
    """Σ (q − zp)·w of each output, exactly; padding counts as zp.

    Args:
        operator: the convolution.
        stored: codes of the input, or one byte plane of them, [n, h, w, in_channels].
        zero_point: of these codes.
        codes: of the weights, [out, in / groups, kh, kw].

    Returns:
        float64 [n · out_h · out_w, out_channels], integers.

    Raises:
        OverflowError: a sum could pass 2⁵³.
    """
    limit = max(zero_point, np.iinfo(stored.dtype).max - zero_point)
    largest = int(np.abs(codes.astype(np.int64)).reshape(codes.shape[0], -1).sum(axis=1).max()) * limit
    if largest >= _EXACT_IN_FLOAT64:
        raise OverflowError(f"sums of up to {largest} are not exact in float64")
    exact = np.float32 if largest < _EXACT_IN_FLOAT32 else np.float64
    difference = (stored.astype(np.int32) - np.int32(zero_point)).astype(exact)
    padded = pad_spatial(difference, operator.window, 0)
    weights = grouped_weights(codes, operator).astype(exact)
    if operator.is_depthwise:
        sums = _depthwise_sums(operator, padded, weights)
    else:
        window_count, groups, per_group, out_per_group = weights.shape
        depth = window_count * per_group
        matrix = weights.transpose(1, 0, 2, 3).reshape(groups, depth, out_per_group)
        values = columns(padded, operator).transpose(2, 0, 1, 3).reshape(groups, -1, depth)
        sums = np.matmul(values, matrix).transpose(1, 0, 2).reshape(values.shape[1], operator.out_channels)
    return sums.astype(np.float64)


def _depthwise_sums(operator: Conv2D, padded: Array, weights: Array) -> Array:
    _, out_h, out_w, channels = operator.output_shape
    views = positions(padded, operator.window, (out_h, out_w))
    sums = np.zeros(operator.output_shape, padded.dtype)
    for view, factor in zip(views, weights.reshape(-1, channels), strict=True):
        sums += view * factor
    return sums.reshape(-1, channels)


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
    planes = _planes(inputs[0].reshape(operator.input_shape), constants.input_zero_point)
    v: FloatArray = np.asarray(constants.offset, np.float32)
    for point_codes, point_multiplier in zip(constants.weight_codes, constants.multiplier, strict=True):
        codes = np.asarray(point_codes).reshape(operator.weight_shape)
        for plane, zero_point, factor in planes:
            sums = integer_sums(operator, plane, zero_point, codes).astype(np.float32)
            v = fma(sums, np.asarray(point_multiplier, np.float32) * factor, v)
    v = v.reshape(anchor.output_shape)
    if anchor.epilogue.has_residual:
        residual = centred(inputs[-1].reshape(anchor.output_shape), constants.residual_zero_point)
        v = fma(residual, np.float32(constants.residual_multiplier), v)
    return requantize(v, constants.requantization, request.output)


def integer_elementwise(
    request: KernelRequest, constants: IntegerElementwiseConstants, inputs: Sequence[Array]
) -> Array:
    """Add, requantize, or a clip of codes: v = 0; for each input v = fma(float32(q − zp), m, v); :func:`requantize`."""
    v: FloatArray = np.zeros(inputs[0].shape, np.float32)
    for stored, zero_point, factor in zip(inputs, constants.input_zero_points, constants.multipliers, strict=True):
        v = fma(centred(stored, zero_point), factor, v)
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
    return requantize(fma(sums.astype(np.float32), factors, np.float32(0)), constants.requantization, request.output)


def max_pool(operator: MaxPool2D, stored: Array) -> Array:
    """The largest code under the window; padding takes no part."""
    _, out_h, out_w, _ = operator.output_shape
    largest = np.zeros(operator.output_shape, stored.dtype)
    for view in positions(pad_spatial(stored, operator.window, 0), operator.window, (out_h, out_w)):
        np.maximum(largest, view, out=largest)
    return largest
