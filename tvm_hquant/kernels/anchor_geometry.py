"""Shapes of a convolution kernel: how pixels and channels are cut into tiles, and how constants are packed for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.anchor_constants import WHOLE_WINDOW, WindowPart
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.interface import Tile
from tvm_hquant.kernels.packed_epilogue import channel_order, vector_groups
from tvm_hquant.kernels.patches import weights_of_patches
from tvm_hquant.kernels.row_tiles import TileRun, cut_row, split_at_borders
from tvm_hquant.kernels.step_groups import group_steps
from tvm_hquant.kernels.vector_loops import CACHE_LINE
from tvm_hquant.kernels.window_axis import WindowAxis, window_axes
from tvm_hquant.operators import Conv2D, Dense, Window

Array = npt.NDArray[Any]

_SHORT_OPERAND = 0.2
"""Cost of an operand where sums are short: products do not wait for each other, and the loads run beside the additions."""
_GROUP = 8
"""Steps of a group whose sums stay in registers: longer ones fit seldom, and there are layers with few steps."""
_EPILOGUE = 8
"""Instructions that finish a vector of sums."""
_PACKED_EPILOGUE = {4: 6, 2: 7, 1: 10}
"""The same where as many vectors of a pixel are packed together: fewer of them take more shuffles and stores."""
_RESIDUAL = 4
"""Instructions that add a residual to a vector of sums."""
_AT_A_TIME = 3
"""Of what is not hidden behind the products of other tiles, instructions that take as long as a product."""
_TILE = 20
"""Instructions around a tile."""
_SEVERAL_CHAINS = 16
"""Steps of a chain, at most, where others follow: longer ones are so much code that small layers take longer."""
_FEWEST_GROUPED = 7
"""Of fewer steps, reading their order from a table takes longer than taking some together saves."""
_UNROLLED = 300
"""Instructions of a loop body, times its iterations, up to which LLVM unrolls a loop (``LoopUnrollPass.cpp``)."""
_CACHE_SETS = 64
"""Sets of a first-level data cache on the processors at hand."""
_LINES_OF_A_SET = 4
"""Pixels of a tile that may share a set with no loss; every further one costs ``_CROWDED`` of a step."""
_CROWDED = 0.04


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

    ``chosen_tile`` takes the place of the tile that the model below picks. With ``packs_codes`` vectors of sums are finished
    by a :class:`tvm_hquant.kernels.packed_epilogue.PackedEpilogue`, which wants channels in an order of its own. Where
    ``padding_is_neutral``, kernel positions in the padding may be left out: the sums would be the same.
    ``patches`` is the convolution that ``conv`` computes on patches of its activations. With ``writes_once`` tiles of a row do
    not overlap, whatever shorter ones cost.
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
        return self.conv.window.dilation[1] == 1 and self.conv.groups == 1

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
        _, width = self.output_size
        most_vectors = 1 if self.is_narrow else self.group_outputs // self.dot.lanes
        found = []
        for pixels in range(1, min(width, 16) + 1):
            for vectors in range(1, min(most_vectors, self.dot.row_vectors if pixels == 1 else 8) + 1):
                groups = -(-pixels // self.dot.pixels)
                sums = groups * vectors * self.dot.accumulator_registers
                # LLVM unrolls short loops over kernel columns and keeps operands that later columns read again.
                is_unrolled = (
                    self.conv.window.kernel[1] > 1
                    and not self.skips_padding
                    and self.runs * self.steps * (sums + pixels + vectors) < _UNROLLED
                )
                shared = self.dot.registers * 3 // 8 if is_unrolled else 0
                if sums + max(self.dot.spare_registers(groups, vectors, self.chain), shared) > self.dot.registers:
                    continue
                blocks = -(-self.group_outputs // (vectors * self.dot.lanes))
                found.append((blocks * self._row_cost(Tile(pixels, vectors)), Tile(pixels, vectors)))
        return tuple(tile for _, tile in sorted(found))

    def tile_runs(self, tile: Tile) -> tuple[TileRun, ...]:
        """The tiles of a row of output pixels."""
        _, width = self.output_size
        cost = cache(lambda pixels: self._run_cost(TileRun(0, 1, 0, pixels), tile.vectors))
        runs = cut_row(width, tile.pixels, cost, self.writes_once)
        return split_at_borders(runs, self.axes[1]) if self.skips_padding else runs

    def _row_cost(self, tile: Tile) -> float:
        return sum(run.count * self._run_cost(run, tile.vectors) for run in self.tile_runs(tile))

    def _run_cost(self, run: TileRun, vectors: int) -> float:
        """Instructions of a tile of a run."""
        kernel_height, kernel_width = self.conv.window.kernel
        steps = kernel_height * self.runs * self.steps
        if run.columns is None:
            of_steps = steps * self._step_cost(run.pixels, vectors)
        else:
            reached = (end - begin for begin, end in run.columns)
            of_steps = sum(steps / kernel_width * self._step_cost(pixels, vectors) for pixels in reached if pixels)
        return of_steps + self._around(run.pixels, vectors)

    def _around(self, pixels: int, vectors: int) -> float:
        """What finishes a tile and stands around it, in multiply-adds."""
        instructions = self._epilogue(pixels, vectors) + _TILE
        if not self.dot.lookahead:
            return instructions
        # Scaling sums and residuals takes the units of the products, all else has units of its own.
        has_residual = self.conv.epilogue.has_residual
        scalings = pixels * vectors * (1 + has_residual)
        instructions += _RESIDUAL * has_residual * pixels * vectors
        return scalings + max(0, instructions - self.dot.lookahead) / _AT_A_TIME

    def _step_cost(self, pixels: int, vectors: int) -> float:
        sums = -(-pixels // self.dot.pixels) * vectors * self.dot.accumulator_registers
        if self.dot.short_sums(self.chain) is not None:
            multiplications, operand_cost = float(sums), _SHORT_OPERAND
        elif self.groups_steps:
            multiplications, operand_cost = float(sums), self.dot.operand_cost
        else:
            multiplications = max(sums, (sums + self.dot.latency) / 2, self.dot.row_vectors)
            operand_cost = self.dot.operand_cost
        crowded = 1 + _CROWDED * max(0, self._pixels_of_a_set(pixels) - _LINES_OF_A_SET)
        return crowded * (multiplications + operand_cost * pixels + self.dot.weight_cost * vectors)

    def _pixels_of_a_set(self, pixels: int) -> int:
        """How many neighbouring pixels lie in the same set of the first-level cache, at most."""
        size = self.conv.window.strides[1] * self.conv.groups * self.padded_inputs
        size *= np.dtype(self.dot.operand_dtype).itemsize
        sets = [i * size // CACHE_LINE % _CACHE_SETS for i in range(pixels)]
        return max(sets.count(number) for number in set(sets)) if size >= CACHE_LINE else 1

    def _epilogue(self, pixels: int, vectors: int) -> int:
        """Instructions that finish a tile."""
        if not self.packs_codes:
            return _EPILOGUE * -(-pixels // self.dot.pixels) * vectors * self.dot.accumulator_registers
        return pixels * sum(size * _PACKED_EPILOGUE[size] for _, size in vector_groups(vectors))

    @property
    def block(self) -> int:
        """Output channels of a tile."""
        return self.tile.vectors * self.dot.lanes

    @property
    def blocks(self) -> int:
        """Tiles over the output channels of a group; the last one overlaps the one before it."""
        return 1 if self.is_narrow else -(-self.group_outputs // self.block)

    @property
    def overlaps(self) -> bool:
        """Whether some outputs are computed by two tiles."""
        _, width = self.output_size
        in_row = any(run.start + run.count * run.pixels > width for run in self.row_tiles)
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
            any(self.copied_padding)
            or self.dot.groups > 1
            or self.planes > 1
            or self.padded_inputs != self.group_inputs
            or stored_dtype != self.dot.operand_dtype
        )

    @property
    def copy_offset(self) -> int:
        """What the copy adds to codes: the dot product's offset, if it reads signed bytes."""
        return self.dot.operand_offset if self.dot.operand_dtype == "int8" else 0

    @property
    def plane_elements(self) -> int:
        """Elements of one plane of the copied activations."""
        height, width = self.padded_size
        return self.conv.input_shape[0] * height * width * self.conv.groups * self.padded_inputs

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

    # Constants.

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Output channel of every packed lane, [groups · blocks · block]; −1 where there is none."""
        rows = []
        order = np.arange(self.block)
        if self.packs_codes:
            order = channel_order(self.tile.vectors, self.dot.lanes).reshape(-1)
        for group in range(self.groups):
            for block in range(self.blocks):
                start = min(block * self.block, max(self.group_outputs - self.block, 0))
                within = start + order
                channels = group * self.group_outputs + self._channel(within)
                rows.append(np.where(within < self.group_outputs, channels, -1))
        return np.concatenate(rows)

    def _channel(self, place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The channel of a group, as the operator counts them, at a place in memory."""
        return place % self.dot.groups * (self.group_outputs // self.dot.groups) + place // self.dot.groups

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """An array [..., out_channels] in the order of the tiles: [..., groups · blocks · block]."""
        padded = np.concatenate([values, np.full((*values.shape[:-1], 1), fill, values.dtype)], axis=-1)
        return np.ascontiguousarray(padded[..., self.channel_rows])

    def pack_weights(self, weights: Array) -> Array:
        """Weights [points, out, in / groups, kh, kw] in the order in which the steps read them, flat."""
        return np.ascontiguousarray(self._steps_of_tiles(weights).reshape(-1))

    def group_steps(self, packed: Array) -> tuple[Array, Array]:
        """Packed weights with their steps in an order of groups, where ``groups_steps``, and what the kernel knows of it.

        That is int32 [tiles over channels · (2 + steps)]: the numbers of groups of ``group`` and of pairs, and for each step
        in its new place how many elements after the start of a pixel's window its activations begin.
        """
        starts = self._step_starts()
        ordered, rows = [], []
        for tile in packed.reshape(-1, self.all_steps, self.block, self.dot.products):
            order, counts = group_steps(tile, self.group)
            ordered.append(tile[order])
            rows.append([*counts, *starts[order]])
        return np.stack(ordered).reshape(-1), np.array(rows, np.int32).reshape(-1)

    def _step_starts(self) -> Array:
        """int64 [steps], in the order of the window."""
        kernel_height = self.conv.window.kernel[0]
        row_step, column_step = self.conv.window.dilation
        pixel = self.conv.groups * self.padded_inputs
        within = np.minimum(np.arange(self.steps) * self.dot.products, self.run_inputs - self.dot.products)
        within = within * self.dot.groups
        columns = np.arange(self.runs) * column_step * pixel
        rows = np.arange(kernel_height) * row_step * self.padded_size[1] * pixel
        return (rows[:, None, None] + columns[:, None] + within).reshape(-1)

    def _steps_of_tiles(self, weights: Array) -> Array:
        """Weights [points · tiles over channels, steps, vector, lane, product], in the order of the window."""
        if self.patches is not None:
            weights = weights_of_patches(weights)
        points, inputs, height = weights.shape[0], *weights.shape[2:4]
        pads = ((0, 0), (0, 1), (0, self.padded_inputs - inputs), (0, 0), (0, 0))
        rows = np.moveaxis(np.pad(weights, pads)[:, self.channel_rows], 2, -1)
        lanes, products = self.dot.lanes, self.dot.products
        elements = rows.reshape(points, -1, self.tile.vectors, lanes, height, self.runs, self.run_inputs)
        full = self.full_steps * products
        if full < self.run_inputs:
            # The last step repeats elements, with weights of zero.
            last = elements[..., self.run_inputs - products :].copy()
            last[..., : products - (self.run_inputs - full)] = 0
            elements = np.concatenate([elements[..., :full], last], axis=-1)
        split = elements.reshape(*elements.shape[:-1], self.steps, products)
        if self.dot.reverses_products:
            split = split[..., ::-1]
        # tile, kernel row, run, step, vector, lane, product
        ordered = split.transpose(0, 1, 4, 5, 6, 2, 3, 7)
        return ordered.reshape(-1, self.all_steps, self.tile.vectors, lanes, products).astype(self.dot.weight_dtype)

    @property
    def weight_elements(self) -> int:
        """Elements of the packed weights of one point."""
        return self.groups * self.blocks * self.tile_weights
