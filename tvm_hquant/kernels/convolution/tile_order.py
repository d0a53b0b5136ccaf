"""In which order the tiles of a convolution are computed, and what comes to the cache meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import gcd, prod

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
_LARGEST_SHARE = 1.05
"""Pixels of the largest share of the map, at most, over those of an equal one."""


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
    """The order of the tiles of a convolution, or of a band of its map, in items that so many ``cores`` share out among
    themselves."""

    geometry: AnchorGeometry
    bands: MapBands | None = None
    cores: int = 1

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

    @cached_property
    def shares(self) -> int:
        """Parts of the map that follow each other, each with all channels: one for every core, or 1 where cores share channels.

        Cores that share channels all read the whole map, most of which others wrote; those that share the map all read the
        weights, which stay in the last cache for all of them. A single core that computes all shares takes the weights of the
        second one out of its second-level cache.
        """
        weights, processor = self._weight_bytes, self.geometry.processor
        is_possible = self.cores > 1 and self.weights_stay_outside and self.bands is None
        if not is_possible or weights > min(processor.l2_bytes, processor.other_core_line * self._map_bytes):
            return 1
        chunks = self._chunks_of_a_row(self.cores)
        in_share, left = divmod(self.rows * chunks, self.cores)
        if left:
            return 1
        starts = [self._pixels_before(*divmod(s * in_share, chunks), chunks) for s in range(self.cores + 1)]
        largest = max(end - start for start, end in pairwise(starts))
        return self.cores if largest * self.cores <= _LARGEST_SHARE * starts[-1] else 1

    @cached_property
    def _chunks(self) -> int:
        """Items of a row, for one block of channels."""
        return self._chunks_of_a_row(self.shares)

    def _chunks_of_a_row(self, shares: int) -> int:
        """As many as make so many shares equal, where a row has so many tiles."""
        is_item_of_a_thread = self.bands is None or not self.bands.shares_bands
        items = self.geometry.processor.fewest_items if is_item_of_a_thread else 1
        most = max(1, min(_TILES_PER_ITEM, self.tiles * self.rows * self.channel_blocks // items))
        multiple = shares // gcd(self.rows, shares)
        return min(-(-self.tiles // (most * multiple)) * multiple, self.tiles)

    def _pixels_before(self, row: int, chunk: int, chunks: int) -> int:
        """Pixels of the map before one of so many chunks of each row."""
        first = chunk * self.tiles // chunks
        of_runs = (max(0, min(first - run.first, run.count)) * run.pixels for run in self.geometry.row_tiles)
        return row * self.geometry.output_size[1] + sum(of_runs)

    @property
    def items(self) -> int:
        return self.rows * self.channel_blocks * self._chunks

    @property
    def weights_stay_outside(self) -> bool:
        """Whether the loop over output channels is the outer one, so that weights are read again from the nearest caches.

        It is for weights that do not stay in the second-level cache: these are walked through once. So are all that are asked
        for beforehand, where activations, which then come again for every block of channels, stay in the last cache.
        """
        dot, processor = self.geometry.dot, self.geometry.processor
        activations = self.geometry.planes * prod(self.geometry.conv.input_shape) * self._operand_bytes
        return self._weight_bytes > processor.l2_bytes or (dot.prefetches and activations <= processor.last_share)

    @property
    def _weight_bytes(self) -> int:
        geometry = self.geometry
        return geometry.points * prod(geometry.conv.weight_shape) * np.dtype(geometry.dot.weight_dtype).itemsize

    @property
    def _operand_bytes(self) -> int:
        return np.dtype(self.geometry.dot.operand_dtype).itemsize

    @property
    def _map_bytes(self) -> int:
        """Of all activations that are read and written, in the size of operands."""
        conv = self.geometry.conv
        outputs = (1 + conv.epilogue.has_residual) * prod(conv.output_shape)
        return self._operand_bytes * (self.geometry.planes * prod(conv.input_shape) + outputs)

    @contextmanager
    def tile_loop(self, item: Expression, band: Expression = 0) -> Iterator[TilePlace]:
        """The loop over the tiles of an item; its statements are those of the tile at a place."""
        tiles, chunks, shares = self.tiles, self._chunks, self.shares
        in_share = self.rows * chunks // shares
        if self.weights_stay_outside:
            share = T.bind(item // (in_share * self.channel_blocks)) if shares > 1 else 0
            channel_block = T.bind(item // in_share % self.channel_blocks)
            place = T.bind(share * in_share + item % in_share)
        else:
            share = 0
            place, channel_block = T.bind(item // self.channel_blocks), T.bind(item % self.channel_blocks)
        row, chunk = T.bind(place // chunks), T.bind(place % chunks)
        first, last = T.bind(self._first_tile(chunk)), self._first_tile(chunk + 1)

        def place_of(tile: Expression) -> TilePlace:
            at = self._in_map(row, tile, band)
            if not self.weights_stay_outside:
                return TilePlace(*at, channel_block, tile - first, -(-tiles // chunks))
            number = row * tiles + tile
            if shares > 1:
                start = share * in_share
                number = number - (start // chunks * tiles + self._first_tile(start % chunks))
            return TilePlace(*at, channel_block, number, -(-self.rows * tiles // shares))

        ends_early = self.bands is not None and not self.bands.is_even
        with ExitStack() as conditions:
            if self.bands is not None and ends_early:
                left = T.bind(self.bands.image_units - band % self.bands.per_image * self.bands.units)
                if self.bands.is_single_row:
                    last = T.min(last, left)
                else:
                    conditions.enter_context(T.If(row < left))
                    conditions.enter_context(T.Then())
            if tiles == chunks and not ends_early:
                yield place_of(chunk)
                return
            with T.serial(first, last) as tile:
                yield place_of(tile)

    def _first_tile(self, chunk: Expression) -> Expression:
        """Of a chunk of a row; those of a row differ by a tile at most."""
        tiles, chunks = self.tiles, self._chunks
        return chunk * (tiles // chunks) if tiles % chunks == 0 else chunk * tiles // chunks

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
        pixel, distance = geometry.padded_inputs, stride * geometry.pixel_elements
        comes_from_afar = prod(conv.input_shape) * item > processor.l2_bytes
        has_room = 2 * TileCosts(geometry).pixels_of_a_set(geometry.tile.pixels) < processor.l1_ways
        if not (dot.prefetches and is_plain and comes_from_afar and has_room):
            return ()
        elements, steps = elements_ahead(run.pixels * dot.products, 1, CACHE_LINE // item)
        ahead, pieces = T.bind(first + run.pixels * distance), (pixel, distance) if distance > pixel else None
        return (UpcomingElements(source, ahead, elements, steps, pieces),)


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
