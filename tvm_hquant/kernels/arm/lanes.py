"""Depthwise convolution from uint8 to uint8 codes on plain NEON: every lane is a channel, sixteen of them to a register.

``smull`` and ``smlal`` multiply codes less 128 by weights and add two products in int16, ``saddw`` adds these sums to int32;
where the weights prove that the products of more columns fit int16 together, they are widened less often. Activations are
read where they are, and padding is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import OFFSETS, STARTS, WindowPart, integer_array_types, pack_integer
from tvm_hquant.kernels.arm.codes import BIAS_BITS, MOST_PRODUCTS, ArmClamp, unbiased
from tvm_hquant.kernels.arm.operands import LANES
from tvm_hquant.kernels.convolution.row_tiles import TileRun, cut_row, split_at_borders
from tvm_hquant.kernels.convolution.tile_costs import of_depthwise
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, input_place, kernel_function
from tvm_hquant.kernels.primitives import STACK, Expression, LlvmPrimitives, broadcast, convert
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import flat, load, store
from tvm_hquant.kernels.window_axis import WindowAxis, window_axes
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Conv2D

_CHANNELS = 16
_PRODUCTS = 8
"""Of an instruction."""
_PIXELS = 3
"""Output columns of a tile: four registers of sums each."""
_TILE = 4
"""What a tile costs besides its pixels, in pixels."""
_OFFSET = -128
_ALWAYS_FIT = 2
"""Products whose sum is always within int16."""


def lanes_depthwise_kernel(
    request: KernelRequest, family: str, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel | None:
    """The kernel of a depthwise convolution of 8-bit codes.

    None for other storages, a residual, few channels and very large windows.
    """
    conv = request.operator
    assert isinstance(conv, Conv2D)
    is_plain = request.inputs == ("uint8",) and request.output == "uint8" and request.weight_points == 1
    elements = conv.window.kernel[0] * conv.window.kernel[1]
    if not (is_plain and request.weights == "int8" and conv.in_channels >= _CHANNELS and elements <= MOST_PRODUCTS):
        return None
    chain = min(request.centred_products, max(conv.window.kernel[1], _ALWAYS_FIT))
    geometry = LanesGeometry(conv, chain)
    is_shared = processor.shares(work(request, of_depthwise(conv, _PRODUCTS)))
    count, lanes = geometry.blocks * elements * _CHANNELS, len(geometry.channel_rows)
    types = integer_array_types(count, "int8", lanes, 1, 1, "int32", len(geometry.window_parts))
    types[OFFSETS] = ((_PIXELS * lanes,), "float32")

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        arrays = list(pack_integer(constants, geometry, _OFFSET, "int32", geometry.window_parts))
        arrays[STARTS] = arrays[STARTS] + np.int32(BIAS_BITS)
        # Multiply-adds add to one of their operands: loading it for every pixel is cheaper than copying a register.
        arrays[OFFSETS] = np.tile(arrays[OFFSETS], _PIXELS)
        return tuple(arrays)

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        _Emitter(request, geometry, is_shared, flat(inputs[0]), arrays, flat(output)).emit()

    name = f"{family}.depthwise_conv2d[smlal {_PIXELS}x{_CHANNELS}{f' chain {chain}' if chain > 2 else ''}]"
    return Kernel(request, name, kernel_function(request, types, emit), pack)


@dataclass(frozen=True)
class LanesGeometry:
    """A depthwise convolution in blocks of sixteen channels; the last block overlaps the one before it.

    ``chain`` columns of the window are summed in int16.
    """

    conv: Conv2D
    chain: int
    planes: int = 1
    points: int = 1

    @property
    def blocks(self) -> int:
        return -(-self.conv.in_channels // _CHANNELS)

    @cached_property
    def axes(self) -> tuple[WindowAxis, WindowAxis]:
        return window_axes(self.conv.input_shape, self.conv.window)

    @cached_property
    def runs(self) -> tuple[TileRun, ...]:
        """The tiles of an output row."""
        columns = self.axes[1]
        return split_at_borders(cut_row(columns.output_size, _PIXELS, lambda pixels: pixels + _TILE), columns)

    @property
    def window_parts(self) -> tuple[WindowPart, ...]:
        """The parts of the window that are on the map somewhere: for each section of rows those of all sections of columns."""
        rows, columns = ([slice(s.begin, s.end) for s in axis.sections] for axis in self.axes)
        return tuple((row, column) for row in rows for column in columns)

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Channel of every packed lane."""
        starts = [min(block * _CHANNELS, self.conv.in_channels - _CHANNELS) for block in range(self.blocks)]
        return np.concatenate([start + np.arange(_CHANNELS) for start in starts])

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., channels] in the order of the lanes."""
        return np.ascontiguousarray(values[..., self.channel_rows])

    def pack_weights(self, weights: Array) -> Array:
        """[1, channels, 1, kh, kw] as block, kernel row, kernel column, lane; flat."""
        height, width = weights.shape[3:]
        codes = weights[0, self.channel_rows, 0].reshape(self.blocks, _CHANNELS, height, width)
        return np.ascontiguousarray(codes.transpose(0, 2, 3, 1).reshape(-1).astype(np.int8))


@dataclass(frozen=True)
class _Emitter:
    request: KernelRequest
    geometry: LanesGeometry
    is_shared: bool
    source: Buffer
    arrays: Sequence[Buffer]
    output: Buffer

    @property
    def conv(self) -> Conv2D:
        return self.geometry.conv

    def emit(self) -> None:
        geometry = self.geometry
        height = geometry.axes[0].output_size
        rows = self.conv.input_shape[0] * height
        loop = T.parallel if self.is_shared and rows > 1 else T.serial
        with loop(rows) as row:
            image, y = T.bind(row // height), T.bind(row % height)
            begin, end = geometry.axes[0].steps(y)
            if not any(self.conv.window.padding[::2]):
                self._row(image, y)
                return
            with T.If(T.And(begin <= 0, end >= self.conv.window.kernel[0])):
                with T.Then():
                    self._row(image, y)
                with T.Else():
                    self._row(image, y, (begin, end))

    def _row(self, image: Expression, y: Expression, on_map: tuple[Expression, Expression] | None = None) -> None:
        """A row of the output; ``on_map`` says which kernel rows it takes if these are not all."""
        geometry, channels, width = self.geometry, self.conv.in_channels, self.geometry.axes[1].output_size
        with T.serial(geometry.blocks) as block:
            channel = T.bind(T.min(block * _CHANNELS, channels - _CHANNELS))
            for run in geometry.runs:
                with ExitStack() as loops:
                    number = loops.enter_context(T.serial(run.count)) if run.count > 1 else 0
                    x = number * run.pixels + run.start
                    x = T.bind(x if run.start + run.count * run.pixels <= width else T.min(x, width - run.pixels))
                    self._tile(run, image, y, x, block, channel, on_map)

    def _tile(
        self,
        run: TileRun,
        image: Expression,
        y: Expression,
        x: Expression,
        block: Expression,
        channel: Expression,
        on_map: tuple[Expression, Expression] | None,
    ) -> None:
        geometry, p = self.geometry, LlvmPrimitives()
        _, starts, multipliers, offsets, limits, zero_points = self.arrays
        rows, columns = geometry.axes
        sums = {i: T.alloc_buffer((_CHANNELS,), "int32", scope=STACK) for i in range(run.pixels)}
        lanes = len(geometry.channel_rows)
        first = T.bind(rows.section(y) * (len(columns.sections) * lanes) + block * _CHANNELS)
        for i, section in enumerate(columns.sections_from(run.start, run.pixels)):
            store(sums[i], 0, load(starts, first + section * lanes, _CHANNELS), _CHANNELS)
        top = T.bind(image * rows.size + rows.base(y))
        if on_map is None:
            self._add_rows(run, sums, [(ky, top + ky * rows.dilation) for ky in range(rows.kernel)], x, block, channel)
        else:
            with T.serial(*on_map) as ky:
                self._add_rows(run, sums, [(ky, top + ky * rows.dilation)], x, block, channel)
        clamp = ArmClamp(limits, zero_points, self.request.ending)
        for i in range(run.pixels):
            parts = []
            for part in range(_CHANNELS // LANES):
                at = block * _CHANNELS + part * LANES
                multiplier, offset = load(multipliers, at, LANES), load(offsets, i * lanes + at, LANES)
                value = unbiased(load(sums[i], part * LANES, LANES))
                parts.append(clamp.rounded(p.fma(value, multiplier, offset)))
            codes = clamp.codes(clamp.half(parts[0], parts[1]), clamp.half(parts[2], parts[3]))
            pixel = (image * rows.output_size + y) * columns.output_size + x + i
            place = pixel * self.request.output_shape[-1] + self.request.output_offset + channel
            store(self.output, place, codes, _CHANNELS)

    def _add_rows(
        self,
        run: TileRun,
        sums: Mapping[int, Buffer],
        kernel_rows: Sequence[tuple[Expression, Expression]],
        x: Expression,
        block: Expression,
        channel: Expression,
    ) -> None:
        """Adds the products of kernel rows, each given with its row of the activations."""
        place, (rows, columns) = input_place(self.request, 0), self.geometry.axes
        channels = place.channels
        weights: dict[tuple[int, int], Expression] = {}
        starts = []
        for number, (ky, input_row) in enumerate(kernel_rows):
            first = (input_row * columns.size + columns.base(x)) * channels
            starts.append(T.bind(first + (channel + place.offset)))
            at = T.bind((block * rows.kernel + ky) * (columns.kernel * _CHANNELS))
            for kx in range(columns.kernel):
                codes = load(self.arrays[0], at + kx * _CHANNELS, _CHANNELS)
                weights[number, kx] = T.bind(convert(codes, "int16"))
        operands: dict[tuple[int, int], Expression] = {}
        for i, total in sums.items():
            for chain in self._chains(run, i, len(kernel_rows)):
                products = []
                for number, kx in chain:
                    column = i * columns.stride + kx * columns.dilation
                    if (number, column) not in operands:
                        operands[number, column] = self._operand(starts[number] + column * channels)
                    products.append(operands[number, column] * weights[number, kx])
                widened = convert(sum(products[1:], products[0]), "int32")
                store(total, 0, load(total, 0, _CHANNELS) + widened, _CHANNELS)

    def _chains(self, run: TileRun, pixel: int, kernel_rows: int) -> list[list[tuple[int, int]]]:
        """Products that are summed in int16 for a pixel of a tile, by kernel row and column: those that lie on the map.

        Any two fit; what more of them do was proven for columns of a row.
        """
        size, width = self.geometry.chain, self.conv.window.kernel[1]
        on_map = [kx for kx in range(width) if run.columns is None or run.columns[kx][0] <= pixel < run.columns[kx][1]]
        if size <= _ALWAYS_FIT:
            taps = [(row, kx) for row in range(kernel_rows) for kx in on_map]
            return [taps[first : first + _ALWAYS_FIT] for first in range(0, len(taps), _ALWAYS_FIT)]
        parts = [[kx for kx in on_map if kx // size == part] for part in range(-(-width // size))]
        return [[(row, kx) for kx in part] for row in range(kernel_rows) for part in parts if part]

    def _operand(self, index: Expression) -> Expression:
        """int16 codes less 128."""
        codes = load(self.source, index, _CHANNELS) ^ broadcast(T.uint8(128), _CHANNELS)
        return T.bind(convert(T.reinterpret(f"int8x{_CHANNELS}", codes), "int16"))
