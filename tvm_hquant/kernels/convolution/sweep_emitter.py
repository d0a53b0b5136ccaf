"""The kernel of a convolution that goes over the map in :class:`PositionSweeps`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.convolution.position_sweeps import PositionSweeps
from tvm_hquant.kernels.convolution.steps import register, unrolled
from tvm_hquant.kernels.convolution.tile_order import UpcomingElements, elements_ahead
from tvm_hquant.kernels.epilogues.epilogue import Epilogue
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, vector_type
from tvm_hquant.kernels.processor import CACHE_LINE
from tvm_hquant.kernels.vector_loops import load, prefetch, store
from tvm_hquant.kernels.work import work

_PIXELS_AHEAD = 8
"""Pixels whose residuals and outputs are asked for while one is finished."""


@dataclass(frozen=True)
class SweepEmitter:
    """Writes the loops.

    Attributes:
        request, geometry: of the layer.
        sweeps: over its map.
        source, weights, starts: activations, packed weights and first values of the sums, flat.
        table: of the sweeps.
        epilogue: finishes the sums of a pixel.
    """

    request: KernelRequest
    geometry: AnchorGeometry
    sweeps: PositionSweeps
    source: Buffer
    weights: Buffer
    starts: Buffer
    table: Buffer
    epilogue: Epilogue

    def emit(self) -> None:
        geometry, sweeps, dot = self.geometry, self.sweeps, self.geometry.dot
        images, bands = geometry.conv.input_shape[0], sweeps.bands
        height, width = geometry.output_size
        items = geometry.blocks * images * bands
        loop = T.parallel if geometry.processor.shares(work(self.request, geometry.cost)) and items > 1 else T.serial
        with loop(items) as item:
            channel_block, image = T.bind(item // (images * bands)), T.bind(item // bands % images)
            band = T.bind(item % bands)
            top = T.bind(band * sweeps.band_rows)
            bottom = top + sweeps.band_rows
            if height % sweeps.band_rows:
                bottom = T.bind(T.min(bottom, height))
            sums = T.alloc_buffer((sweeps.band_rows * width * geometry.block,), dot.accumulator_dtype)
            vectors = range(geometry.tile.vectors)
            values = [
                T.bind(load(self.starts, channel_block * geometry.block + j * dot.lanes, dot.lanes)) for j in vectors
            ]
            with T.serial((bottom - top) * width) as pixel:
                for j in vectors:
                    store(sums, pixel * geometry.block + j * dot.lanes, values[j], dot.lanes)
            positions = prod(geometry.conv.window.kernel)
            with T.serial(positions) as position:
                self._sweep(sums, channel_block, image, band, position, positions)
            start = channel_block * geometry.block
            if geometry.group_outputs % geometry.block:
                start = T.min(start, geometry.group_outputs - geometry.block)
            channels = self.request.output_shape[-1]
            first = T.bind((image * height + top) * (width * channels) + self.request.output_offset + start)
            with T.serial((bottom - top) * width) as pixel:
                at = T.bind(first + pixel * channels)
                for buffer in self.epilogue.memory:
                    for offset in range(0, geometry.block, CACHE_LINE // np.dtype(str(buffer.dtype)).itemsize):
                        prefetch(buffer, at + (_PIXELS_AHEAD * channels + offset))
                for j in vectors:
                    value = load(sums, pixel * geometry.block + j * dot.lanes, dot.lanes)
                    self.epilogue.finish(value, at + j * dot.lanes)

    def _sweep(
        self,
        sums: Buffer,
        channel_block: Expression,
        image: Expression,
        band: Expression,
        position: Expression,
        positions: int,
    ) -> None:
        """Adds the products of a position of the kernel to the sums of a band."""
        geometry, sweeps = self.geometry, self.sweeps
        _, in_height, in_width, _ = geometry.conv.input_shape
        image_elements = in_height * in_width * geometry.pixel_elements
        entry = T.bind((band * positions + position) * (3 + len(sweeps.sizes)))
        steps = geometry.padded_inputs // geometry.dot.products
        weight = T.bind(channel_block * geometry.tile_weights + position * (steps * geometry.step_weights))
        corner = self.table[entry] + image * image_elements + geometry.first_channel
        corner = T.bind(T.Cast("int64", corner))
        place = T.bind(T.Cast("int64", self.table[entry + 1]))
        outputs = T.bind(self.table[entry + 2])
        first: Expression = T.int32(0)
        number: Expression = T.int32(0)
        for column, size in enumerate(sweeps.sizes):
            tiles = T.bind(self.table[entry + (3 + column)])
            with T.serial(tiles) as tile:
                listed = T.bind(outputs + (first + tile * size) * 2)
                # In 32 bits LLVM would add and extend indices in every step.
                offsets = [T.bind(T.Cast("int64", self.table[listed + i])) for i in range(2 * size)]
                reads = [T.bind(corner + offset) for offset in offsets[::2]]
                places = [T.bind(place + offset) for offset in offsets[1::2]]
                self._tile(sums, reads, places, weight, number + tile)
            first, number = T.bind(first + tiles * size), T.bind(number + tiles)

    def _tile(
        self,
        sums: Buffer,
        inputs: Sequence[Expression],
        outputs: Sequence[Expression],
        weight: Expression,
        number: Expression,
    ) -> None:
        geometry, dot = self.geometry, self.geometry.dot
        vectors, lanes, size = geometry.tile.vectors, dot.lanes, dot.lanes * dot.products
        weight_type = vector_type(dot.weight_dtype, size)
        steps = geometry.padded_inputs // dot.products
        places = [(i, j) for i in range(len(inputs)) for j in range(vectors)]
        accumulators = {place: register(dot.accumulator_dtype, lanes) for place in places}
        for (i, j), accumulator in accumulators.items():
            store(accumulator, 0, load(sums, outputs[i] + j * lanes, lanes), lanes)
        upcoming = None
        if dot.prefetches:
            line = CACHE_LINE // np.dtype(str(dot.weight_dtype)).itemsize
            elements, in_one = elements_ahead(geometry.step_weights, self.sweeps.fewest_tiles, line)
            ahead = weight + steps * geometry.step_weights + number * (steps // in_one) * elements
            upcoming = UpcomingElements(self.weights, T.bind(ahead), elements, in_one)

        def part(first: Expression, count: int) -> None:
            """``count`` steps from step ``first``, whose operands are loaded at once."""
            channel = T.Cast("int64", first * dot.products)
            operands: list[list[Expression]] = []
            at = T.bind(weight + first * geometry.step_weights)
            for step in range(count):
                of_vectors = [
                    T.bind(self.weights.vload([at + (step * vectors + j) * size], weight_type)) for j in range(vectors)
                ]
                for i, start in enumerate(inputs):
                    if not step:
                        operands.append([T.bind(x) for x in dot.operands(self.source, [start + channel], count)])
                    for j in range(vectors):
                        value = dot.accumulate(load(accumulators[i, j], 0, lanes), [operands[i][step]], [of_vectors[j]])
                        store(accumulators[i, j], 0, value, lanes)

        def parts(first: Expression, count: int, length: int) -> None:
            """``count`` parts of ``length`` steps from step ``first``."""
            if upcoming is not None:
                upcoming.prefetch(first, count * length)
            for number in range(count):
                part(first + number * length, length)

        full, rest = geometry.parts(steps)
        at_once = unrolled(full, max(1, dot.unrolled // dot.operand_steps))
        with T.serial(full // at_once) as body:
            parts(body * (at_once * dot.operand_steps), at_once, dot.operand_steps)
        if full % at_once:
            parts(T.int32(full // at_once * at_once * dot.operand_steps), full % at_once, dot.operand_steps)
        first = full * dot.operand_steps
        for count in rest:
            parts(T.int32(first), 1, count)
            first += count
        for (i, j), accumulator in accumulators.items():
            store(sums, outputs[i] + j * lanes, load(accumulator, 0, lanes), lanes)
