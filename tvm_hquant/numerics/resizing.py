"""Linear resizing of maps, of codes and of floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.fused_multiply_add import FloatArray, fma
from tvm_hquant.kernels.interface import IntegerElementwiseConstants, KernelRequest
from tvm_hquant.numerics.integer_layers import centred, requantize
from tvm_hquant.operators import Positions, Resize2D

Array = npt.NDArray[Any]


def neighbours(positions: Positions, size: int, count: int) -> tuple[Array, Array, FloatArray]:
    """For each of ``count`` outputs the input indices around it, within the map, and the fraction between them.

    An output lies at (step · i + start) / denominator. The fraction is the remainder over the denominator, divided in
    float32, where both are exact.
    """
    step, start, denominator = positions
    numerators = step * np.arange(count, dtype=np.int64) + start
    below = numerators // denominator
    fractions = (numerators - below * denominator).astype(np.float32) / np.float32(denominator)
    return np.clip(below, 0, size - 1), np.clip(below + 1, 0, size - 1), fractions


def float_resize(operator: Resize2D, x: FloatArray) -> FloatArray:
    """Between columns first, then between rows; each step is fma(b − a, fraction, a), the difference rounded alone.

    Args:
        operator: the resize.
        x: float32 [n, h, w, c].
    """
    _, height, width, _ = operator.input_shape
    top, bottom, row_fractions = neighbours(operator.rows, height, operator.output_size[0])
    left, right, column_fractions = neighbours(operator.columns, width, operator.output_size[1])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        above, beneath = (
            _mixed(x[:, rows][:, :, left], x[:, rows][:, :, right], column_fractions[:, None]) for rows in (top, bottom)
        )
        return _mixed(above, beneath, row_fractions[:, None, None])


def _mixed(a: FloatArray, b: FloatArray, fractions: FloatArray) -> FloatArray:
    return fma(b - a, np.broadcast_to(fractions, a.shape), a)


def integer_resize(request: KernelRequest, constants: IntegerElementwiseConstants, inputs: Sequence[Array]) -> Array:
    """:func:`float_resize` of float32(q − zp); v = fma(that, m, 0); :func:`requantize`."""
    operator = request.operator
    assert isinstance(operator, Resize2D)
    value = float_resize(operator, centred(inputs[0], constants.input_zero_points[0]))
    v = fma(value, np.float32(constants.multipliers[0]), np.float32(0))
    return requantize(v, constants.requantization, request.output)
