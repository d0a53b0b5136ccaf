"""Products of matrices that are activations both, as plain loop nests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import IntegerElementwiseConstants, Kernel, KernelRequest, NoConstants
from tvm_hquant.kernels.kernel_function import Buffer, kernel_function
from tvm_hquant.kernels.matmul.batch_matmul import INTEGER_TYPES, as_dense_request
from tvm_hquant.kernels.primitives import Expression, Primitives, centred, convert, narrow, requantize, widen
from tvm_hquant.kernels.reference.blocks import Axes, accumulate, block, intermediate
from tvm_hquant.kernels.weightless.elementwise import is_code, pack_only
from tvm_hquant.operators import BatchMatmul


def reference_batch_matmul(request: KernelRequest, operator: BatchMatmul, p: Primitives) -> Kernel | None:
    """The kernel; None for 16-bit codes, and for codes times floats."""
    if as_dense_request(request) is None:
        return None
    is_integer = is_code(request.inputs[0])
    total = "int32" if is_integer else "float32"

    def element(source: Buffer, index: int, axes: Axes, row: Expression, column: Expression) -> Expression:
        """The stored value in a row and column of the matrix that input ``index`` gives for a place of the batch."""
        shape, order = operator.operand_shapes[index], operator.input_axes[index]
        batch = [a if size > 1 else T.int32(0) for a, size in zip(axes[:-2], shape[:-2], strict=True)]
        seen = [*batch, row, column][len(shape) - len(order) :]
        return source[tuple(seen[order.index(axis)] for axis in range(len(order)))]

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        sums = intermediate(operator.product_shape, total)
        with block("sum", operator.product_shape, (operator.depth,)) as (axes, summed):
            a = element(inputs[0], 0, axes, axes[-2], summed[0])
            b = element(inputs[1], 1, axes, summed[0], axes[-1])
            if is_integer:
                zero_points = constants[2]
                value = sums[tuple(axes)] + centred(a, zero_points[0]) * centred(b, zero_points[1])
            else:
                value = p.fma(widen(a, request.inputs[0]), widen(b, request.inputs[1]), sums[tuple(axes)])
            accumulate(sums, axes, T.Cast(total, T.int32(0)), value)
        with block("epilogue", operator.product_shape) as (axes, _):
            value = sums[tuple(axes)]
            if is_integer:
                multiplier, bounds, zero_points = constants
                value = p.fma(convert(value, "float32"), multiplier[0], T.float32(0))
                result = requantize(p, value, bounds[0], bounds[1], zero_points[2], request.output)
            else:
                scale = T.float32(float(np.float32(operator.scale)))
                result = narrow(p, value if operator.scale == 1 else p.multiply(value, scale), request.output)
            T.buffer_store(output, result, [axes[axis] for axis in operator.output_axes])

    if is_integer:
        function = kernel_function(request, INTEGER_TYPES, emit)
        return Kernel(request, "reference.batch_matmul", function, pack_only(request, IntegerElementwiseConstants))
    return Kernel(
        request, "reference.batch_matmul", kernel_function(request, (), emit), pack_only(request, NoConstants)
    )
