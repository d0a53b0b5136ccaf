"""Where the elements of the matrices of a batch matmul lie in flat buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.operators import BatchMatmul, Shape


@dataclass(frozen=True)
class MatrixView:
    """Matrices in a flat buffer.

    Attributes:
        leading: sizes of the axes before the matrix, as the product has them.
        leading_strides: elements between neighbours along each of them; 0 where a matrix is repeated.
        row_stride, column_stride: elements between neighbours in a column, and in a row.
    """

    leading: Shape
    leading_strides: Shape
    row_stride: int
    column_stride: int

    def start(self, number: Expression) -> Expression:
        """Where matrix ``number`` of the product's batch begins."""
        position: Expression = T.int32(0)
        for size, stride in zip(reversed(self.leading), reversed(self.leading_strides), strict=True):
            if stride:
                position = position + T.floormod(number, size) * stride
            number = T.floordiv(number, size)
        return position


def input_view(operator: BatchMatmul, index: int) -> MatrixView:
    """The matrices of an input."""
    shape, axes = operator.input_shapes[index], operator.input_axes[index]
    strides = [math.prod(shape[axis + 1 :]) for axis in axes]
    missing = len(operator.product_shape) - len(shape)
    sizes = operator.operand_shapes[index][:-2]
    leading = tuple(s if n > 1 else 0 for s, n in zip([0] * missing + strides[:-2], sizes, strict=True))
    return MatrixView(operator.batch_shape, leading, strides[-2], strides[-1])


def output_view(operator: BatchMatmul) -> MatrixView:
    """The matrices of the product, in the output."""
    shape = operator.output_shape
    strides = [math.prod(shape[operator.output_axes.index(axis) + 1 :]) for axis in range(len(shape))]
    return MatrixView(operator.batch_shape, tuple(strides[:-2]), strides[-2], strides[-1])


def distinct(view: MatrixView) -> MatrixView:
    """The same matrices, each once: leading axes along which they are repeated have size 1."""
    sizes = tuple(size if stride else 1 for size, stride in zip(view.leading, view.leading_strides, strict=True))
    return MatrixView(sizes, view.leading_strides, view.row_stride, view.column_stride)


def dense_numbers(view: MatrixView, size: int) -> MatrixView:
    """For copies of the distinct matrices of a view, ``size`` elements each, one after the other: where they begin."""
    strides: list[int] = []
    for length, stride in zip(reversed(view.leading), reversed(view.leading_strides), strict=True):
        strides.insert(0, size if stride else 0)
        size *= length if stride else 1
    return MatrixView(view.leading, tuple(strides), 0, 0)
