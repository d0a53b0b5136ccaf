"""Products of a map of uint8 codes and one factor for each channel, as squeeze-and-excitation makes them, in vectors of bytes.

The factors become float32 once. A code becomes float32 as it is unpacked, by the exponent bits beside it, and the product of
both is exact, so that it is the one that the contract scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.epilogues.packed_epilogue import PackedEpilogue, centred_floats
from tvm_hquant.kernels.interface import (
    Array,
    IntegerElementwiseConstants,
    Kernel,
    KernelRequest,
    LayerConstants,
    Placement,
)
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, input_place, kernel_function
from tvm_hquant.kernels.primitives import Expression, broadcast
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import (
    ARITHMETIC,
    fitting_lanes,
    flat,
    flat_loop,
    load,
    store,
    vector_loop,
    vectors,
)
from tvm_hquant.kernels.weightless.elementwise import Pack, pack_only
from tvm_hquant.kernels.word_vectors import GROUPS, CodeVectors, fitting_vectors
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Multiply

_TYPES: tuple[ArrayType, ...] = (((1,), "float32"), ((2,), "float32"), ((3,), "int32"))

_TOGETHER = (1, 2, 4, 8)
"""Pixels that are taken as one."""


def gating_kernel(
    request: KernelRequest, candidates: Sequence[CodeVectors], processor: Processor = ASSUMED_PROCESSOR
) -> Kernel | None:
    """None for other operators, shapes and storages, and for fewer channels than a vector has bytes, of one pixel or of some.

    ``candidates`` are the vectors that the instruction set has.
    """
    operator = request.operator
    if not isinstance(operator, Multiply) or {*request.inputs, request.output} != {"uint8"}:
        return None
    gated = _gated_input(operator)
    if gated is None:
        return None
    together = _pixels_together(request, 1 - gated, max((v.width for v in candidates), default=1))
    fitting = fitting_vectors(candidates, together * operator.output_shape[-1])
    if fitting is None:
        return None
    gate = _Gate(request, gated, fitting, together, processor)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        gate.emit(inputs, constants, output)

    return Kernel(
        request, f"common.multiply[gate {gate.vectors.width}]", kernel_function(request, _TYPES, emit), _pack(request)
    )


def _gated_input(operator: Multiply) -> int | None:
    """Which input has all elements of the output where the other has one for each channel, and image or none."""
    shape = operator.output_shape
    for full, gate in ((0, 1), (1, 0)):
        if operator.input_shapes[full] == shape and len(shape) > 1:
            own = (1,) * (len(shape) - len(operator.input_shapes[gate])) + operator.input_shapes[gate]
            if own[-1] == shape[-1] and own[0] in (1, shape[0]) and prod(own[1:-1]) == 1:
                return full
    return None


def _pixels_together(request: KernelRequest, gate: int, width: int) -> int:
    """Pixels that are taken as one with so many times the channels, where these then fill vectors of ``width`` bytes.

    One where none do, and where pixels do not lie side by side.
    """
    operator = request.operator
    assert isinstance(operator, Multiply)
    images, channels = prod(operator.input_shapes[gate]) // operator.output_shape[-1], operator.output_shape[-1]
    pixels = prod(operator.output_shape[:-1]) // images
    counts = (count for count in _TOGETHER if pixels % count == 0 and count * channels % width == 0)
    return 1 if request.sources else next(counts, 1)


def _pack(request: KernelRequest) -> Pack:
    """Multiplier, bounds, and the zero points of output, first and second input."""
    plain = pack_only(request, IntegerElementwiseConstants)

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        multiplier, bounds, zero_points = plain(constants)
        return multiplier, bounds, np.roll(zero_points, 1)

    return pack


@dataclass(frozen=True)
class _Gate:
    request: KernelRequest
    gated: int
    vectors: CodeVectors
    together: int
    processor: Processor

    @property
    def channels(self) -> int:
        """Of the pixels that are taken as one."""
        return self.together * self.request.operator.output_shape[-1]

    @property
    def blocks(self) -> int:
        """Of channels; the last one overlaps the one before it."""
        return vectors(self.channels, self.vectors.width)

    def channel(self, block: Expression) -> Expression:
        """The first one of a block."""
        return T.bind(T.min(block * self.vectors.width, self.channels - self.vectors.width))

    def emit(self, inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        """Writes the loops: over the factors, then over pixels and blocks of channels."""
        multiplier, limits, zero_points = constants
        operator = self.request.operator
        assert isinstance(operator, Multiply)
        of_map, of_gate = input_place(self.request, self.gated), input_place(self.request, 1 - self.gated)
        codes, factors, words = flat(inputs[self.gated]), flat(inputs[1 - self.gated]), self.vectors.words
        images = prod(operator.input_shapes[1 - self.gated]) // operator.output_shape[-1]
        pixels = prod(operator.output_shape[:-1]) // self.together
        lanes = self.blocks * self.vectors.width
        if self.together > 1:
            factors = self._repeated(factors, images)
            of_gate = Placement(0, self.channels)
        gates = T.alloc_buffer((images * lanes,), "float32")
        with T.serial(images) as image, T.serial(self.blocks) as block:
            place = image * of_gate.channels + self.channel(block) + of_gate.offset
            stored = load(factors, place, self.vectors.width)
            values = centred_floats(self.vectors, T.bind(stored), zero_points[2 - self.gated])
            for group, value in enumerate(values):
                store(gates, image * lanes + block * self.vectors.width + group * words, value, words)
        epilogue = PackedEpilogue(self.vectors, None, limits, zero_points, flat(output), self.request.ending)
        scale = broadcast(multiplier[0], words)
        in_all = work(self.request, pixels * self.blocks * GROUPS * ARITHMETIC)
        with flat_loop(pixels, 1, in_all, self.processor) as pixel, T.serial(self.blocks) as block:
            channel = self.channel(block)
            image = pixel // (pixels // images) if images > 1 else 0
            place = pixel * (self.together * of_map.channels) + channel + of_map.offset
            stored = T.bind(load(codes, place, self.vectors.width))
            values = []
            for group, value in enumerate(centred_floats(self.vectors, stored, zero_points[1 + self.gated])):
                gate = load(gates, image * lanes + block * self.vectors.width + group * words, words)
                values.append(value * gate * scale)
            epilogue.finish([values], [T.bind(pixel * self.channels + channel)])

    def _repeated(self, factors: Buffer, images: int) -> Buffer:
        """The factors of each image once for every pixel that is taken with it."""
        channels = self.request.operator.output_shape[-1]
        repeated = T.alloc_buffer((images * self.channels,), "uint8")
        lanes = fitting_lanes(channels, self.vectors.width)
        with T.serial(images) as image, vector_loop(channels, lanes) as channel:
            stored = T.bind(load(factors, image * channels + channel, lanes))
            for copy in range(self.together):
                store(repeated, image * self.channels + copy * channels + channel, stored, lanes)
        return repeated
