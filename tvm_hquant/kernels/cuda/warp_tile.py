"""Tiles of CUDA's warps, multiplied by tensor cores: 16 or 32 pixels times 8 to 32 output channels.

The 32 threads of a warp hold the operands of an ``mma`` among them: 16 pixels by a step of input channels, and that step by 8
output channels. Every thread loads its own part, so nothing goes through shared memory; warps of a block have neighbouring
channels of the same pixels, whose activations they find in the first-level cache, and weights are packed in the order in which
threads hold them.

In words of 32 bits all of these instructions look alike, whatever is in a word. Which words of a step a thread holds is free as
long as activations and weights agree: here they are neighbours, where NVIDIA's numbering would have them in two places.

Source: NVIDIA, PTX ISA, "Matrix Fragments for mma.m16n8k32" (integer types), "… for mma.m16n8k16" and "… for mma.m16n8k8"
(16-bit floats).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.cuda.activations import Activations, load_word
from tvm_hquant.kernels.cuda.convolution import Cell, Tile, TileGeometry, TileSum, register
from tvm_hquant.kernels.interface import Array
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression

_WARP = 32
_WARPS = 4
"""Warps of a block."""
ROWS, COLUMNS = 16, 8
"""Pixels and output channels of an ``mma``."""
_MOST_ROWS, _MOST_COLUMNS = 2, 4
"""``mma`` of the largest tile: 32 sums in each thread."""
_SUMS = ROWS * COLUMNS // _WARP
_QUARTERS = 4
"""Threads that share a pixel's words, and a channel's."""


@dataclass(frozen=True)
class MatrixInstruction:
    """An ``mma`` of 16 pixels by 8 output channels.

    Attributes:
        name: what stands after ``mma.sync.aligned.`` in PTX.
        word: input channels in a word.
        step: input channels of the instruction.
        accumulator: dtype of the sums.
    """

    name: str
    word: int
    step: int
    accumulator: str

    @property
    def held(self) -> int:
        """Words of a step that a thread holds of a pixel, and of an output channel."""
        return self.step // self.word // _QUARTERS

    @property
    def function(self) -> str:
        """Name of the function in C that executes it."""
        return f"hquant_mma_{self.name.replace('.', '_')}"

    @property
    def definition(self) -> str:
        """That function: it adds to four sums in memory, which the compiler keeps in registers."""
        dtype, constraint = ("int", "r") if self.accumulator == "int32" else ("float", "f")
        operands = [f"a{i}" for i in range(2 * self.held)] + [f"b{i}" for i in range(self.held)]
        numbers = iter(range(4 + len(operands)))
        total, first, second = (
            f"{{{', '.join(f'%{next(numbers)}' for _ in range(count))}}}" for count in (4, 2 * self.held, self.held)
        )
        sums = ", ".join(f'"+{constraint}"(c[{i}])' for i in range(4))
        given = ", ".join(f'"r"({name})' for name in operands)
        guard = self.function.upper()
        return (
            f"\n#ifndef {guard}\n#define {guard}\n"
            f"static __device__ __forceinline__ void {self.function}({dtype} *c, int {', int '.join(operands)}) {{\n"
            f'  asm volatile("mma.sync.aligned.{self.name} {total}, {first}, {second}, {total};"\n'
            f"               : {sums}\n               : {given});\n}}\n#endif\n"
        )


@dataclass(frozen=True)
class WarpGeometry(TileGeometry):
    """A convolution cut into the tiles of warps; ``step`` input channels are multiplied by an ``mma``."""

    step: int

    @property
    def steps(self) -> int:
        """``mma`` over the input channels of a group; channels that do not exist have weight 0."""
        return -(-self.group_inputs // self.step)

    @property
    def columns(self) -> int:
        """``mma`` over the output channels of a tile."""
        return min(_MOST_COLUMNS, self.group_outputs // COLUMNS)

    @property
    def channels(self) -> int:
        """Output channels of a tile."""
        return self.columns * COLUMNS

    @property
    def rows(self) -> int:
        """``mma`` over the pixels of a tile."""
        return min(_MOST_ROWS, -(-self.positions // ROWS))

    @property
    def warps(self) -> int:
        return -(-self.positions // (self.rows * ROWS)) * self.conv.groups * self.blocks

    @property
    def weight_elements(self) -> int:
        kh, kw = self.conv.window.kernel
        return len(self.channel_rows) * kh * kw * self.steps * self.step

    def pack_weights(self, weights: Array) -> Array:
        """[points, out, in / groups, kh, kw] as point, tile, kernel row, kernel column, step, column, thread, element; flat.

        Of a column's eight channels and a step's inputs, thread 4·n + t holds channel n and the t-th quarter of the inputs.
        """
        points, _, inputs, height, width = weights.shape
        pads = ((0, 0), (0, 0), (0, self.steps * self.step - inputs), (0, 0), (0, 0))
        rows = np.pad(weights, pads)[:, self.channel_rows]
        quarter = self.step // _QUARTERS
        split = rows.reshape(points, -1, self.columns, COLUMNS, self.steps, _QUARTERS, quarter, height, width)
        return np.ascontiguousarray(split.transpose(0, 1, 7, 8, 4, 2, 3, 5, 6).reshape(-1))


@dataclass(frozen=True)
class WarpTiles:
    """Writes the warps of a kernel: ``weights`` are packed by its geometry."""

    geometry: WarpGeometry
    instruction: MatrixInstruction
    activations: Activations
    weights: Buffer

    def launch(self, body: Callable[[Tile], None]) -> None:
        """Binds blocks and threads, and calls ``body`` with a thread's part of its warp's tile."""
        geometry = self.geometry
        warps = min(_WARPS, geometry.warps)
        grid = -(-geometry.warps // warps)
        block_loop = T.thread_binding(0, grid, thread="blockIdx.x")
        thread_loop = T.thread_binding(0, warps * _WARP, thread="threadIdx.x")
        with block_loop as block, thread_loop as thread, T.attr(0, "pragma_import_c", self.instruction.definition):
            warp, lane = block * warps + thread // _WARP, thread % _WARP
            if geometry.warps % warps == 0:
                body(self._tile(warp, lane))
                return
            # The same for all threads of a warp: they must be together at every mma.
            with T.If(warp < geometry.warps), T.Then():
                body(self._tile(warp, lane))

    def _tile(self, warp: Expression, lane: Expression) -> Tile:
        geometry = self.geometry
        tiles = geometry.conv.groups * geometry.blocks
        tile = T.bind(warp % tiles)
        number, quarter = T.bind(lane // _QUARTERS), T.bind(lane % _QUARTERS)
        first_position = warp // tiles * (geometry.rows * ROWS)
        # A thread has two pixels of every 16. Positions beyond the last one repeat it: they store the same value once more.
        positions = [
            T.bind(T.min(first_position + row * COLUMNS + number, geometry.positions - 1))
            for row in range(2 * geometry.rows)
        ]
        block = tile % geometry.blocks * geometry.channels
        start = T.bind(T.min(block, geometry.group_outputs - geometry.channels))
        return _WarpTile(self, tile, T.bind(tile // geometry.blocks), number, quarter, positions, start)


@dataclass(frozen=True)
class _WarpTile:
    """A thread's part of its warp's tile.

    Attributes:
        written: what is written.
        tile: number of the tile of channels.
        group: group of these channels.
        number, quarter: the thread's two numbers in the warp, lane // 4 and lane % 4.
        positions: the thread's pixels.
        start: first channel of the tile within its group.
    """

    written: WarpTiles
    tile: Expression
    group: Expression
    number: Expression
    quarter: Expression
    positions: Sequence[Expression]
    start: Expression

    @property
    def _products(self) -> Sequence[tuple[int, int]]:
        """Row and column of every ``mma`` of a step."""
        geometry = self.written.geometry
        return [(row, column) for row in range(geometry.rows) for column in range(geometry.columns)]

    @property
    def sums(self) -> Sequence[TileSum]:
        """The four of every ``mma``: two neighbouring channels of one pixel, then of another."""
        found = []
        for row, column in self._products:
            for element in range(_SUMS):
                channel = column * COLUMNS + self.quarter * 2 + element % 2
                lane = self.tile * self.written.geometry.channels + channel
                found.append(TileSum(self.positions[2 * row + element // 2], lane, self.start + channel))
        return found

    def registers(self, dtype: str) -> Sequence[Cell]:
        buffers = [T.alloc_buffer((_SUMS,), dtype, scope="local") for _ in self._products]
        return [Cell(buffer, element) for buffer in buffers for element in range(_SUMS)]

    def accumulate(self, totals: Sequence[Cell], point: int, plane: int) -> None:
        geometry, source, held = self.written.geometry, self.written.activations, self.written.instruction.held
        kh, kw = geometry.conv.window.kernel
        padding = T.bind(source.padding(plane))
        step_elements = geometry.channels * geometry.step
        base = T.bind(self.tile * (kh * kw * geometry.steps * step_elements) + point * geometry.weight_elements)
        loaded = [[register("int32") for _ in range(held)] for _ in self.positions]
        weights = [[register("int32") for _ in range(held)] for _ in range(geometry.columns)]
        with T.serial(kh) as ky, T.serial(kw) as kx, T.serial(geometry.steps) as step:
            for position, words in zip(self.positions, loaded, strict=True):
                for k, cell in enumerate(words):
                    word = step * (held * _QUARTERS) + self.quarter * held + k
                    cell.store(self._activations(position, (ky, kx), word, plane, padding))
            at = base + ((ky * kw + kx) * geometry.steps + step) * step_elements
            for column, words in enumerate(weights):
                thread = at + (column * _WARP + self.number * _QUARTERS + self.quarter) * (held * geometry.word)
                for k, cell in enumerate(words):
                    cell.store(load_word(self.written.weights, thread + k * geometry.word, geometry.word))
            for i, (row, column) in enumerate(self._products):
                operands = [
                    cell.value for pair in zip(loaded[2 * row], loaded[2 * row + 1], strict=True) for cell in pair
                ]
                operands += [cell.value for cell in weights[column]]
                total = T.address_of(totals[i * _SUMS].value)
                T.evaluate(T.call_extern("int32", self.written.instruction.function, total, *operands))

    def _activations(
        self,
        position: Expression,
        tap: tuple[Expression, Expression],
        word: Expression,
        plane: int,
        padding: Expression,
    ) -> Expression:
        geometry, source = self.written.geometry, self.written.activations
        if geometry.steps * geometry.step == geometry.words * geometry.word:
            return source.read(position, tap, (self.group, word), plane, padding)
        # Words behind the last one have weight 0.
        value = source.read(position, tap, (self.group, T.min(word, geometry.words - 1)), plane, padding)
        return T.Select(word < geometry.words, value, T.int32(0)) if source.ends_in_zeros else value
