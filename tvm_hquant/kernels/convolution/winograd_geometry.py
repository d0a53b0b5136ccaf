"""How a 3×3 convolution in Winograd's form is cut into tiles, blocks of them, and the work of cores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.convolution.row_tiles import TileRun, cut_row
from tvm_hquant.kernels.epilogues.packed_epilogue import channel_order
from tvm_hquant.kernels.interface import Array
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, CACHE_LINE, Processor
from tvm_hquant.operators import Conv2D

POSITIONS = 16
"""Products of a tile for each pair of channels."""
OUTPUTS = 2
"""Rows and columns of outputs of a tile."""
INPUTS = 4
"""Rows and columns of codes that it reads."""
TAPS = 3
"""Rows and columns of the window."""
VECTORS = 2
"""Vectors of output channels of a block."""
_TRANSFORM_TILES = 2
"""Tiles whose products take the time of transforming the weights."""
_TRANSFORM = 0.12
"""Time of transforming a tile of codes, over that of its products for a block of channels."""
_SUMS = 6
"""Tiles whose sums are in registers at a time, in ``VECTORS`` vectors of output channels."""
_MOST_WORK = 1.05
"""Times the least work, at most, that blocks for the cores may be: a network may run on fewer of them than it is made for."""
_WORTH_MEMORY = 1.02
"""Times the least time and work that smaller blocks, which take less memory, may take."""


@dataclass(frozen=True)
class WinogradGeometry:
    """A convolution in tiles of 2×2 outputs; the last ones of a row or column overlap those before them."""

    conv: Conv2D
    lanes: int
    processor: Processor = ASSUMED_PROCESSOR
    planes: int = 1
    points: int = 1

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        _, height, width, _ = self.conv.output_shape
        return -(-height // OUTPUTS), -(-width // OUTPUTS)

    @cached_property
    def block_rows(self) -> int:
        """Rows of tiles that are transformed before they are multiplied.

        With their sums they stay in the second-level cache, and let the cores be done first, or nearly so in less memory; but
        with little more work in all.
        """
        rows, columns = self.tiles
        tile_bytes = POSITIONS * (2 * self.conv.in_channels + 4 * self.block_channels)
        most = min(rows, max(1, self.processor.l2_bytes // (columns * tile_bytes)))
        work = {count: self._work(count) for count in range(1, most + 1)}
        allowed = [count for count in work if work[count] <= _MOST_WORK * min(work.values())]
        best = min(allowed, key=lambda count: (self._span(count), work[count]))
        most_work = max(work[best], _WORTH_MEMORY * min(work.values()))
        most_span = _WORTH_MEMORY * self._span(best)
        return min(count for count in allowed if self._span(count) <= most_span and work[count] <= most_work)

    def _blocks(self, rows: int) -> int:
        """Blocks of so many rows in all images."""
        return self.conv.input_shape[0] * -(-self.tiles[0] // rows)

    def _work(self, rows: int) -> int:
        """Tiles of blocks of so many rows, and what transforming the weights for each takes, in tiles."""
        return self._blocks(rows) * (rows * self.tiles[1] + _TRANSFORM_TILES)

    def _span(self, rows: int) -> float:
        """What the core that is done last takes of the better way to share blocks of so many rows."""
        return min(self._spans(rows))

    def _spans(self, rows: int) -> tuple[float, float]:
        """Tiles times blocks of channels of that core, with all that it transforms: where cores share the blocks of tiles, and
        where each transforms all tiles and they share the channels."""
        blocks, cores, tiles = self._blocks(rows), self.processor.cores, rows * self.tiles[1]
        of_channels = tiles + _TRANSFORM_TILES
        by_tiles = -(-blocks // cores) * (self.channel_blocks * of_channels + _TRANSFORM * tiles)
        return by_tiles, blocks * (-(-self.channel_blocks // cores) * of_channels + _TRANSFORM * tiles)

    @property
    def shares_tiles(self) -> bool:
        """Whether cores share the blocks of tiles, not the channels of each. Of equal ways it is that of more parts."""
        by_tiles, by_channels = self._spans(self.block_rows)
        return (by_tiles, -self.blocks) <= (by_channels, -self.channel_blocks)

    @property
    def work(self) -> int:
        """Tiles in all, with what transforming the weights takes."""
        return self._work(self.block_rows)

    @property
    def instructions(self) -> float:
        """Multiply-adds of vectors."""
        return self.work * POSITIONS * self.conv.in_channels / 2 * self.conv.out_channels / self.lanes

    @property
    def blocks(self) -> int:
        """Blocks of tiles of all images."""
        return self._blocks(self.block_rows)

    @property
    def channel_blocks(self) -> int:
        return self.conv.out_channels // self.block_channels

    @property
    def block_inputs(self) -> int:
        """Rows of the padded map that the tiles of a block read."""
        return min(OUTPUTS * self.block_rows + INPUTS - OUTPUTS, self.padded_size[0])

    @property
    def block_tiles(self) -> int:
        return self.block_rows * self.tiles[1]

    @property
    def source_stride(self) -> int:
        """Elements from a position to the next one in the transformed codes."""
        return _apart(self.block_tiles * self.conv.in_channels, 2)

    @property
    def sums_stride(self) -> int:
        """Elements from a position to the next one in the sums of some channels."""
        return _apart(self.block_tiles * self.block_channels, 4)

    @property
    def block_channels(self) -> int:
        """Output channels whose sums are computed together."""
        return VECTORS * self.lanes

    @cached_property
    def runs(self) -> tuple[TileRun, ...]:
        """How the tiles of a block are cut into groups whose sums are in registers."""
        return cut_row(self.block_tiles, _SUMS, lambda tiles: tiles * VECTORS + 2.0)

    @property
    def padded_size(self) -> tuple[int, int]:
        _, height, width, _ = self.conv.input_shape
        top, left, bottom, right = self.conv.window.padding
        return height + top + bottom, width + left + right

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Output channel of every packed lane."""
        blocks = np.arange(0, self.conv.out_channels, self.block_channels)
        return np.add.outer(blocks, channel_order(VECTORS, self.block_channels, self.lanes)).reshape(-1)

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., out_channels] in the order of the lanes."""
        return np.ascontiguousarray(values[..., self.channel_rows])

    def pack_weights(self, weights: Array) -> Array:
        """[1, out, in, 3, 3] as block of outputs, pair of inputs, vector, row and column of the window, lane, input; flat."""
        rows = weights[0, self.channel_rows]
        blocks = rows.reshape(-1, VECTORS, self.lanes, self.conv.in_channels // 2, 2, TAPS**2)
        return np.ascontiguousarray(blocks.transpose(0, 3, 1, 5, 2, 4).reshape(-1))

    @property
    def weight_elements(self) -> int:
        return TAPS**2 * self.conv.in_channels * self.conv.out_channels

    @property
    def weight_stride(self) -> int:
        """Elements from a position to the next one in the transformed weights of a block of outputs."""
        return _apart(self.conv.in_channels * self.block_channels, 2)


def _apart(count: int, size: int) -> int:
    """``count`` elements of ``size`` bytes and a cache line: what lies a power of two apart would share sets of the cache."""
    return count + CACHE_LINE // size
