"""Products of matrices that are activations both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.fused_multiply_add import FloatArray, fma
from tvm_hquant.kernels.interface import IntegerElementwiseConstants, KernelRequest
from tvm_hquant.numerics.integer_layers import requantize
from tvm_hquant.operators import BatchMatmul

Array = npt.NDArray[Any]


def integer_batch_matmul(
    request: KernelRequest, constants: IntegerElementwiseConstants, inputs: Sequence[Array]
) -> Array:
    """acc = Σ (q_a − zp_a) · (q_b − zp_b), exactly; v = fma(float32(acc), m, 0); then :func:`requantize`.

    Returns:
        The operator's output shape, in the output storage.
    """
    operator = request.operator
    assert isinstance(operator, BatchMatmul)
    # In float64 every sum of products of 16-bit codes is exact, in whatever order it is made.
    a, b = _operands(
        operator,
        [x.astype(np.float64) - zp for x, zp in zip(inputs, constants.input_zero_points, strict=True)],
    )
    sums = np.matmul(a, b).astype(np.int64).astype(np.float32)
    v = fma(sums, np.asarray(constants.multipliers[0], np.float32), np.float32(0))
    return requantize(v, constants.requantization, request.output).transpose(operator.output_axes)


def float_batch_matmul(operator: BatchMatmul, a: FloatArray, b: FloatArray) -> FloatArray:
    """acc = +0; for k ascending: acc = fma(a, b, acc); a scale other than 1 multiplies the sum, rounded alone.

    Returns:
        float32, the operator's output shape.
    """
    left, right = _operands(operator, [a, b])
    total: FloatArray = np.zeros(operator.product_shape, np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for k in range(operator.depth):
            total = fma(left[..., k, None], right[..., k, None, :], total)
        if operator.scale != 1:
            total = total * np.float32(operator.scale)
    return total.transpose(operator.output_axes)


def _operands(operator: BatchMatmul, inputs: Sequence[Array]) -> list[Array]:
    """[…, rows, depth] and […, depth, columns]."""
    return [
        x.transpose(axes).reshape(shape)
        for x, axes, shape in zip(inputs, operator.input_axes, operator.operand_shapes, strict=True)
    ]
