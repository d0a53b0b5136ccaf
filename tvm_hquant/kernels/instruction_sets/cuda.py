"""Integer convolutions and dense layers for CUDA by ``__dp4a``, which adds four products of signed bytes to an int32.

Every thread keeps a tile of some pixels times some output channels in registers. For every kernel position and every four input
channels it loads a word of activations for each pixel and a word of weights for each channel, and multiplies all with
all. Neighbouring threads have neighbouring channels: a warp reads few words of activations and a row of weights. Nothing passes
between threads, so there is neither shared memory nor a barrier; the first-level cache holds what threads have in common.

Source: NVIDIA, CUDA Math API, ``__dp4a`` (compute capability 6.1 and later). Activations are stored as uint8: flipping the top
bit makes them signed, smaller by 128.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from tvm_hquant.kernels.reference import ReferenceFamily
from tvm_hquant.operators import Conv2D, Dense

_OFFSET = -128
_TOP_BITS = 0x80808080 - 2**32
_THREADS = 128
"""Threads of a block: four warps, which hide each other's loads."""
_PIXELS = 4
_CHANNELS = 8
"""The largest tile: 32 sums, 4 words of activations, 8 of weights."""


@dataclass(frozen=True)
class Dp4aGeometry(TileGeometry):
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
    def threads(self) -> int:
        """Threads that have a tile."""
        return -(-self.positions // self.pixels) * self.conv.groups * self.blocks

    @property
    def weight_elements(self) -> int:
        """Elements of the packed weights of one point."""
        kh, kw = self.conv.window.kernel
        return len(self.channel_rows) * kh * kw * self.words * WORD

    def pack_weights(self, weights: Array) -> Array:
        """[points, out, in / groups, kh, kw] as point, tile, kernel row, kernel column, word, channel, byte; flat."""
        points, _, inputs, height, width = weights.shape
        pads = ((0, 0), (0, 0), (0, self.words * WORD - inputs), (0, 0), (0, 0))
        rows = np.pad(weights, pads)[:, self.channel_rows]
        split = rows.reshape(points, -1, self.channels, self.words, WORD, height, width)
        return np.ascontiguousarray(split.transpose(0, 1, 5, 6, 3, 2, 4).reshape(-1))


def dp4a_kernel(request: KernelRequest) -> Kernel | None:
    """The kernel for codes with int8 weights; None for others, and for depthwise layers, where no word serves two sums."""
    operator = request.operator
    if not is_served(request):
        return None
    assert isinstance(operator, (Conv2D, Dense))
    planes = 2 if request.inputs[0] == "uint16" else 1
    geometry = Dp4aGeometry(as_conv2d(operator), request.weight_points, planes)

    def write(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        _Thread(request, geometry, inputs, arrays, output).emit()

    return integer_kernel(request, geometry, _OFFSET, f"dp4a {geometry.pixels}x{geometry.channels}", write)


@dataclass(frozen=True)
class _Thread:
    """Writes what a thread does."""

    request: KernelRequest
    geometry: Dp4aGeometry
    inputs: Sequence[Buffer]
    arrays: Sequence[Buffer]
    output: Buffer

    def emit(self) -> None:
        geometry = self.geometry
        size = min(_THREADS, geometry.threads)
        grid = -(-geometry.threads // size)
        blocks, lanes = T.thread_binding(0, grid, thread="blockIdx.x"), T.thread_binding(0, size, thread="threadIdx.x")
        with blocks as block, lanes as lane:
            number = block * size + lane
            if geometry.threads % size == 0:
                self._tile(number)
                return
            with T.If(number < geometry.threads), T.Then():
                self._tile(number)

    def _tile(self, number: Expression) -> None:
        geometry, conv = self.geometry, self.geometry.conv
        tiles = conv.groups * geometry.blocks
        tile = T.bind(number % tiles)
        # Positions beyond the last one repeat it: they store the same value once more.
        positions = [
            T.bind(T.min(number // tiles * geometry.pixels + i, geometry.positions - 1)) for i in range(geometry.pixels)
        ]
        places = [(i, j) for i in range(geometry.pixels) for j in range(geometry.channels)]
        values = {place: T.alloc_buffer((1,), "float32", scope="local") for place in places}
        sums = {place: T.alloc_buffer((1,), "int32", scope="local") for place in places}
        _, starts, multipliers, offsets, _, _ = self.arrays
        lanes, first = len(geometry.channel_rows), tile * geometry.channels
        for place, value in values.items():
            T.buffer_store(value, offsets[first + place[1]], [0])
        # In the contract's order: points ascending, within a point the low plane before the high one.
        for number_of_pass in range(geometry.points * geometry.planes):
            base = number_of_pass * lanes + first
            for place, total in sums.items():
                T.buffer_store(total, starts[base + place[1]], [0])
            self._accumulate(sums, positions, tile, *divmod(number_of_pass, geometry.planes))
            for place, total in sums.items():
                multiplier = multipliers[base + place[1]]
                scaled = PRIMITIVES.fma(T.Cast("float32", total[0]), multiplier, values[place][0])
                T.buffer_store(values[place], scaled, [0])
        block = tile % geometry.blocks * geometry.channels
        start = T.bind(T.min(block, geometry.group_outputs - geometry.channels))
        group = T.bind(tile // geometry.blocks)
        end = SumFinish(self.request, conv, self.arrays, self.inputs[-1], self.output)
        for i, j in places:
            end.finish(values[i, j][0], positions[i], group, start + j)

    def _accumulate(
        self,
        sums: dict[tuple[int, int], Buffer],
        positions: Sequence[Expression],
        tile: Expression,
        point: int,
        plane: int,
    ) -> None:
        """Adds the products of one point with one byte plane to the sums."""
        geometry = self.geometry
        kh, kw = geometry.conv.window.kernel
        words = ActivationWords(geometry.conv, geometry.planes, self.inputs[0], self.arrays[5], _TOP_BITS)
        padding = T.bind(words.padding(plane))
        tile_bytes = kh * kw * geometry.words * geometry.channels * WORD
        base = T.bind(tile * tile_bytes + point * geometry.weight_elements)
        activations = [T.alloc_buffer((1,), "int32", scope="local") for _ in positions]
        with T.serial(kh) as ky, T.serial(kw) as kx, T.serial(geometry.words) as word:
            for position, activation in zip(positions, activations, strict=True):
                value = words.read(position, (ky, kx), (tile // geometry.blocks, word), plane, padding)
                T.buffer_store(activation, value, [0])
            at = base + ((ky * kw + kx) * geometry.words + word) * (geometry.channels * WORD)
            for j in range(geometry.channels):
                weight = T.alloc_buffer((1,), "int32", scope="local")
                T.buffer_store(weight, load_word(self.arrays[0], at + j * WORD), [0])
                for i, activation in enumerate(activations):
                    total = T.call_pure_extern("int32", "__dp4a", activation[0], weight[0], sums[i, j][0])
                    T.buffer_store(sums[i, j], total, [0])


@dataclass(frozen=True)
class Dp4aFamily:
    """``__dp4a`` for integer convolutions and dense layers; other layers are left to the next family."""

    name: str = "cuda"

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request, or None."""
        return dp4a_kernel(request)


INSTRUCTION_SET = InstructionSet((Dp4aFamily(), ReferenceFamily("cuda")), target_kind="cuda", first_gpu=61)
