"""Depthwise convolution from uint8 to uint8 codes: rows interleaved by unpacks, sums put back in order by packs.

As in :mod:`.depthwise.template`, four input rows become words of four codes, one word a channel, and words that have codes to
spare serve several output rows. Here a block of channels is a whole vector of bytes, so that reading rows and writing codes
take no conversion between bytes and words but the interleaving itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import OFFSETS, STARTS, integer_array_types, pack_integer
from tvm_hquant.kernels.convolution.tile_costs import of_depthwise
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, input_place, kernel_function
from tvm_hquant.kernels.primitives import Expression, LlvmPrimitives, broadcast
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import flat, load, store
from tvm_hquant.kernels.word_vectors import GROUPS, WordVectors, fitting_vectors
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Conv2D

_WORD_ROWS = 4
"""Rows of a word."""
_ROW_ORDER = (0, 2, 1, 3)
"""Which of four rows each code of a word is from, as ``saturation_free_pairs`` has the pairs."""
_MOST_PRODUCTS = 96
"""Products of one group of channels that are written out for a tile."""


def interleaved_depthwise_kernel(
    request: KernelRequest,
    candidates: Sequence[WordVectors],
    family: str,
    processor: Processor = ASSUMED_PROCESSOR,
) -> Kernel | None:
    """The kernel of a depthwise convolution of 8-bit codes; None for other storages, a residual, or too few channels.

    ``candidates`` are the vectors that the instruction set has, of different widths.
    """
    conv = request.operator
    assert isinstance(conv, Conv2D)
    window_elements = conv.window.kernel[0] * conv.window.kernel[1]
    vectors = fitting_vectors([v for v in candidates if window_elements <= v.most_products], conv.in_channels)
    is_plain = request.inputs == ("uint8",) and request.output == "uint8" and request.weight_points == 1
    if not is_plain or request.weights != "int8" or vectors is None:
        return None
    geometry = InterleavedGeometry(conv, vectors)
    dtype = vectors.weight_dtype
    lanes, copies = len(geometry.channel_rows), geometry.offset_copies
    types = integer_array_types(geometry.weight_elements, dtype, lanes, 1, 1, "int32")
    types[OFFSETS] = ((copies * lanes,), "float32")

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        arrays = list(pack_integer(constants, geometry, vectors.operand_offset, "int32"))
        arrays[STARTS] = arrays[STARTS] + np.int32(vectors.start_offset)
        arrays[OFFSETS] = np.tile(arrays[OFFSETS], copies)
        return tuple(arrays)

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        _Emitter(request, geometry, processor, inputs[0], arrays, output).emit()

    chain = f" chain {conv.window.kernel[1]}" if _adds_columns(request, geometry) else ""
    name = (
        f"{family}.depthwise_conv2d[{vectors.product} {geometry.group_rows}x{geometry.pixels}x{vectors.width}{chain}]"
    )
    return Kernel(request, name, kernel_function(request, types, emit), pack)


def _adds_columns(request: KernelRequest, geometry: InterleavedGeometry) -> bool:
    """Whether the products of all columns of the window fit int16 together."""
    width = geometry.conv.window.kernel[1]
    return geometry.vectors.product == "vpmaddubsw" and request.saturation_free_pairs >= width > 1


@dataclass(frozen=True)
class InterleavedGeometry:
    """A depthwise convolution in blocks of ``vectors.width`` channels; the last block overlaps the one before it."""

    conv: Conv2D
    vectors: WordVectors
    planes: int = 1
    points: int = 1

    @property
    def blocks(self) -> int:
        return -(-self.conv.in_channels // self.vectors.width)

    @property
    def taps(self) -> int:
        """Words that make an output of one kernel column."""
        return -(-self.conv.window.kernel[0] // _WORD_ROWS)

    @property
    def output_size(self) -> tuple[int, int]:
        return self.conv.window.output_size(*self.conv.input_shape[1:3])

    @cached_property
    def group_rows(self) -> int:
        """Output rows that are made of the same words."""
        if self.conv.window.dilation[0] > 1:
            return 1
        spare = self.taps * _WORD_ROWS - self.conv.window.kernel[0]
        return min(spare // self.conv.window.strides[0] + 1, self.output_size[0])

    @property
    def groups(self) -> int:
        """Groups of output rows; the last one overlaps the one before it."""
        return -(-self.output_size[0] // self.group_rows)

    @property
    def used_rows(self) -> int:
        """Rows of the words of a group that have weights."""
        return self.conv.window.kernel[0] + (self.group_rows - 1) * self.conv.window.strides[0]

    @property
    def padded_width(self) -> int:
        _, left, _, right = self.conv.window.padding
        return self.conv.input_shape[2] + left + right

    @property
    def column_elements(self) -> int:
        """Elements of the interleaved rows of a column: tap, group, operand."""
        return self.taps * GROUPS * self.vectors.operands * self.vectors.operand_lanes

    @cached_property
    def pixels(self) -> int:
        """Output columns of a tile: as many as divide a row best."""
        width = self.output_size[1]
        products = self.group_rows * self.taps * self.conv.window.kernel[1] * self.vectors.operands
        most = max(1, min(_MOST_PRODUCTS // products, width, self.vectors.most_pixels))
        return min(range(1, most + 1), key=lambda p: (-(-width // p) * (p + 1), -p))

    @property
    def offset_copies(self) -> int:
        """How often the offsets stand in memory: once, or for each output of a tile."""
        return self.group_rows * self.pixels if self.vectors.copies_offsets else 1

    def word_row(self, tap: int, part: int) -> int:
        """The input row, from the first of the group, that is part of a word; parts without weights repeat row 0."""
        row = tap * _WORD_ROWS + _ROW_ORDER[part]
        return row * self.conv.window.dilation[0] if row < self.used_rows else 0

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Channel of every packed lane."""
        width = self.vectors.width
        starts = [min(block * width, self.conv.in_channels - width) for block in range(self.blocks)]
        return np.concatenate([start + self.vectors.channel_order.reshape(-1) for start in starts])

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., channels] in the order of the lanes."""
        return np.ascontiguousarray(values[..., self.channel_rows])

    @property
    def group_weights(self) -> int:
        """Elements of the packed weights of one group of channels of a block."""
        kernel_width = self.conv.window.kernel[1]
        return self.group_rows * self.taps * kernel_width * self.vectors.operands * self.vectors.operand_lanes

    @property
    def weight_elements(self) -> int:
        return self.blocks * GROUPS * self.group_weights

    def pack_weights(self, weights: Array) -> Array:
        """[1, channels, 1, kh, kw] as block, group, output row, tap, kernel column, operand, lane, product; flat."""
        height, width = weights.shape[3:]
        vectors, stride = self.vectors, self.conv.window.strides[0]
        codes = weights[0, self.channel_rows, 0].reshape(self.blocks, GROUPS, vectors.words, height, width)
        rows = np.zeros((self.group_rows, self.blocks, GROUPS, vectors.words, self.taps * _WORD_ROWS, width), np.int64)
        for row in range(self.group_rows):
            rows[row, ..., row * stride : row * stride + height, :] = codes
        words = rows.reshape(*rows.shape[:4], self.taps, _WORD_ROWS, width)[..., list(_ROW_ORDER), :]
        operands = vectors.operands
        split = words.reshape(*words.shape[:5], operands, _WORD_ROWS // operands, width)
        # output row, block, group, lane, tap, operand, product, kernel column
        packed = split.transpose(1, 2, 0, 4, 7, 5, 3, 6)
        return np.ascontiguousarray(packed.reshape(-1).astype(vectors.weight_dtype))


class _Emitter:
    def __init__(
        self,
        request: KernelRequest,
        geometry: InterleavedGeometry,
        processor: Processor,
        source: Buffer,
        arrays: Sequence[Buffer],
        output: Buffer,
    ) -> None:
        self.place = input_place(request, 0)
        self.output_channels, self.output_offset = request.output_shape[-1], request.output_offset
        self.geometry, self.vectors = geometry, geometry.vectors
        in_all = work(request, of_depthwise(geometry.conv, self.vectors.words, _WORD_ROWS))
        self.is_shared = processor.shares(in_all)
        self.source, self.output = flat(source), flat(output)
        self.weights, self.starts, self.multipliers, self.offsets, limits, self.zero_points = arrays
        self.adds_columns = _adds_columns(request, geometry)
        self.clamp = self.vectors.clamp(limits, self.zero_points, request.ending)

    def emit(self) -> None:
        geometry, conv = self.geometry, self.geometry.conv
        width, channels, height = self.vectors.width, conv.in_channels, geometry.output_size[0]
        items = conv.input_shape[0] * geometry.groups
        loop = T.parallel if self.is_shared and items > 1 else T.serial
        with loop(items) as item:
            words = T.alloc_buffer((geometry.padded_width * geometry.column_elements,), self.vectors.operand_dtype)
            image = T.bind(item // geometry.groups)
            row = T.bind(T.min(item % geometry.groups * geometry.group_rows, height - geometry.group_rows))
            first_row = T.bind(row * conv.window.strides[0] - conv.window.padding[0])
            self._fill_sides(words)
            with T.serial(geometry.blocks) as block:
                channel = T.bind(T.min(block * width, channels - width))
                self._interleave(words, image, first_row, channel)
                self._tiles(words, image * height + row, block, channel)

    def _fill_sides(self, words: Buffer) -> None:
        """Padding beside the rows, which every block of channels shares."""
        _, left, _, right = self.geometry.conv.window.padding
        elements, lanes = self.geometry.column_elements, self.vectors.operand_lanes
        offset = self.vectors.operand_offset
        zero_point = self.zero_points[2] + offset if offset else self.zero_points[2]
        code = broadcast(T.Cast(self.vectors.operand_dtype, zero_point), lanes)
        for first, columns in ((0, left), (self.geometry.padded_width - right, right)):
            if columns:
                with T.serial(columns * elements // lanes) as index:
                    store(words, first * elements + index * lanes, code, lanes)

    def _interleave(self, words: Buffer, image: Expression, first_row: Expression, channel: Expression) -> None:
        """The words of all columns of a group of rows; the first input row may be negative."""
        conv = self.geometry.conv
        height, top, bottom = conv.input_shape[1], conv.window.padding[0], conv.window.padding[2]
        span = (self.geometry.used_rows - 1) * conv.window.dilation[0]
        if not (top or bottom):
            self._columns(words, image, first_row, channel, is_inside=True)
            return
        with T.If(T.And(first_row >= 0, first_row + span < height)):
            with T.Then():
                self._columns(words, image, first_row, channel, is_inside=True)
            with T.Else():
                self._columns(words, image, first_row, channel, is_inside=False)

    def _columns(
        self, words: Buffer, image: Expression, first_row: Expression, channel: Expression, is_inside: bool
    ) -> None:
        geometry, vectors = self.geometry, self.vectors
        _, height, width, _ = geometry.conv.input_shape
        channels, channel = self.place.channels, channel + self.place.offset
        left, lanes = geometry.conv.window.padding[1], vectors.operand_lanes
        numbers = sorted({geometry.word_row(tap, part) for tap in range(geometry.taps) for part in range(_WORD_ROWS)})
        rows = {number: T.bind(first_row + number) for number in numbers}
        inside = {n: row if is_inside else T.bind(T.max(0, T.min(row, height - 1))) for n, row in rows.items()}
        starts = {n: T.bind((image * height + row) * (width * channels) + channel) for n, row in inside.items()}
        padding = T.bind(broadcast(T.Cast("uint8", self.zero_points[2]), vectors.width))
        with T.serial(width) as x:
            place = T.bind((left + x) * geometry.column_elements)
            codes: dict[int, Expression] = {}
            for number in numbers:
                value = load(self.source, starts[number] + x * channels, vectors.width)
                if not is_inside:
                    exists = T.And(rows[number] >= 0, rows[number] < height)
                    value = T.Select(broadcast(exists, vectors.width), value, padding)
                codes[number] = T.bind(value)
            for tap in range(geometry.taps):
                parts = [codes[geometry.word_row(tap, part)] for part in range(_WORD_ROWS)]
                operands = [operand for group in vectors.interleave(parts) for operand in group]
                for number, operand in enumerate(operands):
                    store(words, place + (tap * len(operands) + number) * lanes, operand, lanes)

    def _tiles(self, words: Buffer, output_row: Expression, block: Expression, channel: Expression) -> None:
        geometry, width = self.geometry, self.geometry.output_size[1]
        pixels = geometry.pixels
        with T.serial(-(-width // pixels)) as tile:
            x = T.bind(tile * pixels if width % pixels == 0 else T.min(tile * pixels, width - pixels))
            places = [(r, i) for i in range(pixels) for r in range(geometry.group_rows)]
            sums: dict[tuple[int, int, int], Expression] = {}
            halves: dict[tuple[int, int, int], Expression] = {}
            for group in range(GROUPS):
                for r, i in places:
                    sums[group, r, i] = self._codes(words, x, block, group, r, i)
                    if group % 2:
                        half = self.clamp.half(sums.pop((group - 1, r, i)), sums.pop((group, r, i)))
                        halves[group // 2, r, i] = half
            for r, i in places:
                codes = self.clamp.codes(halves[0, r, i], halves[1, r, i])
                pixel = (output_row + r) * width + x + i
                index = pixel * self.output_channels + self.output_offset + channel
                store(self.output, index, codes, self.vectors.width)

    def _codes(self, words: Buffer, x: Expression, block: Expression, group: int, row: int, pixel: int) -> Expression:
        """int32 codes less the zero point of the channels of a group at an output, not yet limited."""
        geometry, vectors, p = self.geometry, self.vectors, LlvmPrimitives()
        window, lanes = geometry.conv.window, vectors.operand_lanes
        constants = (block * GROUPS + group) * vectors.words
        kernel_width = window.kernel[1]
        total = load(self.starts, constants, vectors.words)
        for tap in range(geometry.taps):
            operands, weights = [], []
            for column in range(kernel_width):
                place = (x + pixel) * window.strides[1] + column * window.dilation[1]
                for operand in range(vectors.operands):
                    at = place * geometry.column_elements
                    at += ((tap * GROUPS + group) * vectors.operands + operand) * lanes
                    weight = (block * GROUPS + group) * geometry.group_weights
                    weight += (
                        ((row * geometry.taps + tap) * kernel_width + column) * vectors.operands + operand
                    ) * lanes
                    operands.append(load(words, at, lanes))
                    weights.append(load(self.weights, weight, lanes))
            if self.adds_columns:
                total = vectors.multiply_chain(total, operands, weights)
                continue
            for word, code in zip(operands, weights, strict=True):
                total = vectors.multiply(total, word, code)
        copy = (pixel * geometry.group_rows + row) * len(geometry.channel_rows) if vectors.copies_offsets else 0
        multiplier, offset = (
            load(self.multipliers, constants, vectors.words),
            load(self.offsets, constants + copy if copy else constants, vectors.words),
        )
        return self.clamp.rounded(p.fma(vectors.to_float(total), multiplier, offset))
