"""Pools over windows: rows of the output go to the threads, channels into vectors.

Padding takes no part because the loops over a window begin and end at the border of the map, so no branch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import IntegerElementwiseConstants, Kernel, KernelRequest, NoConstants
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, kernel_function
from tvm_hquant.kernels.primitives import (
    STACK,
    Expression,
    LlvmPrimitives,
    Primitives,
    broadcast,
    centred,
    convert,
    float_like,
    lanes_of,
    narrow,
    requantize,
    select,
    widen,
)
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import ARITHMETIC, fitting_lanes, flat, load, row_loop, store, vector_loop, vectors
from tvm_hquant.kernels.weightless.elementwise import is_code, pack_only
from tvm_hquant.kernels.window_axis import window_axes
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import AveragePool2D, MaxPool2D
from tvm_hquant.tensor_format import STORAGE_DTYPE

_STEP = 3
"""Instructions that take an element of the window."""

Pool = MaxPool2D | AveragePool2D

Step = Callable[[Expression, Expression], Expression]
"""The accumulator after one more stored element."""

Finish = Callable[[Expression, Expression, Expression], Expression]
"""The stored output from an accumulator at a row and column."""


def reciprocal(p: Primitives, operator: AveragePool2D, row: Expression, column: Expression) -> Expression:
    """float32(1 / n) at an output position. Dividing in float32 gives it, as 1 and n are exact there."""
    rows, columns = operator.divisors
    if len(set(rows)) == 1 and len(set(columns)) == 1:
        return T.float32(float(np.float32(1 / (rows[0] * columns[0]))))
    counts, axes = [], window_axes(operator.input_shape, operator.window)
    for axis, position, padding in zip(axes, (row, column), (0, 1), strict=True):
        margin = operator.counted_padding[padding], operator.counted_padding[padding + 2]
        begin, end = axis.steps(position, margin)
        counts.append(T.max(T.int32(1), end - begin))
    return p.divide(T.float32(1), convert(counts[0] * counts[1], "float32"))


def sum_dtype(operator: AveragePool2D, storage: str) -> str:
    """The narrowest integer type that holds every sum of a window."""
    largest = operator.window.kernel[0] * operator.window.kernel[1] * (255 if storage == "uint8" else 65535)
    return "int32" if largest < 2**31 else "int64"


class _Accumulator:
    """A vector that lives in registers through a loop."""

    def __init__(self, dtype: str, lanes: int, start: float) -> None:
        self._lanes = lanes
        self._cell = T.alloc_buffer((lanes,), dtype, scope=STACK)
        scalar = T.float32(start) if dtype == "float32" else T.Cast(dtype, T.int32(int(start)))
        self.set(broadcast(scalar, lanes))

    def get(self) -> Expression:
        return load(self._cell, 0, self._lanes)

    def set(self, value: Expression) -> None:
        store(self._cell, 0, value, self._lanes)


def pool_kernel(request: KernelRequest, vector_bytes: int, processor: Processor = ASSUMED_PROCESSOR) -> Kernel | None:
    """Max and average pools; None for other operators, or where codes would be averaged to or from floats."""
    operator, source = request.operator, request.inputs[0]
    if isinstance(operator, MaxPool2D):
        if source != request.output:
            return None
        item = np.dtype(STORAGE_DTYPE[source]).itemsize if is_code(source) else 4
        return _max_pool(request, operator, vector_bytes // item, processor)
    if isinstance(operator, AveragePool2D):
        if is_code(source):
            return _integer_average_pool(request, operator, vector_bytes // 4, processor)
        return None if is_code(request.output) else _float_average_pool(request, operator, vector_bytes // 4, processor)
    return None


class _PoolLoops:
    """The loops around a window: one output vector after the other."""

    def __init__(
        self,
        request: KernelRequest,
        operator: Pool,
        lanes: int,
        processor: Processor,
        source: Buffer,
        output: Buffer,
    ) -> None:
        self.request, self.processor = request, processor
        self.operator, self.lanes = operator, fitting_lanes(operator.input_shape[3], lanes)
        self.source, self.output = flat(source), flat(output)

    def emit(self, dtype: str, start: float, step: Step, finish: Finish) -> None:
        """accumulator = start; accumulator = step(accumulator, x) for the window; output = finish(accumulator, row, column)."""
        _, height, width, channels = self.operator.input_shape
        batch, out_h, out_w, _ = self.operator.output_shape
        rows, columns = window_axes(self.operator.input_shape, self.operator.window)
        outputs = batch * out_h * out_w * vectors(channels, self.lanes)
        instructions = outputs * (rows.kernel * columns.kernel * _STEP + ARITHMETIC)
        with row_loop(batch * out_h, work(self.request, instructions), self.processor) as line:
            image, row = T.floordiv(line, out_h), T.floormod(line, out_h)
            row_begin, row_end = rows.steps(row)
            with T.serial(out_w) as column:
                column_begin, column_end = columns.steps(column)
                with vector_loop(channels, self.lanes) as channel:
                    accumulator = _Accumulator(dtype, self.lanes, start)
                    with T.serial(row_begin, row_end) as y, T.serial(column_begin, column_end) as x:
                        pixel = (image * height + rows.base(row) + y * rows.dilation) * width
                        pixel += columns.base(column) + x * columns.dilation
                        value = load(self.source, pixel * channels + channel, self.lanes)
                        accumulator.set(step(accumulator.get(), value))
                    result = finish(accumulator.get(), row, column)
                    place = (line * out_w + column) * self.request.output_shape[-1] + self.request.output_offset
                    store(self.output, place + channel, result, self.lanes)


def _max_pool(request: KernelRequest, operator: MaxPool2D, lanes: int, processor: Processor) -> Kernel:
    storage = request.inputs[0]
    dtype = STORAGE_DTYPE[storage] if is_code(storage) else "float32"
    lowest = 0.0 if is_code(storage) else float("-inf")

    def step(largest: Expression, value: Expression) -> Expression:
        value = value if is_code(storage) else widen(value, storage)
        return select(value > largest, value, largest)

    def finish(largest: Expression, _row: Expression, _column: Expression) -> Expression:
        return largest if is_code(storage) else narrow(LlvmPrimitives(), largest, storage, may_be_nan=False)

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        _PoolLoops(request, operator, lanes, processor, inputs[0], output).emit(dtype, lowest, step, finish)

    function = kernel_function(request, (), emit)
    return Kernel(request, f"common.max_pool2d[{lanes}]", function, pack_only(request, NoConstants))


def _integer_average_pool(request: KernelRequest, operator: AveragePool2D, lanes: int, processor: Processor) -> Kernel:
    _, out_h, out_w, _ = operator.output_shape
    types: tuple[ArrayType, ...] = (((out_h, out_w), "float32"), ((2,), "float32"), ((2,), "int32"))
    dtype = sum_dtype(operator, request.inputs[0])

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        multiplier, bounds, zero_points = constants

        def step(total: Expression, value: Expression) -> Expression:
            return total + convert(centred(value, zero_points[0]), dtype)

        def finish(total: Expression, row: Expression, column: Expression) -> Expression:
            p, value = LlvmPrimitives(), convert(total, "float32")
            factor = broadcast(multiplier[row, column], lanes_of(value))
            value = p.fma(value, factor, float_like(0.0, value))
            return requantize(p, value, bounds[0], bounds[1], zero_points[1], request.output)

        _PoolLoops(request, operator, lanes, processor, inputs[0], output).emit(dtype, 0, step, finish)

    function = kernel_function(request, types, emit)
    pack = pack_only(request, IntegerElementwiseConstants)
    return Kernel(request, f"common.average_pool2d[{lanes}]", function, pack)


def _float_average_pool(request: KernelRequest, operator: AveragePool2D, lanes: int, processor: Processor) -> Kernel:
    p = LlvmPrimitives()

    def step(total: Expression, value: Expression) -> Expression:
        return p.add(total, widen(value, request.inputs[0]))

    def finish(total: Expression, row: Expression, column: Expression) -> Expression:
        factor = broadcast(reciprocal(p, operator, row, column), lanes_of(total))
        return narrow(p, p.multiply(total, factor), request.output)

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        _PoolLoops(request, operator, lanes, processor, inputs[0], output).emit("float32", 0.0, step, finish)

    function = kernel_function(request, (), emit)
    return Kernel(request, f"common.average_pool2d[{lanes}]", function, pack_only(request, NoConstants))
