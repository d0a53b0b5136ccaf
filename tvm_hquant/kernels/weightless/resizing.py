"""Linear resizing: vectors of channels between four pixels, and the same as a plain loop nest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import IntegerElementwiseConstants, Kernel, KernelRequest, NoConstants
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, Emit, kernel_function
from tvm_hquant.kernels.primitives import (
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
    widen,
)
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.reference.blocks import block
from tvm_hquant.kernels.vector_loops import ARITHMETIC, fitting_lanes, flat, load, row_loop, store, vector_loop, vectors
from tvm_hquant.kernels.weightless.elementwise import is_code, pack_only
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Positions, Resize2D

_INTEGER_TYPES: tuple[ArrayType, ...] = (((1,), "float32"), ((2,), "float32"), ((2,), "int32"))
_PIXELS = 4
"""Of the input for one of the output."""

_ROWS_OF_CODES, _ROWS_OF_FLOATS = 1.5, 3.0
"""Rows of the output between two of the input, on average, from which it takes less time to resize these first: codes are to be
made floats for every pixel around them."""

Pixel = Callable[[Expression, Expression], Expression]
"""The stored values at an input row and column."""


def resize_kernel(request: KernelRequest, lanes: int, processor: Processor = ASSUMED_PROCESSOR) -> Kernel | None:
    """The vector kernel of a linear resize; None for other operators and storages that no precision makes."""
    operator = request.operator
    if not isinstance(operator, Resize2D) or not _is_possible(request):
        return None
    resize = _Resize(request, operator, fitting_lanes(operator.input_shape[3], lanes), lanes, processor)
    emit = resize.emit_by_pairs if resize.has_rows_in_common else resize.emit_by_pixels
    return _kernel(request, f"common.resize2d[{resize.vector}{' rows' if resize.has_rows_in_common else ''}]", emit)


@dataclass(frozen=True)
class _Resize:
    """Loops over an output, in vectors of ``vector`` channels, or of ``lanes`` neighbours where pixels do not matter."""

    request: KernelRequest
    operator: Resize2D
    vector: int
    lanes: int
    processor: Processor

    @property
    def first_pair(self) -> int:
        """The row above the first of the output."""
        _, start, denominator = self.operator.rows
        return start // denominator

    @property
    def pairs(self) -> int:
        """Pairs of neighbouring rows between which rows of the output lie, where it has more of them than the input."""
        step, start, denominator = self.operator.rows
        return ((self.operator.output_shape[1] - 1) * step + start) // denominator - self.first_pair + 1

    @property
    def line(self) -> int:
        """Elements of a row of the output."""
        return self.operator.output_shape[2] * self.operator.output_shape[3]

    @property
    def has_rows_in_common(self) -> bool:
        """Whether so many rows of the output lie between the same two of the input that these are resized first."""
        step, _, denominator = self.operator.rows
        if not 0 < step <= denominator or self.line < self.lanes:
            return False
        fewest = _ROWS_OF_CODES if is_code(self.request.inputs[0]) else _ROWS_OF_FLOATS
        fits = 2 * 4 * self.line <= self.processor.l2_bytes // 2
        return fits and self.operator.output_shape[1] >= fewest * self.pairs

    def emit_by_pixels(self, inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        """Every pixel of the output from the four around it."""
        source, target, p = flat(inputs[0]), flat(output), LlvmPrimitives()
        _, height, width, channels = self.operator.input_shape
        _, out_height, out_width, _ = self.operator.output_shape
        columns_of = _ColumnTables(p, self.operator)
        with self._row_loop(out_height) as line:
            image, row = T.floordiv(line, out_height), T.floormod(line, out_height)
            rows = _between(p, self.operator.rows, row, height)
            with T.serial(out_width) as column:
                columns = columns_of.column(column)
                with vector_loop(channels, self.vector) as channel:

                    def pixel(y: Expression, x: Expression, channel: Expression = channel) -> Expression:
                        return load(source, ((image * height + y) * width + x) * channels + channel, self.vector)

                    value = _interpolated(p, self.request, pixel, rows, columns, constants)
                    place = (line * out_width + column) * channels + channel
                    store(target, place, _stored(p, self.request, value, constants), self.vector)

    def emit_by_pairs(self, inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        """Two rows of the input along their columns, then all rows of the output between them."""
        source, target, p = flat(inputs[0]), flat(output), LlvmPrimitives()
        _, height, width, channels = self.operator.input_shape
        _, out_height, out_width, _ = self.operator.output_shape
        step, start, denominator = self.operator.rows
        columns_of = _ColumnTables(p, self.operator)
        with self._row_loop(self.pairs) as number:
            image, above = T.bind(number // self.pairs), T.bind(number % self.pairs + self.first_pair)
            resized = T.alloc_buffer((2 * self.line,), "float32")
            for side in range(2):
                y = T.bind(T.max(0, T.min(above + side, height - 1)))
                with T.serial(out_width) as column:
                    first, second, fraction = columns_of.column(column)
                    with vector_loop(channels, self.vector) as channel:
                        pixels = (((image * height + y) * width + x) * channels + channel for x in (first, second))
                        a, b = (_as_float(p, self.request, load(source, at, self.vector), constants) for at in pixels)
                        place = side * self.line + column * channels + channel
                        store(resized, place, _mixed(p, a, b, fraction), self.vector)
            begin, end = (T.floordiv((above + k) * denominator - start + step - 1, step) for k in range(2))
            with T.serial(T.bind(T.max(0, begin)), T.bind(T.min(end, out_height))) as row:
                fraction = _fraction(p, self.operator.rows, row, above)
                place = T.bind((image * out_height + row) * self.line)
                with vector_loop(self.line, self.lanes) as at:
                    top, bottom = (p.bind(load(resized, side * self.line + at, self.lanes)) for side in range(2))
                    value = _mixed(p, top, bottom, fraction)
                    store(target, place + at, _stored(p, self.request, value, constants), self.lanes)

    def _row_loop(self, rows: int) -> Any:
        outputs = self.operator.output_shape[0] * self.operator.output_shape[1] * self.operator.output_shape[2]
        instructions = outputs * vectors(self.operator.output_shape[3], self.vector) * _PIXELS * ARITHMETIC
        return row_loop(self.operator.output_shape[0] * rows, work(self.request, instructions), self.processor)


class _ColumnTables:
    """What :func:`_between` gives for every column of the output, which all rows share: it takes as long as some vectors."""

    def __init__(self, p: Primitives, operator: Resize2D) -> None:
        width, out_width = operator.input_shape[2], operator.output_shape[2]
        dtypes = ("int32", "int32", "float32")
        self._tables = [T.alloc_buffer((out_width,), dtype) for dtype in dtypes]
        with T.serial(out_width) as column:
            for table, value in zip(self._tables, _between(p, operator.columns, column, width), strict=True):
                T.buffer_store(table, value, [column])

    def column(self, column: Expression) -> tuple[Expression, Expression, Expression]:
        first, second, fraction = (T.bind(table[column]) for table in self._tables)
        return first, second, fraction


def reference_resize(request: KernelRequest, operator: Resize2D, p: Primitives) -> Kernel | None:
    """The same as plain loops."""
    if not _is_possible(request):
        return None

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        with block("resize2d", operator.output_shape) as (axes, _):
            image, row, column, channel = axes
            rows = _between(p, operator.rows, row, operator.input_shape[1])
            columns = _between(p, operator.columns, column, operator.input_shape[2])

            def pixel(y: Expression, x: Expression) -> Expression:
                return inputs[0][image, y, x, channel]

            value = _interpolated(p, request, pixel, rows, columns, constants)
            T.buffer_store(output, _stored(p, request, value, constants), axes)

    return _kernel(request, "reference.resize2d", emit)


def _is_possible(request: KernelRequest) -> bool:
    return is_code(request.inputs[0]) or not is_code(request.output)


def _kernel(request: KernelRequest, name: str, emit: Emit) -> Kernel:
    integer = is_code(request.inputs[0])
    pack = pack_only(request, IntegerElementwiseConstants if integer else NoConstants)
    return Kernel(request, name, kernel_function(request, _INTEGER_TYPES if integer else (), emit), pack)


def _between(
    p: Primitives, positions: Positions, index: Expression, size: int
) -> tuple[Expression, Expression, Expression]:
    """The input indices on both sides of an output index, and how far it lies from the first, as float32."""
    step, start, denominator = positions
    below = T.floordiv(index * step + start, denominator)
    first, second = (T.max(0, T.min(side, size - 1)) for side in (below, below + 1))
    return first, second, _fraction(p, positions, index, below)


def _fraction(p: Primitives, positions: Positions, index: Expression, below: Expression) -> Expression:
    """How far an output index lies from the input index below it, as float32."""
    step, start, denominator = positions
    rest = convert(index * step + start - below * denominator, "float32")
    return p.bind(p.divide(rest, T.float32(denominator)))


def _interpolated(
    p: Primitives,
    request: KernelRequest,
    pixel: Pixel,
    rows: tuple[Expression, Expression, Expression],
    columns: tuple[Expression, Expression, Expression],
    constants: Sequence[Buffer],
) -> Expression:
    def value(y: Expression, x: Expression) -> Expression:
        return _as_float(p, request, pixel(y, x), constants)

    top, bottom = (_mixed(p, value(y, columns[0]), value(y, columns[1]), columns[2]) for y in rows[:2])
    return _mixed(p, top, bottom, rows[2])


def _as_float(p: Primitives, request: KernelRequest, stored: Expression, constants: Sequence[Buffer]) -> Expression:
    """float32 of what is stored; of codes less the zero point."""
    if is_code(request.inputs[0]):
        return p.bind(convert(centred(stored, constants[2][0]), "float32"))
    return p.bind(widen(stored, request.inputs[0]))


def _mixed(p: Primitives, a: Expression, b: Expression, fraction: Expression) -> Expression:
    return p.bind(p.fma(p.subtract(b, a), broadcast(fraction, lanes_of(a)), a))


def _stored(p: Primitives, request: KernelRequest, value: Expression, constants: Sequence[Buffer]) -> Expression:
    if not is_code(request.inputs[0]):
        return narrow(p, value, request.output)
    multiplier, bounds, zero_points = constants
    scaled = p.fma(value, broadcast(multiplier[0], lanes_of(value)), float_like(0.0, value))
    return requantize(p, scaled, bounds[0], bounds[1], zero_points[1], request.output)
