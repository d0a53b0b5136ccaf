"""Depthwise convolution of floats: every lane is a channel, and activations are read where they are.

A tile holds some pixels of an output row for one vector of channels. For every kernel row it loads each input column that the
tile spans once, and adds its products with all kernel columns that meet it. Padding is a vector of zeros, or left out where
that changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import float_array_types, pack_float
from tvm_hquant.kernels.convolution.row_tiles import TileRun, cut_row, split_at_borders
from tvm_hquant.kernels.depthwise.geometry import DepthwiseGeometry
from tvm_hquant.kernels.dot_product import DotProduct, FloatDot
from tvm_hquant.kernels.epilogues.epilogue import Epilogue
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, input_place, kernel_function
from tvm_hquant.kernels.primitives import STACK, Expression, float_like, widen
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import fitting_lanes, flat, load, store
from tvm_hquant.kernels.window_axis import window_axes
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Conv2D

_TILE = 4
"""What a tile costs besides its pixels, in pixels."""


def float_depthwise_kernel(
    request: KernelRequest, dot: DotProduct, family: str, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel:
    """The kernel of a depthwise convolution with float weights."""
    conv = request.operator
    assert isinstance(conv, Conv2D)
    lanes = fitting_lanes(conv.in_channels, dot.lanes)
    dot = dot if lanes == dot.lanes else FloatDot(lanes, dot.registers, request.weights)
    geometry = DepthwiseGeometry(conv, dot, planes=1, points=1, processor=processor)
    types = float_array_types(geometry.vectors * geometry.weight_elements, dot.weight_dtype, geometry.packed_lanes)

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        return pack_float(constants, geometry)

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        weights, starts, limits = arrays
        residual = flat(inputs[1]) if conv.epilogue.has_residual else None
        epilogue = Epilogue(request, lanes, lanes, residual, limits, None, flat(output))
        _Emitter(request, geometry, flat(inputs[0]), weights, starts, epilogue).emit()

    name = f"{family}.depthwise_conv2d[{dot.name} {geometry.pixels}x{lanes}]"
    return Kernel(request, name, kernel_function(request, types, emit), pack)


@dataclass(frozen=True)
class _Emitter:
    request: KernelRequest
    geometry: DepthwiseGeometry
    source: Buffer
    weights: Buffer
    starts: Buffer
    epilogue: Epilogue

    @property
    def conv(self) -> Conv2D:
        return self.geometry.conv

    @property
    def skips_padding(self) -> bool:
        return self.request.finite_weights and self.conv.epilogue.lower >= 0

    @cached_property
    def runs(self) -> tuple[TileRun, ...]:
        """The tiles of an output row."""
        _, columns = window_axes(self.conv.input_shape, self.conv.window)
        runs = cut_row(columns.output_size, self.geometry.pixels, lambda pixels: pixels + _TILE)
        return split_at_borders(runs, columns)

    def emit(self) -> None:
        geometry, lanes = self.geometry, self.geometry.lanes
        height, width = geometry.output_size
        rows = self.conv.input_shape[0] * height
        loop = (
            T.parallel
            if geometry.processor.shares(work(self.request, geometry.instructions)) and rows > 1
            else T.serial
        )
        with loop(rows) as row:
            image, y = T.bind(row // height), T.bind(row % height)
            for run in self.runs:
                with ExitStack() as loops:
                    number = loops.enter_context(T.serial(run.count)) if run.count > 1 else 0
                    x = number * run.pixels + run.start
                    x = T.bind(x if run.start + run.count * run.pixels <= width else T.min(x, width - run.pixels))
                    vector = loops.enter_context(T.serial(geometry.vectors))
                    channel = T.bind(T.min(vector * lanes, geometry.channels - lanes))
                    self._tile(run, image, y, x, vector, channel)

    def _tile(
        self, run: TileRun, image: Expression, y: Expression, x: Expression, vector: Expression, channel: Expression
    ) -> None:
        geometry, lanes, pixels = self.geometry, self.geometry.lanes, range(run.pixels)
        height, width = geometry.output_size
        sums = [T.alloc_buffer((lanes,), "float32", scope=STACK) for _ in pixels]
        start = T.bind(load(self.starts, vector * lanes, lanes))
        for total in sums:
            store(total, 0, start, lanes)
        self._accumulate(run, sums, image, y, x, vector, channel)
        for i in pixels:
            place = ((image * height + y) * width + x + i) * self.request.output_shape[-1]
            self.epilogue.finish(load(sums[i], 0, lanes), place + self.request.output_offset + channel)

    def _accumulate(
        self,
        run: TileRun,
        sums: Sequence[Buffer],
        image: Expression,
        y: Expression,
        x: Expression,
        vector: Expression,
        channel: Expression,
    ) -> None:
        geometry, lanes = self.geometry, self.geometry.lanes
        window, (_, height, width, _) = self.conv.window, self.conv.input_shape
        place = input_place(self.request, 0)
        channels = place.channels
        rows, columns = window_axes(self.conv.input_shape, window)
        on_map = rows.steps(y)
        begin, end = on_map if self.skips_padding else (0, rows.kernel)
        zero = float_like(0.0, load(sums[0], 0, lanes))
        with T.serial(begin, end) as ky:
            input_row = T.bind(image * height + rows.base(y) + ky * rows.dilation)
            first = T.bind((input_row * width + columns.base(x)) * channels + (channel + place.offset))
            weight = T.bind(vector * geometry.weight_elements + ky * (columns.kernel * lanes))

            def stored(column: int) -> Expression:
                return widen(load(self.source, first + column * channels, lanes), self.request.inputs[0])

            if self.skips_padding or not (window.padding[0] or window.padding[2]):
                self._row(run, sums, weight, stored)
            else:
                with T.If(T.And(ky >= on_map[0], ky < on_map[1])):
                    with T.Then():
                        self._row(run, sums, weight, stored)
                    with T.Else():
                        self._row(run, sums, weight, lambda _: zero)

    def _row(
        self, run: TileRun, sums: Sequence[Buffer], weight: Expression, operand: Callable[[int], Expression]
    ) -> None:
        """Adds the products of a kernel row; ``operand`` gives the input at a column, from the first of the tile."""
        lanes, dot = self.geometry.lanes, self.geometry.dot
        window, pixels = self.conv.window, range(run.pixels)
        kernel, stride, dilation = window.kernel[1], window.strides[1], window.dilation[1]
        weights = [T.bind(load(self.weights, weight + kx * lanes, lanes)) for kx in range(kernel)]
        users: dict[int, list[tuple[int, int]]] = {}
        for kx in range(kernel):
            for i in pixels:
                users.setdefault(i * stride + kx * dilation, []).append((i, kx))
        for column in sorted(users):
            i, kx = users[column][0]
            if run.columns is None or run.columns[kx][0] <= i < run.columns[kx][1]:
                value = T.bind(operand(column))
            elif self.skips_padding:
                continue
            else:
                value = float_like(0.0, load(sums[0], 0, lanes))
            for i, kx in users[column]:
                store(sums[i], 0, dot.accumulate(load(sums[i], 0, lanes), [value], [weights[kx]]), lanes)
