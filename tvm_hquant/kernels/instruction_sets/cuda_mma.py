"""Integer convolutions and dense layers on NVIDIA's tensor cores: ``mma.sync`` of u8 and s8 codes, sums in int32.

A warp computes a tile of 16 or 32 pixels times 8 to 32 channels. Its 32 threads hold the operands of an ``mma`` among them:
16 pixels by 32 input channels, and 32 input channels by 8 output channels. Every thread loads its own part, so nothing goes
through shared memory; warps of a block have neighbouring channels of the same pixels, whose activations they find in the
first-level cache, and weights are packed in the order in which threads hold them. Sums of integers have one value in any
order, so the order in which the tensor core adds is of no account. It is for floats: their layers stay on the float pipe.

Which of the 32 channels of a step a thread holds is free as long as activations and weights agree: here they are eight
neighbours, two words, where NVIDIA's numbering would have them in two places.

Source: NVIDIA, PTX ISA, "Matrix Fragments for mma.m16n8k32" (integer types; sm_80 and later).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_geometry import as_conv2d
from tvm_hquant.kernels.cuda_convolution import (
    PRIMITIVES,
    WORD,
    ActivationWords,
    SumFinish,
    TileGeometry,
    integer_kernel,
    is_served,
    load_word,
)
from tvm_hquant.kernels.instruction_set import InstructionSet
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.operators import Conv2D, Dense

_WARP = 32
_WARPS = 4
"""Warps of a block."""
_ROWS, _COLUMNS, _DEPTH = 16, 8, 32
"""Pixels, output channels and input channels of an ``mma``."""
_MOST_ROWS, _MOST_COLUMNS = 2, 4
"""``mma`` of the largest tile: 32 sums in each thread."""
_SUMS = _ROWS * _COLUMNS // _WARP
_FEWEST_INPUTS = 16
"""With fewer input channels in a group most of a step would be multiplied by zero: ``dp4a`` takes four at a time."""
_FUNCTION = "hquant_mma_u8s8"
_DEFINITION = f"""
#ifndef HQUANT_MMA_U8S8
#define HQUANT_MMA_U8S8
static __device__ __forceinline__ void {_FUNCTION}(int *c, int a0, int a1, int a2, int a3, int b0, int b1) {{
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
               "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}}
#endif
"""


@dataclass(frozen=True)
class MmaGeometry(TileGeometry):
    """A convolution cut into the tiles of warps."""

    @property
    def steps(self) -> int:
        """``mma`` over the input channels of a group; channels that do not exist have weight 0."""
        return -(-self.group_inputs // _DEPTH)

    @property
    def columns(self) -> int:
        """``mma`` over the output channels of a tile."""
        return min(_MOST_COLUMNS, self.group_outputs // _COLUMNS)

    @property
    def channels(self) -> int:
        """Output channels of a tile."""
        return self.columns * _COLUMNS

    @property
    def rows(self) -> int:
        """``mma`` over the pixels of a tile."""
        return min(_MOST_ROWS, -(-self.positions // _ROWS))

    @property
    def warps(self) -> int:
        return -(-self.positions // (self.rows * _ROWS)) * self.conv.groups * self.blocks

    @property
    def weight_elements(self) -> int:
        """Elements of the packed weights of one point."""
        kh, kw = self.conv.window.kernel
        return len(self.channel_rows) * kh * kw * self.steps * _DEPTH

    def pack_weights(self, weights: Array) -> Array:
        """[points, out, in / groups, kh, kw] as point, tile, kernel row, kernel column, step, column, thread, byte; flat.

        Of a column's eight channels and a step's 32, thread 4·n + t holds channel n and inputs 8·t to 8·t + 7.
        """
        points, _, inputs, height, width = weights.shape
        pads = ((0, 0), (0, 0), (0, self.steps * _DEPTH - inputs), (0, 0), (0, 0))
        rows = np.pad(weights, pads)[:, self.channel_rows]
        split = rows.reshape(points, -1, self.columns, _COLUMNS, self.steps, 4, 2 * WORD, height, width)
        return np.ascontiguousarray(split.transpose(0, 1, 7, 8, 4, 2, 3, 5, 6).reshape(-1))


def mma_kernel(request: KernelRequest) -> Kernel | None:
    """The kernel for codes with int8 weights; None for others, and where a group has too few channels to fill a tile."""
    operator = request.operator
    if not is_served(request):
        return None
    assert isinstance(operator, (Conv2D, Dense))
    planes = 2 if request.inputs[0] == "uint16" else 1
    geometry = MmaGeometry(as_conv2d(operator), request.weight_points, planes)
    if geometry.group_outputs < _COLUMNS or geometry.group_inputs < _FEWEST_INPUTS:
        return None

    def write(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        _Warp(request, geometry, inputs, arrays, output).emit()

    return integer_kernel(request, geometry, 0, f"mma {geometry.rows * _ROWS}x{geometry.channels}", write)


@dataclass(frozen=True)
class _Place:
    """Where a thread is: the warp's tile of channels, and the thread's two numbers in the warp, lane // 4 and lane % 4."""

    tile: Expression
    group: Expression
    number: Expression
    quarter: Expression


@dataclass(frozen=True)
class _Warp:
    """Writes what a thread of a warp does."""

    request: KernelRequest
    geometry: MmaGeometry
    inputs: Sequence[Buffer]
    arrays: Sequence[Buffer]
    output: Buffer

    def emit(self) -> None:
        geometry = self.geometry
        warps = min(_WARPS, geometry.warps)
        grid = -(-geometry.warps // warps)
        block_loop = T.thread_binding(0, grid, thread="blockIdx.x")
        thread_loop = T.thread_binding(0, warps * _WARP, thread="threadIdx.x")
        with block_loop as block, thread_loop as thread, T.attr(0, "pragma_import_c", _DEFINITION):
            warp, lane = block * warps + thread // _WARP, thread % _WARP
            if geometry.warps % warps == 0:
                self._tile(warp, lane)
                return
            # The same for all threads of a warp: they must be together at every mma.
            with T.If(warp < geometry.warps), T.Then():
                self._tile(warp, lane)

    def _tile(self, warp: Expression, lane: Expression) -> None:
        geometry = self.geometry
        tiles = geometry.conv.groups * geometry.blocks
        tile = T.bind(warp % tiles)
        place = _Place(tile, T.bind(tile // geometry.blocks), T.bind(lane // 4), T.bind(lane % 4))
        first_position = warp // tiles * (geometry.rows * _ROWS)
        # A thread has two pixels of every 16. Positions beyond the last one repeat it: they store the same value once more.
        positions = [
            T.bind(T.min(first_position + row * _COLUMNS + place.number, geometry.positions - 1))
            for row in range(2 * geometry.rows)
        ]
        keys = [(row, column) for row in range(geometry.rows) for column in range(geometry.columns)]
        sums = {key: T.alloc_buffer((_SUMS,), "int32", scope="local") for key in keys}
        values = {key: T.alloc_buffer((_SUMS,), "float32", scope="local") for key in keys}
        _, starts, multipliers, offsets, _, _ = self.arrays
        lanes, first = len(geometry.channel_rows), tile * geometry.channels

        def channel(column: int, element: int) -> Expression:
            return column * _COLUMNS + place.quarter * 2 + element % 2

        elements = [(key, element) for key in keys for element in range(_SUMS)]
        for key, element in elements:
            T.buffer_store(values[key], offsets[first + channel(key[1], element)], [element])
        # In the contract's order: points ascending, within a point the low plane before the high one.
        for number in range(geometry.points * geometry.planes):
            base = number * lanes + first
            for key, element in elements:
                T.buffer_store(sums[key], starts[base + channel(key[1], element)], [element])
            self._accumulate(sums, positions, place, *divmod(number, geometry.planes))
            for key, element in elements:
                multiplier = multipliers[base + channel(key[1], element)]
                scaled = PRIMITIVES.fma(T.Cast("float32", sums[key][element]), multiplier, values[key][element])
                T.buffer_store(values[key], scaled, [element])
        block = tile % geometry.blocks * geometry.channels
        start = T.bind(T.min(block, geometry.group_outputs - geometry.channels))
        end = SumFinish(self.request, geometry.conv, self.arrays, self.inputs[-1], self.output)
        for (row, column), element in elements:
            position = positions[2 * row + element // 2]
            end.finish(values[row, column][element], position, place.group, start + channel(column, element))

    def _accumulate(
        self,
        sums: Mapping[tuple[int, int], Buffer],
        positions: Sequence[Expression],
        place: _Place,
        point: int,
        plane: int,
    ) -> None:
        """Adds the products of one point with one byte plane to the sums."""
        geometry = self.geometry
        kh, kw = geometry.conv.window.kernel
        words = ActivationWords(geometry.conv, geometry.planes, self.inputs[0], self.arrays[5])
        padding = T.bind(words.padding(plane))
        step_bytes = geometry.columns * _COLUMNS * _DEPTH
        base = T.bind(place.tile * (kh * kw * geometry.steps * step_bytes) + point * geometry.weight_elements)
        loaded = [[T.alloc_buffer((1,), "int32", scope="local") for _ in range(2)] for _ in positions]
        weights = [[T.alloc_buffer((1,), "int32", scope="local") for _ in range(2)] for _ in range(geometry.columns)]
        with T.serial(kh) as ky, T.serial(kw) as kx, T.serial(geometry.steps) as step:
            for position, pair in zip(positions, loaded, strict=True):
                for half, cell in enumerate(pair):
                    word = step * (_DEPTH // WORD) + place.quarter * 2 + half
                    if geometry.words % (_DEPTH // WORD):
                        # Words behind the last one have weight 0.
                        word = T.min(word, geometry.words - 1)
                    value = words.read(position, (ky, kx), (place.group, word), plane, padding)
                    T.buffer_store(cell, value, [0])
            at = base + ((ky * kw + kx) * geometry.steps + step) * step_bytes
            for column, pair in enumerate(weights):
                thread = at + column * (_COLUMNS * _DEPTH) + (place.number * 4 + place.quarter) * (2 * WORD)
                for half, cell in enumerate(pair):
                    T.buffer_store(cell, load_word(self.arrays[0], thread + half * WORD), [0])
            for (row, column), total in sums.items():
                upper, lower = loaded[2 * row], loaded[2 * row + 1]
                operands = [upper[0][0], lower[0][0], upper[1][0], lower[1][0]]
                columns = [cell[0] for cell in weights[column]]
                T.evaluate(T.call_extern("int32", _FUNCTION, T.address_of(total[0]), *operands, *columns))


@dataclass(frozen=True)
class MmaFamily:
    """Tensor cores for integer convolutions and dense layers; other layers are left to the next family."""

    name: str = "cuda_mma"

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request, or None."""
        return mma_kernel(request)


INSTRUCTION_SET = InstructionSet((MmaFamily(),), target_kind="cuda", first_gpu=80)
