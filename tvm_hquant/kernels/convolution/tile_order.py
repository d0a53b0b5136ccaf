"""In which order the tiles of a convolution are computed, and what comes to the cache meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.convolution.map_bands import MapBands
from tvm_hquant.kernels.convolution.row_tiles import TileRun
from tvm_hquant.kernels.convolution.tile_costs import TileCosts
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
class UpcomingElements:
    """What the next tiles read of a buffer, and comes to the cache bit by bit while the steps of these tiles are taken.

    What is read for the first time comes from a far cache or from memory, and these deliver less than a tile takes.

    Attributes:
        buffer: flat.
        first: the first element that the tile asks for.
        elements: how many each step asks for.
        steps_in_one: steps that ask for the same, a power of two.
        pieces: None where all of it lies side by side; else the elements of a piece that does, and those between the
            beginnings of two pieces.
    """

    buffer: Buffer
    first: Expression
    elements: int
    steps_in_one: int
    pieces: tuple[int, int] | None = None

    def place(self, step: Expression) -> Expression:
        """Where, from the first element on, lies what a step asks for."""
        at = step // self.steps_in_one * self.elements
        if self.pieces is None:
            return at
        size, distance = self.pieces
        return at // size * distance + at % size

    def prefetch(self, step: Expression, count: int) -> None:
        """Asks for what ``count`` steps of the tile from ``step`` on ask for."""
        at = T.bind(self.first + self.place(step))
        line = CACHE_LINE // np.dtype(str(self.buffer.dtype)).itemsize
        for offset in range(0, -(-count // self.steps_in_one) * self.elements, line):
            prefetch(self.buffer, at + offset)


@dataclass(frozen=True)
class TileOrder:
    """The order of the tiles of a convolution, or of a band of its map, in items that threads share out among themselves."""

    geometry: AnchorGeometry
    bands: MapBands | None = None

    @property
    def rows(self) -> int:
        """Rows of output pixels."""
        if self.bands is None:
            return self.geometry.conv.input_shape[0] * self.geometry.output_size[0]
        return 1 if self.bands.is_single_row else self.bands.units

    @property
    def tiles(self) -> int:
        """Tiles of a row."""
        return self.bands.units if self.bands is not None and self.bands.is_single_row else self.geometry.tiles

    @property
    def channel_blocks(self) -> int:
        return self.geometry.groups * self.geometry.blocks

    @property
    def _chunks(self) -> int:
        """Items of a row, for one block of channels."""
        tiles = self.tiles
        is_item_of_a_thread = self.bands is None or not self.bands.shares_bands
        items = self.geometry.processor.fewest_items if is_item_of_a_thread else 1
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
    def tile_loop(self, item: Expression, band: Expression = 0) -> Iterator[TilePlace]:
        """The loop over the tiles of an item; its statements are those of the tile at a place."""
        tiles, rows, chunks = self.tiles, self.rows, self._chunks
        per_item = -(-tiles // chunks)
        if self.weights_stay_outside:
            channel_block, rest = T.bind(item // (rows * chunks)), T.bind(item % (rows * chunks))
            row, chunk = T.bind(rest // chunks), T.bind(rest % chunks)
        else:
            place, channel_block = T.bind(item // self.channel_blocks), T.bind(item % self.channel_blocks)
            row, chunk = T.bind(place // chunks), T.bind(place % chunks)

        def place_of(tile: Expression) -> TilePlace:
            at = self._in_map(row, tile, band)
            if self.weights_stay_outside:
                return TilePlace(*at, channel_block, row * tiles + tile, rows * tiles)
            return TilePlace(*at, channel_block, tile - chunk * per_item, per_item)

        ends_early = self.bands is not None and not self.bands.is_even
        with ExitStack() as conditions:
            first = T.bind(chunk * per_item)
            last = first + per_item if tiles % per_item == 0 else T.min(first + per_item, tiles)
            if self.bands is not None and ends_early:
                left = T.bind(self.bands.image_units - band % self.bands.per_image * self.bands.units)
                if self.bands.is_single_row:
                    last = T.min(last, left)
                else:
                    conditions.enter_context(T.If(row < left))
                    conditions.enter_context(T.Then())
            if per_item == 1 and not ends_early:
                yield place_of(chunk)
                return
            with T.serial(first, last) as tile:
                yield place_of(tile)

    def _in_map(self, row: Expression, tile: Expression, band: Expression) -> tuple[Expression, Expression]:
        """Row and tile of the map for those of a band."""
        bands = self.bands
        if bands is None or bands.count == 1:
            return row, tile
        first = band % bands.per_image * bands.units
        if bands.is_single_row:
            return row, T.bind(first + tile)
        return T.bind(band // bands.per_image * bands.image_units + first + row), tile

    def upcoming(
        self, place: TilePlace, run: TileRun, weights: tuple[Buffer, Expression], activations: tuple[Buffer, Expression]
    ) -> Sequence[UpcomingElements]:
        """What the tile at a place, one of a run, asks for, given each buffer and where the tile begins in it."""
        return *self._upcoming_weights(place, *weights), *self._upcoming_activations(run, *activations)

    def _upcoming_weights(self, place: TilePlace, weights: Buffer, first: Expression) -> Sequence[UpcomingElements]:
        """Those of the next block of channels, for a tile whose own begin at ``first``.

        Where a visit is one tile, that ends before they would come: steps ask for what is read a little later.
        """
        geometry = self.geometry
        item = np.dtype(geometry.dot.weight_dtype).itemsize
        if not geometry.dot.prefetches or geometry.patches is not None:
            return ()
        if place.visit == 1:
            return (UpcomingElements(weights, T.bind(first + _DISTANCE // item), geometry.step_weights, 1),)
        if self.channel_blocks == 1:
            return ()
        elements, steps = elements_ahead(geometry.step_weights, place.visit, CACHE_LINE // item)
        asked_for = place.number * geometry.all_steps // steps * elements
        return (UpcomingElements(weights, T.bind(first + geometry.tile_weights + asked_for), elements, steps),)

    def _upcoming_activations(self, run: TileRun, source: Buffer, first: Expression) -> Sequence[UpcomingElements]:
        """Those of the next tile of a row, for a tile of 1×1 windows whose own begin at ``first``.

        They are asked for where the map comes from behind the second-level cache, and the pixels of two tiles have room in the
        sets of the first: else they would drive each other out.
        """
        geometry, conv = self.geometry, self.geometry.conv
        dot, processor, stride = geometry.dot, geometry.processor, conv.window.strides[1]
        is_plain = (
            geometry.patches is None and geometry.passes == 1 and conv.window.kernel == (1, 1) and conv.groups == 1
        )
        item = np.dtype(dot.operand_dtype).itemsize
        pixel = geometry.padded_inputs
        comes_from_afar = prod(conv.input_shape) * item > processor.l2_bytes
        has_room = 2 * TileCosts(geometry).pixels_of_a_set(geometry.tile.pixels) < processor.l1_ways
        if not (dot.prefetches and is_plain and comes_from_afar and has_room):
            return ()
        elements, steps = elements_ahead(run.pixels * dot.products, 1, CACHE_LINE // item)
        ahead = T.bind(first + run.pixels * stride * pixel)
        return (UpcomingElements(source, ahead, elements, steps, (pixel, stride * pixel) if stride > 1 else None),)


def elements_ahead(step_elements: int, tiles: int, line: int) -> tuple[int, int]:
    """How what as many steps as a tile has read is asked for during ``tiles`` tiles.

    Args:
        step_elements: elements that a step reads.
        line: elements of a line of the cache.

    Returns:
        How many elements steps ask for, and how many steps ask for the same, a power of two: half a line or more at a time,
        since fewer elements would be rounded up by more.
    """
    steps = 1
    while step_elements * steps < line // 2 * tiles:
        steps *= 2
    return -(-step_elements * steps // tiles), steps
