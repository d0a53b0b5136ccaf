"""Shapes of a convolution kernel: how pixels and channels are cut into tiles, and what these read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.anchor_constants import WHOLE_WINDOW, WindowPart
from tvm_hquant.kernels.convolution.lane_order import LaneNumbers, lane_channels, lane_turns
from tvm_hquant.kernels.convolution.position_sweeps import PositionSweeps
from tvm_hquant.kernels.convolution.row_tiles import TileRun, cut_row, split_at_borders
from tvm_hquant.kernels.convolution.sweep_costs import SweepCosts
from tvm_hquant.kernels.convolution.tile_costs import TileCosts
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.epilogues.packed_epilogue import vector_groups
from tvm_hquant.kernels.interface import Placement, Tile
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.window_axis import WindowAxis, window_axes
from tvm_hquant.operators import Conv2D, Dense, Window

_GROUP = 8
"""Steps of a group whose sums stay in registers: longer ones fit seldom, and there are layers with few steps."""
_SEVERAL_CHAINS = 16
"""Steps of a chain, at most, where others follow: longer ones are so much code that small layers take longer."""
_FEWEST_GROUPED = 7
"""Of fewer steps, reading their order from a table takes longer than taking some together saves."""
_UNROLLED = 300
"""Instructions of a loop body, times its iterations, up to which LLVM unrolls a loop (``LoopUnrollPass.cpp``)."""


def as_conv2d(operator: Conv2D | Dense) -> Conv2D:
    """The convolution to compute: dense layers are 1×1 ones, and a plain 1×1 one sees all its pixels as one row."""
    conv = operator.as_conv2d() if isinstance(operator, Dense) else operator
    n, h, w, c = conv.input_shape
    window = conv.window
    if window.kernel == (1, 1) and window.strides == (1, 1) and not any(window.padding):
        return Conv2D((1, 1, n * h * w, c), conv.out_channels, Window((1, 1)), conv.groups, conv.epilogue)
    return conv


def _powers_of_two_below(limit: int) -> tuple[int, ...]:
    """The largest first."""
    return tuple(1 << bit for bit in reversed(range((limit - 1).bit_length())))


@dataclass(frozen=True)
class AnchorGeometry:
    """A convolution, the dot product that computes it, and how many byte planes its activations have.

    ``chosen_tile`` takes the place of the tile that :class:`TileCosts` picks. With ``packs_codes`` vectors of sums are finished
    by a :class:`.PackedEpilogue`, which wants channels in an order of its own. Where
    ``padding_is_neutral``, kernel positions in the padding may be left out: the sums would be the same.
    ``patches`` is the convolution that ``conv`` computes on patches of its activations. With ``writes_once`` tiles of a row do
    not overlap, whatever shorter ones cost. Tiles are for a ``processor``. Where steps read activations in a wider buffer,
    ``source`` says where in it they are; with ``copies`` they are copied in any case, out of such a buffer, too.
    """

    conv: Conv2D
    dot: DotProduct
    planes: int
    points: int
    chosen_tile: Tile | None = None
    packs_codes: bool = False
    padding_is_neutral: bool = False
    patches: Conv2D | None = None
    writes_once: bool = False
    processor: Processor = ASSUMED_PROCESSOR
    source: Placement | None = None
    copies: bool = False

    # Channels.

    @cached_property
    def group_inputs(self) -> int:
        return self.conv.in_channels // self.conv.groups

    @cached_property
    def groups(self) -> int:
        """Groups of channels that are computed one after the other; those that share vectors count as one."""
        return self.conv.groups // self.dot.groups

    @cached_property
    def group_outputs(self) -> int:
        """Output channels of such a group, in the order of memory."""
        return self.conv.out_channels // self.groups

    @cached_property
    def chain(self) -> int:
        """Steps in a chain: as many as the dot product allows; the steps that are left make shorter ones.

        A chain stays within a pixel: where a run takes several, it has to divide the steps of one. Where operands come several
        at a time, it has to be a power of two like them.
        """
        chain, steps = self.dot.chain, -(-self.group_inputs // self.dot.products)
        takes_one_pixel = self.runs == self.conv.window.kernel[1]
        if takes_one_pixel and self.dot.operand_steps == 1:
            return steps if steps <= chain else min(chain, _SEVERAL_CHAINS)
        chain = min(chain, _SEVERAL_CHAINS)
        while chain > steps or (steps % chain and not takes_one_pixel):
            chain //= 2
        return chain

    @cached_property
    def groups_steps(self) -> bool:
        """Whether the steps of a tile come in an order that the weights decide, two of them together where they can."""
        return self.dot.groups_steps and self.chain == 1 and self.passes == 1 and self.all_steps >= _FEWEST_GROUPED

    @property
    def group(self) -> int:
        """Steps that are taken together where their weights let them; 2 where these are too wide for short sums."""
        return _GROUP if self.dot.chain >= _GROUP and self.dot.short_sums(_GROUP) is not None else 2

    @property
    def all_steps(self) -> int:
        """Steps of a tile."""
        return self.conv.window.kernel[0] * self.runs * self.steps

    def parts(self, steps: int) -> tuple[int, tuple[int, ...]]:
        """How ``steps`` steps are cut: so many full loads of operands, and the steps of the shorter loads after them."""
        full = max(self.dot.operand_steps, self.chain)
        count, left = divmod(steps, full)
        if self.dot.operand_steps == 1:
            return count, (left,) if left else ()
        return count, tuple(size for size in _powers_of_two_below(full) if left & size)

    @cached_property
    def padded_inputs(self) -> int:
        """Channels of a group in memory, filled up to whole steps where steps cannot do without."""
        products = self.dot.products
        if self.dot.groups > 1:
            return -(-self.group_inputs // products) * products
        run = self.group_inputs * (self.conv.window.kernel[1] if self.is_merged else 1)
        left = self.group_inputs % products
        ends_within = run == self.group_inputs and left in self.dot.last_channels
        if run >= products and (self.dot.splits_pixels or ends_within):
            return self.group_inputs
        return -(-self.group_inputs // products) * products

    @cached_property
    def is_merged(self) -> bool:
        """Whether the channels that a kernel row takes lie side by side in memory, and are one run of steps."""
        return self.conv.window.dilation[1] == 1 and self.conv.groups == 1 and not self._leaves_gaps

    @property
    def _leaves_gaps(self) -> bool:
        """Whether other channels lie between the pixels that a kernel row takes."""
        return self.source is not None and self.conv.window.kernel[1] > 1

    @cached_property
    def runs(self) -> int:
        """Runs of steps of a kernel row."""
        return 1 if self.is_merged else self.conv.window.kernel[1]

    @cached_property
    def run_inputs(self) -> int:
        """Elements of a run."""
        return self.padded_inputs * (self.conv.window.kernel[1] if self.is_merged else 1)

    @property
    def full_steps(self) -> int:
        """Steps of a run that take new elements only."""
        return self.run_inputs // self.dot.products

    @cached_property
    def steps(self) -> int:
        """Steps of a run; the last one overlaps the one before it where elements are left."""
        return -(-self.run_inputs // self.dot.products)

    @property
    def is_narrow(self) -> bool:
        """Whether a group has fewer output channels than a vector has lanes."""
        return self.group_outputs < self.dot.lanes

    # Tiles.

    @cached_property
    def tile(self) -> Tile:
        """The register tile.

        Raises:
            KernelError: the chosen tile is not a candidate.
        """
        if self.chosen_tile is None:
            return self.candidates[0]
        if self.chosen_tile not in self.candidates:
            known = ", ".join(map(str, self.candidates))
            raise KernelError(f"no tile {self.chosen_tile} for {self.conv} with {self.dot.name}: use one of {known}")
        return self.chosen_tile

    @cached_property
    def candidates(self) -> tuple[Tile, ...]:
        """The tiles that fit the registers, the cheapest by a count of instructions first.

        A step of a tile of p pixels and v vectors takes p·v multiply-adds (longer where they are too few to hide their
        latency), and loads p operands and v weights that run beside them. Every tile pays for its epilogue, so tiles that
        overlap cost twice; where an epilogue runs beside the products of the next tile, for what is too long for that.
        """
        return tuple(tile for _, tile in self._swept_tiles or self._costs)

    @cached_property
    def sweeps(self) -> PositionSweeps | None:
        """The sweeps over the map, where these take less time than tiles of a row."""
        return SweepCosts(self).sweeps(self.tile) if self._swept_tiles else None

    @property
    def sweep_tables(self) -> tuple[npt.NDArray[np.int32], ...]:
        """What a kernel that sweeps the map knows of every sweep, in one table; none for others."""
        return (self.sweeps.table(self.pixel_elements, self.block),) if self.sweeps is not None else ()

    @cached_property
    def _swept_tiles(self) -> Sequence[tuple[float, Tile]]:
        """The tiles of sweeps, each with the instructions of a map; none where tiles of a row take less."""
        return SweepCosts(self).cheaper_tiles([tile for _, tile in self._costs])

    @property
    def cost(self) -> float:
        """Instructions of the cheapest tiles of the layer, as the model counts them; infinite where no tile fits."""
        rows = self.conv.input_shape[0] * self.output_size[0]
        return self.groups * rows * self._costs[0][0] if self._costs else inf

    @cached_property
    def _costs(self) -> Sequence[tuple[float, Tile]]:
        """The tiles, each with the instructions of a row of pixels of a group."""
        _, width = self.output_size
        blocks = {tile: -(-self.group_outputs // (tile.vectors * self.dot.lanes)) for tile in self.tiles_up_to(width)}
        return sorted((count * self._row_cost(tile), tile) for tile, count in blocks.items())

    def tiles_up_to(self, most_pixels: int) -> Sequence[Tile]:
        """The tiles of so many pixels or fewer that fit the registers."""
        most_vectors = max(self.group_outputs // self.dot.lanes, 1)
        if self.packs_codes or self.dot.groups > 1:
            # Other sums gain nothing by sharing operands in wider tiles, which a multiply-add reads from memory.
            most_vectors = -(-self.group_outputs // self.dot.lanes)
        found = []
        for pixels in range(1, min(most_pixels, 16) + 1):
            for vectors in range(1, min(most_vectors, self.dot.row_vectors if pixels == 1 else 8) + 1):
                blocks = -(-self.group_outputs // (vectors * self.dot.lanes))
                if blocks > 1 and vectors * self.dot.lanes % self.dot.groups:
                    # The lanes of a vector would belong to other groups in every block.
                    continue
                groups = -(-pixels // self.dot.pixels)
                sums = groups * vectors * self.dot.accumulator_registers
                # LLVM unrolls short loops over kernel columns and keeps operands that later columns read again.
                is_unrolled = (
                    self.conv.window.kernel[1] > 1
                    and not self.skips_padding
                    and self.runs * self.steps * (sums + pixels + vectors) < _UNROLLED
                )
                shared = self.dot.registers * 3 // 8 if is_unrolled else 0
                spare = self.dot.spare_registers(groups, vectors, self.chain) + self.operands_of_a_pixel(vectors) - 1
                if sums + max(spare, shared) > self.dot.registers:
                    continue
                found.append(Tile(pixels, vectors))
        return found

    def tile_runs(self, tile: Tile) -> tuple[TileRun, ...]:
        """The tiles of a row of output pixels."""
        _, width = self.output_size
        costs = TileCosts(self)
        cost = cache(lambda pixels: costs.of_run(TileRun(0, 1, 0, pixels), tile.vectors))
        runs = cut_row(width, tile.pixels, cost, self.writes_once)
        return split_at_borders(runs, self.axes[1]) if self.skips_padding else runs

    def _row_cost(self, tile: Tile) -> float:
        costs = TileCosts(self)
        return sum(run.count * costs.of_run(run, tile.vectors) for run in self.tile_runs(tile))

    def operands_of_a_pixel(self, vectors: int) -> int:
        """Operands of a step of so many vectors: lanes may take turns among groups in several orders."""
        return len({*self._turns(vectors)}) if self.dot.groups > 1 else 1

    def lane_channels(self, vectors: int) -> LaneNumbers:
        """The place of the channel in every lane of so many vectors of a tile, from the first of the tile."""
        return lane_channels(vectors, self._channels(vectors), self.dot.lanes, self.packs_codes)

    @cached_property
    def turns(self) -> LaneNumbers:
        """For every vector of a tile the group of each lane, of those that share vectors."""
        return self._turns(self.tile.vectors)

    def _turns(self, vectors: int) -> LaneNumbers:
        return lane_turns(vectors, self._channels(vectors), self.dot.lanes, self.packs_codes, self.dot.groups)

    def _channels(self, vectors: int) -> int:
        """Output channels of a tile of so many vectors."""
        return min(vectors * self.dot.lanes, self.group_outputs)

    @property
    def block(self) -> int:
        """Lanes of a tile's vectors of output channels."""
        return self.tile.vectors * self.dot.lanes

    @property
    def block_channels(self) -> int:
        """Output channels of a tile."""
        return self._channels(self.tile.vectors)

    @cached_property
    def vector_groups(self) -> Sequence[tuple[int, int]]:
        """Vectors of a tile whose codes are packed together, as (first vector, number)."""
        return vector_groups(self.tile.vectors, self.block_channels, self.dot.lanes)

    def vector_channel(self, first: int, size: int = 1) -> int:
        """The first channel, within a tile, of ``size`` of its vectors that are stored together."""
        return max(min(first * self.dot.lanes, self.block_channels - size * self.dot.lanes), 0)

    @property
    def blocks(self) -> int:
        """Tiles over the output channels of a group; the last one overlaps the one before it."""
        return -(-self.group_outputs // self.block)

    @property
    def overlaps(self) -> bool:
        """Whether some outputs are computed by two tiles."""
        _, width = self.output_size
        in_row = self.sweeps is None and any(run.start + run.count * run.pixels > width for run in self.row_tiles)
        return in_row or (not self.is_narrow and self.group_outputs % self.block > 0)

    @cached_property
    def output_size(self) -> tuple[int, int]:
        return self.conv.window.output_size(*self.conv.input_shape[1:3])

    @cached_property
    def axes(self) -> tuple[WindowAxis, WindowAxis]:
        """The window along rows and columns of the map."""
        return window_axes(self.conv.input_shape, self.conv.window)

    @cached_property
    def row_tiles(self) -> tuple[TileRun, ...]:
        """The tiles of a row of output pixels."""
        return self.tile_runs(self.tile)

    @property
    def tiles(self) -> int:
        """How many these are."""
        return self.row_tiles[-1].first + self.row_tiles[-1].count

    # Memory.

    @cached_property
    def skips_padding(self) -> bool:
        """Whether kernel positions in the padding are left out: where no step belongs to several of them, nor steps come in an
        order of their own, and a position is in the padding for all of an accumulator or none."""
        return (
            self.padding_is_neutral
            and any(self.conv.window.padding)
            and self.patches is None
            and self.dot.pixels == 1
            and self.padded_inputs % self.dot.products == 0
            and not self.groups_steps
        )

    @property
    def window_parts(self) -> tuple[WindowPart, ...]:
        """The parts of the window that are computed somewhere: for each section of rows those of all sections of columns."""
        if not self.skips_padding:
            return (WHOLE_WINDOW,)
        rows, columns = ([slice(s.begin, s.end) for s in axis.sections] for axis in self.axes)
        return tuple((row, column) for row in rows for column in columns)

    @property
    def copied_padding(self) -> tuple[int, int, int, int]:
        """Padding that the activations have in memory."""
        return (0, 0, 0, 0) if self.skips_padding else self.conv.window.padding

    @property
    def padded_size(self) -> tuple[int, int]:
        """Rows and columns of the activations with that padding."""
        _, h, w, _ = self.conv.input_shape
        top, left, bottom, right = self.copied_padding
        return h + top + bottom, w + left + right

    def needs_copy(self, stored_dtype: str) -> bool:
        """Whether activations have to be copied before the steps can read them."""
        return (
            self.copies
            or self.patches is not None
            or any(self.copied_padding)
            or self.dot.groups > 1
            or self.planes > 1
            or self.padded_inputs != self.group_inputs
            or stored_dtype != self.dot.operand_dtype
        )

    @property
    def pixel_elements(self) -> int:
        """Elements from one pixel to the next in the memory that steps read."""
        return self.conv.groups * self.padded_inputs if self.source is None else self.source.channels

    @property
    def first_channel(self) -> int:
        """Where the channels of a pixel begin there."""
        return 0 if self.source is None else self.source.offset

    @property
    def copy_offset(self) -> int:
        """What the copy adds to codes: the dot product's offset, if it reads signed bytes."""
        return self.dot.operand_offset if self.dot.operand_dtype == "int8" else 0

    @property
    def passes(self) -> int:
        """Accumulations of a tile: every plane with every weight point."""
        return self.planes * self.points

    @property
    def step_weights(self) -> int:
        """Elements of the weights of a step of a tile."""
        return self.block * self.dot.products

    @property
    def tile_weights(self) -> int:
        """Elements of the weights of a tile, for one point. Those of the next tile over channels lie behind them."""
        return self.all_steps * self.step_weights

    @property
    def packed_lanes(self) -> int:
        """Lanes of all tiles over channels: so many values a packed array has per pass."""
        return self.groups * self.blocks * self.block

    @property
    def weight_elements(self) -> int:
        """Elements of the packed weights of one point."""
        return self.groups * self.blocks * self.tile_weights
