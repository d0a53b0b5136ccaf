"""Exact 3×3 convolution of codes with 16 products where 36 are taken otherwise, for 2×2 outputs and each pair of channels.

Winograd's F(2×2, 3×3) in integers: Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, where G is multiplied by 2 on both sides. The codes d of a
tile of 4×4 pixels become 16 numbers of 12 bits with their sign, and so do the weights g; sums of their products fit int32, and
Y is four times the convolution, which an arithmetic shift divides exactly. Integer sums have one value whatever the order, so
these are the sums of the contract. Weights are kept as they are, 9 bytes where the transformed ones take 32, and transformed
when some channels' turn comes: fetching more from the farther caches takes longer.
Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, equations 8 to 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import integer_array_types, pack_integer
from tvm_hquant.kernels.convolution.activation_copy import ActivationCopy
from tvm_hquant.kernels.convolution.steps import register
from tvm_hquant.kernels.convolution.winograd_geometry import INPUTS, OUTPUTS, POSITIONS, TAPS, VECTORS, WinogradGeometry
from tvm_hquant.kernels.dot_product import repeated_word
from tvm_hquant.kernels.epilogues.epilogue import scale_accumulator
from tvm_hquant.kernels.epilogues.packed_epilogue import PackedEpilogue
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants, Placement
from tvm_hquant.kernels.kernel_function import Buffer, input_place, kernel_function
from tvm_hquant.kernels.primitives import Expression, convert, int_like
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import flat, load, store, thread_count
from tvm_hquant.kernels.work import work
from tvm_hquant.kernels.x86.byte_vectors import ByteVectors
from tvm_hquant.operators import Conv2D, Window

_DIRECT_PRODUCTS = 36
"""What they take the place of."""
_MOST_CHANNELS = 2**31 // (2 * 4 * 255 * 127 * 9)
"""Of so many input channels, sums of two of the numbers that become an output stay within int32: each of them is at most four
times the largest sum."""
_LANES = 16
"""Channels of a vector of int16."""


def can_transform(request: KernelRequest, lanes: int) -> bool:
    """Whether a layer can be computed like this, exactly, on vectors of so many 32-bit lanes."""
    conv = request.operator
    if not isinstance(conv, Conv2D) or request.shuffled:
        return False
    has_bytes = {*request.inputs, request.output} == {"uint8"}
    is_plain = has_bytes and request.weights == "int8" and request.weight_points == 1 and conv.groups == 1
    return (
        is_plain
        and conv.window == Window((3, 3), (1, 1), conv.window.padding, (1, 1))
        and min(conv.output_shape[1:3]) >= OUTPUTS
        and conv.in_channels % _LANES == 0
        and conv.in_channels <= _MOST_CHANNELS
        and conv.out_channels % (VECTORS * lanes) == 0
    )


def saved_products(conv: Conv2D, lanes: int, processor: Processor = ASSUMED_PROCESSOR) -> float:
    """How many times fewer products are taken: at most 2.25, less where the last tiles or blocks of them overlap others, and
    less by what transforming the weights takes for each block."""
    outputs = conv.input_shape[0] * prod(conv.output_shape[1:3])
    tiles = WinogradGeometry(conv, lanes, processor).work
    return outputs / OUTPUTS**2 * _DIRECT_PRODUCTS / (tiles * POSITIONS)


def winograd_kernel(
    request: KernelRequest, vectors: ByteVectors, family: str, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel:
    """The kernel of a layer that :func:`can_transform`."""
    assert isinstance(request.operator, Conv2D)
    geometry = WinogradGeometry(request.operator, vectors.words, processor)
    types = integer_array_types(geometry.weight_elements, "int8", geometry.conv.out_channels, 1, 1, "int32")

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        return pack_integer(constants, geometry, 0, "int32")

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        _Emitter(request, geometry, vectors, inputs, arrays, output).emit()

    name = f"{family}.conv2d[winograd {vectors.product} {geometry.block_rows}x{geometry.tiles[1]} tiles]"
    return Kernel(request, name, kernel_function(request, types, emit), pack)


class _Emitter:
    def __init__(
        self,
        request: KernelRequest,
        geometry: WinogradGeometry,
        vectors: ByteVectors,
        inputs: Sequence[Buffer],
        arrays: Sequence[Buffer],
        output: Buffer,
    ) -> None:
        self.request, self.geometry, self.vectors = request, geometry, vectors
        self.activations, *residual = [flat(buffer) for buffer in inputs]
        self.source: Buffer = self.activations
        self.first_row: Expression = 0
        """The first row of all images that is in ``source``."""
        self.place = input_place(request, 0)
        """Of the channels in ``source``."""
        self.weights, self.starts, self.multipliers, self.offsets, limits, self.zero_points = arrays
        self.epilogue = PackedEpilogue(
            vectors, residual[0] if residual else None, limits, self.zero_points, flat(output), request.ending
        )

    def emit(self) -> None:
        """Writes all loops.

        Threads that share channels each transform all tiles, into memory of their own: to exchange them would take longer.
        """
        geometry, channel_blocks = self.geometry, self.geometry.channel_blocks
        has_work = geometry.processor.shares(work(self.request, geometry.instructions))
        if geometry.shares_tiles or channel_blocks == 1 or not has_work:
            is_shared = has_work and geometry.shares_tiles and geometry.blocks > 1
            with (T.parallel if is_shared else T.serial)(geometry.blocks) as number:
                self._block(number, 0, channel_blocks)
            return
        threads = T.bind(T.min(thread_count(), channel_blocks))
        with T.parallel(threads) as thread:
            first, end = (T.bind(number * channel_blocks // threads) for number in (thread, thread + 1))
            with T.serial(geometry.blocks) as number:
                self._block(number, first, end)

    def _block(self, number: Expression, first_channels: Expression, end_channels: Expression) -> None:
        """Transforms the tiles of a block, and multiplies them for some blocks of channels."""
        geometry, conv = self.geometry, self.geometry.conv
        per_image = geometry.blocks // conv.input_shape[0]
        transformed = T.alloc_buffer((POSITIONS * geometry.source_stride,), "int16")
        image = T.bind(number // per_image)
        first = T.bind(T.min(number % per_image * geometry.block_rows, geometry.tiles[0] - geometry.block_rows))
        if any(conv.window.padding):
            self._pad(image, first)
        with T.serial(geometry.block_rows) as row, T.serial(geometry.tiles[1]) as column:
            self._transform(transformed, image, first, row, column)
        with T.serial(first_channels, end_channels) as block:
            weights = T.alloc_buffer((POSITIONS * geometry.weight_stride,), "int16")
            self._transform_weights(weights, block)
            sums = T.alloc_buffer((POSITIONS * geometry.sums_stride,), "int32")
            with T.serial(POSITIONS) as position:
                self._multiply(transformed, weights, sums, position)
            with T.serial(geometry.block_rows) as row, T.serial(geometry.tiles[1]) as column:
                self._finish(sums, image, first, row, column, block)

    def _pad(self, image: Expression, first: Expression) -> None:
        """Copies the rows that a block of tiles reads, with padding around them."""
        geometry, conv = self.geometry, self.geometry.conv
        (height, width), rows = geometry.padded_size, geometry.block_inputs
        self.source = T.alloc_buffer((rows * width * conv.in_channels,), "uint8")
        self.first_row = T.bind(image * height + T.min(OUTPUTS * first, height - rows))
        fill = T.Cast("uint8", self.zero_points[2])
        copy = ActivationCopy(
            conv,
            conv.in_channels,
            "uint8",
            "uint8",
            self.activations,
            self.source,
            (fill,),
            0,
            replace(geometry.processor, cores=1),
            self.place.offset,
            self.place.channels,
            plane_rows=rows,
        )
        copy.emit_rows(image, self.first_row - image * height, rows)

    def _pixel(self, first: Expression, row: Expression, column: Expression) -> tuple[Expression, Expression]:
        """Row and column of a tile's first output."""
        _, height, width, _ = self.geometry.conv.output_shape
        y, x = OUTPUTS * (first + row), OUTPUTS * column
        return (
            T.bind(T.min(y, height - OUTPUTS) if height % OUTPUTS else y),
            T.bind(T.min(x, width - OUTPUTS) if width % OUTPUTS else x),
        )

    def _transform(
        self, transformed: Buffer, image: Expression, first: Expression, row: Expression, column: Expression
    ) -> None:
        """Bᵀ d B of the codes of a tile."""
        geometry, channels = self.geometry, self.geometry.conv.in_channels
        height, width = geometry.padded_size
        y, x = self._pixel(first, row, column)
        place = Placement(0, channels) if any(geometry.conv.window.padding) else self.place
        pixel = place.channels
        start = T.bind(((image * height + y - self.first_row) * width + x) * pixel + place.offset)
        tile = T.bind((row * geometry.tiles[1] + column) * channels)
        with T.serial(channels // _LANES) as vector:
            at = T.bind(vector * _LANES)
            columns = []
            for j in range(INPUTS):
                places = [start + ((i * width + j) * pixel + at) for i in range(INPUTS)]
                columns.append(_differences([convert(load(self.source, place, _LANES), "int16") for place in places]))
            for i in range(INPUTS):
                for j, value in enumerate(_differences([column[i] for column in columns])):
                    place = (INPUTS * i + j) * geometry.source_stride + tile + at
                    store(transformed, place, value, _LANES)

    def _transform_weights(self, transformed: Buffer, block: Expression) -> None:
        """G g Gᵀ, times 4, of the weights of a block of channels."""
        geometry, count = self.geometry, 2 * self.geometry.lanes
        vectors = geometry.conv.in_channels // 2 * VECTORS
        first = T.bind(block * vectors)
        with T.serial(vectors) as vector:
            start = T.bind((first + vector) * (TAPS**2 * count))
            window = [load(self.weights, start + tap * count, count) for tap in range(TAPS**2)]
            weights = [convert(value, "int16") for value in window]
            columns = [_interpolated(weights[column::TAPS]) for column in range(TAPS)]
            for i in range(INPUTS):
                for j, value in enumerate(_interpolated([column[i] for column in columns])):
                    place = (INPUTS * i + j) * geometry.weight_stride + vector * count
                    store(transformed, place, value, count)

    def _multiply(self, transformed: Buffer, weights: Buffer, sums: Buffer, position: Expression) -> None:
        """Sums over the input channels of the products at one position, of all tiles and the channels of a block."""
        geometry, lanes = self.geometry, self.geometry.lanes
        channels, count = geometry.conv.in_channels, 2 * self.geometry.lanes
        source = T.bind(position * geometry.source_stride)
        weight = T.bind(position * geometry.weight_stride)
        for run in geometry.runs:
            with T.serial(run.count) as number:
                tile = run.start + number * run.pixels
                is_exact = run.start + run.count * run.pixels <= geometry.block_tiles
                tile = T.bind(tile if is_exact else T.min(tile, geometry.block_tiles - run.pixels))
                totals = {(i, j): register("int32", lanes) for i in range(run.pixels) for j in range(VECTORS)}
                for total in totals.values():
                    store(total, 0, T.broadcast(T.int32(0), lanes), lanes)
                with T.serial(channels // 2) as pair:
                    at = T.bind(source + tile * channels + 2 * pair)
                    codes = T.bind(weight + pair * (VECTORS * count))
                    of_vectors = [T.bind(load(weights, codes + j * count, count)) for j in range(VECTORS)]
                    for i in range(run.pixels):
                        operand = T.bind(repeated_word(transformed, at + i * channels, "int16", lanes))
                        for j in range(VECTORS):
                            value = self.vectors.multiply(load(totals[i, j], 0, lanes), operand, of_vectors[j])
                            store(totals[i, j], 0, value, lanes)
                for (i, j), total in totals.items():
                    place = position * geometry.sums_stride + (tile + i) * geometry.block_channels + j * lanes
                    store(sums, place, load(total, 0, lanes), lanes)

    def _finish(
        self,
        sums: Buffer,
        image: Expression,
        first: Expression,
        row: Expression,
        column: Expression,
        block: Expression,
    ) -> None:
        """Aᵀ M A of a tile for the channels of a block, over 4, and the epilogue."""
        geometry, lanes = self.geometry, self.geometry.lanes
        _, height, width, _ = geometry.conv.output_shape
        y, x = self._pixel(first, row, column)
        tile = T.bind((row * geometry.tiles[1] + column) * geometry.block_channels)
        channel = T.bind(block * geometry.block_channels)
        values: dict[tuple[int, int, int], Expression] = {}
        for j in range(VECTORS):
            of_position = [
                T.bind(load(sums, p * geometry.sums_stride + tile + j * lanes, lanes)) for p in range(POSITIONS)
            ]
            columns = [_sums(of_position[k::INPUTS]) for k in range(INPUTS)]
            constants = [load(a, channel + j * lanes, lanes) for a in (self.starts, self.multipliers, self.offsets)]
            start, multiplier, offset = map(T.bind, constants)
            for r in range(OUTPUTS):
                for c, four_times in enumerate(_sums([found[r] for found in columns])):
                    total = (four_times >> int_like(2, four_times)) + start
                    values[r, c, j] = T.bind(scale_accumulator(total, multiplier, offset))
        outputs = self.request.output_shape[-1]
        for r in range(OUTPUTS):
            place = T.bind(((image * height + y + r) * width + x) * outputs + self.request.output_offset + channel)
            self.epilogue.finish(
                [[values[r, c, j] for j in range(VECTORS)] for c in range(OUTPUTS)],
                [place + c * outputs for c in range(OUTPUTS)],
            )


def _interpolated(g: Sequence[Any]) -> list[Any]:
    """2 G g."""
    ends = T.bind(g[0] + g[2])
    return [T.bind(value) for value in (g[0] + g[0], ends + g[1], ends - g[1], g[2] + g[2])]


def _differences(d: Sequence[Any]) -> list[Any]:
    """Bᵀ d."""
    return [T.bind(value) for value in (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])]


def _sums(m: Sequence[Any]) -> list[Any]:
    """Aᵀ m."""
    return [T.bind(m[0] + m[1] + m[2]), T.bind(m[1] - m[2] - m[3])]
