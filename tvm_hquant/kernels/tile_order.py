"""In which order the tiles of a convolution are computed, and which weights come to the cache meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_geometry import AnchorGeometry
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.processor import CACHE_LINE
from tvm_hquant.kernels.vector_loops import prefetch

_DISTANCE = 4096
"""Bytes between the weights that a step reads and those that it asks for, where these are read once."""
_TILES_PER_ITEM = 8
"""Tiles of one row that a thread takes at a time, at most."""


@dataclass(frozen=True)
class TilePlace:
    """A tile of a row of pixels and a block of channels. It is the tile of that ``number`` of a ``visit``, so many tiles that
    follow each other with the same channels."""

    row: Expression
    tile: Expression
    channel_block: Expression
    number: Expression
    visit: int


@dataclass(frozen=True)
class UpcomingWeights:
    """The weights that the next tiles read, which come to the cache bit by bit while the steps of these tiles are taken.

    Weights are read for the first time from a far cache or from memory, and these deliver less than a tile takes.

    Attributes:
        first: the first element that the tile asks for.
        elements: how many each step asks for.
        steps_in_one: steps that ask for the same, a power of two.
    """

    first: Expression
    elements: int
    steps_in_one: int

    def prefetch(self, weights: Buffer, step: Expression, count: int) -> None:
        """Asks for what ``count`` steps of the tile from ``step`` on ask for."""
        at = T.bind(self.first + step // self.steps_in_one * self.elements)
        line = CACHE_LINE // np.dtype(str(weights.dtype)).itemsize
        for offset in range(0, -(-count // self.steps_in_one) * self.elements, line):
            prefetch(weights, at + offset)


@dataclass(frozen=True)
class TileOrder:
    """The order of the tiles of a convolution, in items that threads share out among themselves."""

    geometry: AnchorGeometry

    @property
    def rows(self) -> int:
        """Rows of output pixels."""
        return self.geometry.conv.input_shape[0] * self.geometry.output_size[0]

    @property
    def channel_blocks(self) -> int:
        return self.geometry.groups * self.geometry.blocks

    @property
    def _chunks(self) -> int:
        """Items of a row, for one block of channels."""
        tiles = self.geometry.tiles
        items = self.geometry.processor.fewest_items
        most = max(1, min(_TILES_PER_ITEM, tiles * self.rows * self.channel_blocks // items))
        return -(-tiles // most)

    @property
    def items(self) -> int:
        return self.rows * self.channel_blocks * self._chunks

    @property
    def weights_stay_outside(self) -> bool:
        """Whether the loop over output channels is the outer one, so that weights are read again from the nearest caches.

        It is for weights that do not stay in the second-level cache: these are walked through once. So are all that are asked
        for beforehand, where activations, which then come again for every block of channels, stay in the last cache.
        """
        conv, dot, processor = self.geometry.conv, self.geometry.dot, self.geometry.processor
        weights = self.geometry.points * prod(conv.weight_shape) * np.dtype(dot.weight_dtype).itemsize
        activations = self.geometry.planes * prod(conv.input_shape) * np.dtype(dot.operand_dtype).itemsize
        return weights > processor.l2_bytes or (dot.prefetches and activations <= processor.last_share)

    @contextmanager
    def tile_loop(self, item: Expression) -> Iterator[TilePlace]:
        """The loop over the tiles of an item; its statements are those of the tile at a place."""
        tiles, rows, chunks = self.geometry.tiles, self.rows, self._chunks
        per_item = -(-tiles // chunks)
        if self.weights_stay_outside:
            channel_block, rest = T.bind(item // (rows * chunks)), T.bind(item % (rows * chunks))
            row, chunk = T.bind(rest // chunks), T.bind(rest % chunks)
        else:
            place, channel_block = T.bind(item // self.channel_blocks), T.bind(item % self.channel_blocks)
            row, chunk = T.bind(place // chunks), T.bind(place % chunks)

        def place_of(tile: Expression) -> TilePlace:
            if self.weights_stay_outside:
                return TilePlace(row, tile, channel_block, row * tiles + tile, rows * tiles)
            return TilePlace(row, tile, channel_block, tile - chunk * per_item, per_item)

        if per_item == 1:
            yield place_of(chunk)
            return
        first = T.bind(chunk * per_item)
        last = first + per_item if tiles % per_item == 0 else T.min(first + per_item, tiles)
        with T.serial(first, last) as tile:
            yield place_of(tile)

    def upcoming_weights(self, place: TilePlace, weights: Expression) -> UpcomingWeights | None:
        """Those of the next block of channels, for a tile whose own begin at ``weights``.

        Where a visit is one tile, that ends before they would come: steps ask for what is read a little later.
        """
        geometry = self.geometry
        item = np.dtype(geometry.dot.weight_dtype).itemsize
        if not geometry.dot.prefetches or geometry.patches is not None:
            return None
        if place.visit == 1:
            return UpcomingWeights(T.bind(weights + _DISTANCE // item), geometry.step_weights, 1)
        if self.channel_blocks == 1:
            return None
        elements, steps = weights_ahead(geometry.step_weights, place.visit, CACHE_LINE // item)
        asked_for = place.number * geometry.all_steps // steps * elements
        return UpcomingWeights(T.bind(weights + geometry.tile_weights + asked_for), elements, steps)


def weights_ahead(step_weights: int, tiles: int, line: int) -> tuple[int, int]:
    """How the weights of as many steps as a tile has are asked for during ``tiles`` tiles.

    Args:
        step_weights: elements of a step.
        line: elements of a line of the cache.

    Returns:
        How many elements steps ask for, and how many steps ask for the same, a power of two: half a line or more at a time,
        since fewer elements would be rounded up by more.
    """
    steps = 1
    while step_weights * steps < line // 2 * tiles:
        steps *= 2
    return -(-step_weights * steps // tiles), steps
