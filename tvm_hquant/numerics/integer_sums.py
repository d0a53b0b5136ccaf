"""Exact sums of products of codes, as matrix products of floating-point numbers.

Sums are exact, in whatever order a BLAS adds, as long as no partial sum can pass 2²⁴ (float32) or 2⁵³ (float64). Which of
the two is read off the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.numerics.windows import columns, grouped_weights, pad_spatial, positions
from tvm_hquant.operators import Conv2D

Array = npt.NDArray[Any]
_EXACT_IN_FLOAT32 = 2**24
_EXACT_IN_FLOAT64 = 2**53


class IntegerSums:
    """Σ (q − zp)·w of every output of a convolution, exactly, some rows of outputs at a time; padding counts as zp.

    Args:
        operator: the convolution.
        stored: codes of the input, or one byte plane of them, [n, h, w, in_channels].
        zero_point: of these codes.
        points: weight codes, one array [out, in / groups, kh, kw] for each point.

    Raises:
        OverflowError: a sum could pass 2⁵³.
    """

    def __init__(self, operator: Conv2D, stored: Array, zero_point: int, points: Sequence[Array]) -> None:
        self._operator = operator
        limit = max(zero_point, np.iinfo(stored.dtype).max - zero_point)
        exact = max((_exact_type(codes, limit) for codes in points), key=lambda dtype: dtype.itemsize)
        difference: Array = np.subtract(stored, zero_point, dtype=exact)
        padded = pad_spatial(difference, operator.window, 0)
        weights = [grouped_weights(codes, operator).astype(exact) for codes in points]
        if operator.is_depthwise:
            self._depthwise: list[Array] = [_depthwise_sums(operator, padded, w) for w in weights]
            return
        window_count, groups, per_group, out_per_group = weights[0].shape
        depth = window_count * per_group
        self._matrices = [w.transpose(1, 0, 2, 3).reshape(groups, depth, out_per_group) for w in weights]
        self._values = columns(padded, operator).transpose(2, 0, 1, 3).reshape(groups, -1, depth)

    def rows(self, point: int, rows: slice) -> Array:
        """float32 or float64 [rows, out_channels], integers: the sums of a point for some of the n · out_h · out_w rows."""
        if self._operator.is_depthwise:
            own: Array = self._depthwise[point][rows]
            return own
        if self._operator.groups == 1:
            product: Array = self._values[0, rows] @ self._matrices[point][0]
            return product
        sums = np.matmul(self._values[:, rows], self._matrices[point])
        together: Array = sums.transpose(1, 0, 2).reshape(sums.shape[1], self._operator.out_channels)
        return together


def _exact_type(codes: Array, limit: int) -> np.dtype[Any]:
    largest = int(np.abs(codes.astype(np.int64)).reshape(codes.shape[0], -1).sum(axis=1).max()) * limit
    if largest >= _EXACT_IN_FLOAT64:
        raise OverflowError(f"sums of up to {largest} are not exact in float64")
    return np.dtype(np.float32 if largest < _EXACT_IN_FLOAT32 else np.float64)


def _depthwise_sums(operator: Conv2D, padded: Array, weights: Array) -> Array:
    _, out_h, out_w, channels = operator.output_shape
    sums: Array = np.zeros((len(padded), out_h, out_w, channels), padded.dtype)
    product = np.empty_like(sums)
    views = positions(padded, operator.window, (out_h, out_w))
    for view, factor in zip(views, weights.reshape(-1, channels), strict=True):
        np.multiply(view, factor, out=product)
        sums += product
    return sums.reshape(-1, channels)
