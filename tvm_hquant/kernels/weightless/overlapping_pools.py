"""Average pools of uint8 codes whose windows move by one pixel: neighbouring windows share sums of columns.

For a row of the output every column of the map is added up once, in 16 bits, which hold the codes of a window of up to 257
pixels; then some neighbouring sums are an output. The zero point is subtracted from the whole, as often as the window has
pixels on the map: integers have one sum whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import IntegerElementwiseConstants, Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, kernel_function
from tvm_hquant.kernels.primitives import (
    STACK,
    Expression,
    LlvmPrimitives,
    broadcast,
    convert,
    float_like,
    lanes_of,
    requantize,
)
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import (
    ARITHMETIC,
    MOVE,
    fitting_lanes,
    flat,
    load,
    row_loop,
    store,
    vector_loop,
    vectors,
)
from tvm_hquant.kernels.weightless.elementwise import pack_only
from tvm_hquant.kernels.window_axis import window_axes
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import AveragePool2D

_MOST_PIXELS = 65535 // 255
"""Of a window, whose codes 16 bits hold together."""
_TOGETHER = 4
"""Vectors of sums of columns that are taken together."""


def overlapping_pool_kernel(
    request: KernelRequest, lanes: int, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel | None:
    """None for other operators and storages, for windows that are a single row or column, or further apart, and for maps with
    one output or rows of sums that do not stay in the caches. ``lanes``: float32 values of a vector."""
    operator = request.operator
    if not isinstance(operator, AveragePool2D) or request.inputs != ("uint8",):
        return None
    window, (_, out_h, out_w, _) = operator.window, operator.output_shape
    moves_by_one = window.strides == (1, 1) and window.dilation == (1, 1) and min(window.kernel) > 1
    if not moves_by_one or prod(window.kernel) > _MOST_PIXELS or out_h * out_w == 1:
        return None
    pool = _Pool(request, operator, lanes, processor)
    if 2 * pool.padded_width * operator.input_shape[3] > processor.l2_bytes // 2:
        return None
    types: tuple[ArrayType, ...] = (((out_h, out_w), "float32"), ((2,), "float32"), ((2,), "int32"))
    function = kernel_function(request, types, pool.emit)
    return Kernel(
        request, f"common.average_pool2d[columns {lanes}]", function, pack_only(request, IntegerElementwiseConstants)
    )


@dataclass(frozen=True)
class _Pool:
    request: KernelRequest
    operator: AveragePool2D
    lanes: int
    processor: Processor

    @property
    def padded_width(self) -> int:
        """Columns that windows reach, on the map or beside it."""
        return self.operator.output_shape[2] + self.operator.window.kernel[1] - 1

    @property
    def whole_windows(self) -> range:
        """Columns of the output whose windows lie between the sides of the map: their outputs have the same factor."""
        _, left, _, _ = self.operator.window.padding
        last = self.operator.input_shape[2] - self.operator.window.kernel[1] + left
        return range(left, min(last + 1, self.operator.output_shape[2]))

    def emit(self, inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        """Writes the loops: over rows of the output, for each over columns of the map, then over outputs."""
        batch, out_h, out_w, channels = self.operator.output_shape
        height, width = self.operator.input_shape[1:3]
        rows, columns = window_axes(self.operator.input_shape, self.operator.window)
        outputs = batch * out_h * out_w * vectors(channels, self.lanes)
        steps = MOVE * (rows.kernel + columns.kernel)
        with row_loop(batch * out_h, work(self.request, outputs * (steps + ARITHMETIC)), self.processor) as line:
            image, row = T.bind(line // out_h), T.bind(line % out_h)
            begin, end = (T.bind(side) for side in rows.steps(row))
            sums = T.alloc_buffer((self.padded_width * channels,), "uint16")
            self._fill_sides(sums)
            left = self.operator.window.padding[1]
            on_map = min(width, self.padded_width - left)
            first = T.bind((image * height + rows.base(row)) * (width * channels))
            self._add_columns(flat(inputs[0]), sums, first, (begin, end), left * channels, on_map * channels)
            finish = _Finish(self.request, constants, row)
            for start, stop, lanes in self._runs():
                with vector_loop(stop - start, lanes) as at:
                    total = load(sums, start + at, lanes)
                    for k in range(1, columns.kernel):
                        total = total + load(sums, start + at + k * channels, lanes)
                    column = start // channels
                    pixels = (end - begin) * sum(columns.reaches(column, k) for k in range(columns.kernel))
                    result = finish.result(T.bind(total), column, pixels)
                    place = (line * out_w + column) * self.request.output_shape[-1] + self.request.output_offset
                    store(flat(output), place + at, result, lanes)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Outputs of a row that are neighbours in memory and have the same factor: begin and end, in elements, and lanes."""
        _, _, out_w, channels = self.operator.output_shape
        whole = self.whole_windows
        is_dense = self.request.output_shape[-1] == channels
        column = 0
        while column < out_w:
            together = len(whole) if column == whole.start and is_dense and whole else 1
            start, stop = column * channels, (column + together) * channels
            yield start, stop, fitting_lanes(stop - start, self.lanes)
            column += together

    def _fill_sides(self, sums: Buffer) -> None:
        """Zeros for the columns beside the map."""
        channels, left = self.operator.input_shape[3], self.operator.window.padding[1]
        right = min(left + self.operator.input_shape[2], self.padded_width)
        for start, stop in ((0, left * channels), (right * channels, self.padded_width * channels)):
            if stop > start:
                lanes = fitting_lanes(stop - start, self.lanes)
                with vector_loop(stop - start, lanes) as at:
                    store(sums, start + at, broadcast(T.uint16(0), lanes), lanes)

    def _add_columns(
        self,
        source: Buffer,
        sums: Buffer,
        first: Expression,
        reached: tuple[Expression, Expression],
        start: int,
        length: int,
    ) -> None:
        """The sums over the rows of a window that lie on the map, of ``length`` elements that go to ``start``."""
        lanes = fitting_lanes(length, 2 * self.lanes)
        together = max(count for count in range(1, _TOGETHER + 1) if count * lanes <= length)
        row_elements = self.operator.input_shape[2] * self.operator.input_shape[3]
        with vector_loop(length, together * lanes) as at:
            totals = [T.alloc_buffer((lanes,), "uint16", scope=STACK) for _ in range(together)]
            for total in totals:
                store(total, 0, broadcast(T.uint16(0), lanes), lanes)
            with T.serial(*reached) as y:
                place = T.bind(first + y * row_elements + at)
                for number, total in enumerate(totals):
                    codes = convert(load(source, place + number * lanes, lanes), "uint16")
                    store(total, 0, load(total, 0, lanes) + codes, lanes)
            for number, total in enumerate(totals):
                store(sums, start + at + number * lanes, load(total, 0, lanes), lanes)


@dataclass(frozen=True)
class _Finish:
    """From sums of codes to outputs of a row."""

    request: KernelRequest
    constants: Sequence[Buffer]
    row: Expression

    def result(self, total: Expression, column: int, pixels: Expression) -> Expression:
        """The stored outputs, given the sums of so many pixels, with the factor of a column."""
        multiplier, bounds, zero_points = self.constants
        p = LlvmPrimitives()
        centred = convert(total, "int32") - broadcast(pixels * zero_points[0], lanes_of(total))
        value = convert(centred, "float32")
        value = p.fma(value, broadcast(multiplier[self.row, column], lanes_of(value)), float_like(0.0, value))
        return requantize(p, value, bounds[0], bounds[1], zero_points[1], self.request.output)
