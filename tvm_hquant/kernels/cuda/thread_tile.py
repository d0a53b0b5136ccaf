"""Tiles of CUDA's threads: some pixels times some output channels, in the registers of one thread.

For every kernel position and every word of input channels a thread loads a word of activations for each pixel and a word of
weights for each channel, and multiplies all with all. So a sum is one accumulator, whose products come in the order of kernel
rows, kernel columns and channels. Neighbouring threads have neighbouring channels: a warp reads few words of activations and a
row of weights, which lie side by side; in a depthwise layer it reads rows of both. Nothing passes between threads, so there is
neither shared memory nor a barrier; the first-level cache holds what threads have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.cuda.activations import Activations
from tvm_hquant.kernels.cuda.convolution import Cell, Tile, TileGeometry, TileSum, register
from tvm_hquant.kernels.interface import Array
from tvm_hquant.kernels.primitives import Expression

_THREADS = 128
"""Threads of a block: four warps, which hide each other's loads."""
_PIXELS = 4
_CHANNELS = 8
"""The largest tile: 32 sums, 4 words of activations, 8 of weights."""


@dataclass(frozen=True)
class ThreadGeometry(TileGeometry):
    """A convolution cut into the tiles of threads."""

    @property
    def channels(self) -> int:
        """Output channels of a tile."""
        return min(_CHANNELS, self.group_outputs)

    @property
    def pixels(self) -> int:
        """Pixels of a tile."""
        return min(_PIXELS, self.positions)

    @property
    def tiles(self) -> int:
        """Tiles over all output channels."""
        return self.conv.groups * self.blocks

    @property
    def threads(self) -> int:
        """Threads that have a tile."""
        return -(-self.positions // self.pixels) * self.tiles

    @property
    def row_elements(self) -> int:
        """Weights of a word of input channels, for all output channels."""
        return self.tiles * self.channels * self.word

    @property
    def weight_elements(self) -> int:
        kh, kw = self.conv.window.kernel
        return kh * kw * self.words * self.row_elements

    def pack_weights(self, weights: Array) -> Array:
        """[points, out, in / groups, kh, kw] as point, kernel row, kernel column, word, tile, channel, element; flat."""
        points, _, inputs, height, width = weights.shape
        pads = ((0, 0), (0, 0), (0, self.words * self.word - inputs), (0, 0), (0, 0))
        rows = np.pad(weights, pads)[:, self.channel_rows]
        split = rows.reshape(points, -1, self.channels, self.words, self.word, height, width)
        return np.ascontiguousarray(split.transpose(0, 5, 6, 3, 1, 2, 4).reshape(-1))


@dataclass(frozen=True)
class ThreadTiles:
    """Writes the threads of a kernel.

    Attributes:
        geometry: how the convolution is cut.
        activations: how operands are read.
        load_weight: the operand of the weights at an index of the packed weights.
        multiply_add: the sum with one more product, of activation, weight and sum.
    """

    geometry: ThreadGeometry
    activations: Activations
    load_weight: Callable[[Expression], Expression]
    multiply_add: Callable[[Expression, Expression, Expression], Expression]

    def launch(self, body: Callable[[Tile], None]) -> None:
        """Binds blocks and threads, and calls ``body`` with the tile of a thread."""
        geometry = self.geometry
        size = min(_THREADS, geometry.threads)
        grid = -(-geometry.threads // size)
        blocks, lanes = T.thread_binding(0, grid, thread="blockIdx.x"), T.thread_binding(0, size, thread="threadIdx.x")
        with blocks as block, lanes as lane:
            number = block * size + lane
            if geometry.threads % size == 0:
                body(self._tile(number))
                return
            with T.If(number < geometry.threads), T.Then():
                body(self._tile(number))

    def _tile(self, number: Expression) -> Tile:
        geometry = self.geometry
        tile = T.bind(number % geometry.tiles)
        # Positions beyond the last one repeat it: they store the same value once more.
        positions = [
            T.bind(T.min(number // geometry.tiles * geometry.pixels + i, geometry.positions - 1))
            for i in range(geometry.pixels)
        ]
        block = tile % geometry.blocks * geometry.channels
        start = T.bind(T.min(block, geometry.group_outputs - geometry.channels))
        return _ThreadTile(self, tile, T.bind(tile // geometry.blocks), positions, start)


@dataclass(frozen=True)
class _ThreadTile:
    """The tile of a thread: its number among the tiles of channels, its pixels, and its first channel within the group."""

    written: ThreadTiles
    number: Expression
    group: Expression
    positions: Sequence[Expression]
    start: Expression

    @property
    def sums(self) -> Sequence[TileSum]:
        """Pixel by pixel."""
        channels = self.written.geometry.channels
        return [
            TileSum(position, self.number * channels + j, self.start + j)
            for position in self.positions
            for j in range(channels)
        ]

    def registers(self, dtype: str) -> Sequence[Cell]:
        return [register(dtype) for _ in self.sums]

    def accumulate(self, totals: Sequence[Cell], point: int, plane: int) -> None:
        geometry, source = self.written.geometry, self.written.activations
        kh, kw = geometry.conv.window.kernel
        padding = T.bind(source.padding(plane))
        base = T.bind(self.number * (geometry.channels * geometry.word) + point * geometry.weight_elements)
        operands = [register(source.dtype) for _ in self.positions]
        with T.serial(kh) as ky, T.serial(kw) as kx, T.serial(geometry.words) as word:
            for position, operand in zip(self.positions, operands, strict=True):
                operand.store(source.read(position, (ky, kx), (self.group, word), plane, padding))
            at = base + ((ky * kw + kx) * geometry.words + word) * geometry.row_elements
            for j in range(geometry.channels):
                weight = register(source.dtype)
                weight.store(self.written.load_weight(at + j * geometry.word))
                for i, operand in enumerate(operands):
                    total = totals[i * geometry.channels + j]
                    total.store(self.written.multiply_add(operand.value, weight.value, total.value))
