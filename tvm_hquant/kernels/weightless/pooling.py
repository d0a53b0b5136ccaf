"""Pools over windows: rows of the output go to the threads, channels into vectors, of which some are taken together.

Padding takes no part because the loops over a window begin and end at the border of the map, so no branch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from tvm_hquant.kernels.weightless.overlapping_pools import overlapping_pool_kernel
from tvm_hquant.kernels.window_axis import window_axes
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import AveragePool2D, MaxPool2D
from tvm_hquant.tensor_format import STORAGE_DTYPE

_STEP = 3
"""Instructions that take an element of the window."""

_MOST_VECTORS = 8
"""Vectors of channels that are taken together, at most: half of the registers of AVX2."""

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
            overlapping = overlapping_pool_kernel(request, vector_bytes // 4, processor)
            return overlapping or _integer_average_pool(request, operator, vector_bytes // 4, processor)
        return None if is_code(request.output) else _float_average_pool(request, operator, vector_bytes // 4, processor)
    return None


@dataclass(frozen=True)
class _Part:
    """Neighbouring columns of the output, and the columns of their windows that lie on the map where these are the same."""

    start: int
    stop: int
    columns: tuple[int, int] | None


class _PoolLoops:
    """The loops around a window: one output pixel after the other, some vectors of its channels together.

    These vectors do not wait for each other, and the loops around the window are walked through once for all of them. Over
    most columns of the output, those whose windows have the same columns on the map, these columns are known: LLVM unrolls
    the loop over them.
    """

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
        self.rows, self.columns = window_axes(operator.input_shape, operator.window)

    def emit(self, dtype: str, start: float, step: Step, finish: Finish) -> None:
        """accumulator = start; accumulator = step(accumulator, x) for the window; output = finish(accumulator, row, column)."""
        batch, out_h, out_w, channels = self.operator.output_shape
        outputs = batch * out_h * out_w * vectors(channels, self.lanes)
        instructions = outputs * (self.rows.kernel * self.columns.kernel * _STEP + ARITHMETIC)
        with row_loop(batch * out_h, work(self.request, instructions), self.processor) as line:
            image, row = T.floordiv(line, out_h), T.floormod(line, out_h)
            first_row = T.bind(image * self.operator.input_shape[1] + self.rows.base(row))
            reached_rows = self.rows.steps(row)
            for part in self._parts():
                with T.serial(part.stop - part.start) as number_in_part:
                    column = T.bind(part.start + number_in_part)
                    reached_columns = self.columns.steps(column) if part.columns is None else part.columns
                    with vector_loop(channels, self._together * self.lanes) as channel:
                        accumulators = [_Accumulator(dtype, self.lanes, start) for _ in range(self._together)]
                        with T.serial(*reached_rows) as y, T.serial(*reached_columns) as x:
                            pixel = (first_row + y * self.rows.dilation) * self.operator.input_shape[2]
                            pixel += self.columns.base(column) + x * self.columns.dilation
                            for number, accumulator in enumerate(accumulators):
                                place = pixel * channels + channel + number * self.lanes
                                accumulator.set(step(accumulator.get(), load(self.source, place, self.lanes)))
                        pixel = (line * out_w + column) * self.request.output_shape[-1] + self.request.output_offset
                        for number, accumulator in enumerate(accumulators):
                            result = finish(accumulator.get(), row, column)
                            store(self.output, pixel + channel + number * self.lanes, result, self.lanes)

    @property
    def _together(self) -> int:
        """Vectors of channels that are taken together."""
        channels = self.operator.input_shape[3]
        counts = range(1, min(_MOST_VECTORS, channels // self.lanes) + 1)
        # Around a window stands what takes about as long as a vector. Of equal counts the largest.
        return min(counts, key=lambda count: (vectors(channels, count * self.lanes) * (count + 1), -count))

    def _parts(self) -> Sequence[_Part]:
        """The columns of the output, parted: most of them, whose windows have the same columns on the map, and the others."""
        sections, width = self.columns.sections, self.columns.output_size
        ends = [*(section.start for section in sections[1:]), width]
        longest, end = max(zip(sections, ends, strict=True), key=lambda pair: pair[1] - pair[0].start)
        parts = (
            _Part(0, longest.start, None),
            _Part(longest.start, end, (longest.begin, longest.end)),
            _Part(end, width, None),
        )
        return [part for part in parts if part.start < part.stop]


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
