"""What sweeps over a map cost, and where they cost less than tiles of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from tvm_hquant.kernels.convolution.position_sweeps import PositionSweeps
from tvm_hquant.kernels.convolution.tile_costs import TILE, TileCosts
from tvm_hquant.kernels.interface import Tile

if TYPE_CHECKING:
    from tvm_hquant.kernels.convolution.geometry import AnchorGeometry

_KEPT_SUM = 3
"""Instructions that a vector of sums costs which is fetched from a buffer and put back there."""
_SHARE = 8
"""Of the second-level cache an eighth is for sums, which stay there from one sweep to the next; activations and weights pass
through it."""
_WORTHWHILE = 0.99
"""Sweeps have to take this much less time than tiles of a row."""


@dataclass(frozen=True)
class SweepCosts:
    """The costs of the sweeps that a geometry may have."""

    geometry: AnchorGeometry

    @property
    def are_possible(self) -> bool:
        """Whether the positions of the kernel can be taken one after the other: where no step belongs to several of them,
        and the activations are read without padding, where they lie or from a copy of the map."""
        geometry, dot = self.geometry, self.geometry.dot
        return (
            dot.sweeps
            and dot.pixels == 1
            and geometry.chain == 1
            and geometry.conv.groups == 1
            # Those of 16-bit storage are widened first, image by image.
            and (geometry.conv.input_shape[0] == 1 or dot.operand_steps == 1)
            and geometry.passes == 1
            and geometry.patches is None
            and geometry.group_inputs % dot.products == 0
            and not (geometry.is_narrow or geometry.groups_steps or any(geometry.copied_padding))
            and geometry.conv.window.kernel != (1, 1)
        )

    def sweeps(self, tile: Tile) -> PositionSweeps:
        """The sweeps with such tiles."""
        geometry, costs = self.geometry, TileCosts(self.geometry)
        size = tile.vectors * geometry.dot.lanes * np.dtype(geometry.dot.accumulator_dtype).itemsize
        steps = geometry.group_inputs // geometry.dot.products

        @cache
        def cost(pixels: int) -> float:
            return steps * costs.of_step(pixels, tile.vectors) + _KEPT_SUM * pixels * tile.vectors + TILE

        return PositionSweeps(geometry.axes, tile.pixels, size, geometry.processor.l2_bytes // _SHARE, cost)

    def cheaper_tiles(self, tiles: Sequence[Tile]) -> Sequence[tuple[float, Tile]]:
        """The tiles that sweeps may have, each with the instructions of a map, the cheapest first; none where ``tiles`` of
        rows take less."""
        if not self.are_possible:
            return ()
        height, width = self.geometry.output_size
        candidates = self.geometry.tiles_up_to(min(self.geometry.dot.addresses, height * width))
        found = [(self._of_sweeps(self.sweeps(tile), tile), tile) for tile in candidates]
        is_cheaper = found and min(found)[0] < min(map(self._in_rows, tiles)) * _WORTHWHILE
        return sorted(found) if is_cheaper else ()

    def _of_sweeps(self, sweeps: PositionSweeps, tile: Tile) -> float:
        height, width = self.geometry.output_size
        epilogues = height * width * TileCosts(self.geometry).of_epilogue(1, tile.vectors)
        return self._blocks(tile) * (sweeps.total_cost + epilogues)

    def _in_rows(self, tile: Tile) -> float:
        """Instructions of a map in tiles of a row, which leave the rows of the kernel out that are in the padding."""
        geometry, costs, rows = self.geometry, TileCosts(self.geometry), self.geometry.axes[0]
        kernel_rows = sum(len(rows.positions(row)) for row in range(rows.kernel)) / rows.output_size
        runs = geometry.tile_runs(tile)
        of_row = sum(run.count * costs.of_run(run, tile.vectors, kernel_rows) for run in runs)
        return self._blocks(tile) * rows.output_size * of_row

    def _blocks(self, tile: Tile) -> int:
        return -(-self.geometry.group_outputs // (tile.vectors * self.geometry.dot.lanes))
