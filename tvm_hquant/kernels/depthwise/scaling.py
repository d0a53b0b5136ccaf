"""Scales and shifts per channel, between uint8 codes: depthwise layers with a window of one pixel, in vectors of bytes.

Such layers are what remains of a batch normalization that no layer before it can take (DenseNet, pre-activation ResNets) and of
slopes per channel. There is nothing to gather and nothing to add up: a code becomes a float32, as it is unpacked, by the
exponent bits beside it, and its product with the weight is exact, so that it is the sum that the contract scales. One short
loop over pixels and blocks of channels is all, which keeps compiling quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import STARTS, integer_array_types, pack_integer
from tvm_hquant.kernels.epilogues.packed_epilogue import PackedEpilogue, centred_floats, channel_order
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, input_place, kernel_function
from tvm_hquant.kernels.primitives import Expression, LlvmPrimitives
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import ARITHMETIC, flat, flat_loop, load
from tvm_hquant.kernels.word_vectors import GROUPS, CodeVectors, fitting_vectors
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Conv2D, Window


def scaling_kernel(
    request: KernelRequest,
    candidates: Sequence[CodeVectors],
    family: str,
    processor: Processor = ASSUMED_PROCESSOR,
) -> Kernel | None:
    """The kernel of a depthwise convolution of single pixels from uint8 to uint8 codes, with a residual or without.

    None for other windows and storages, and for fewer channels than a vector has bytes. ``candidates`` are the vectors that
    the instruction set has, of different widths.
    """
    conv = request.operator
    assert isinstance(conv, Conv2D)
    vectors = fitting_vectors(candidates, conv.in_channels)
    stored = {*request.inputs, request.output}
    is_plain = stored == {"uint8"} and request.weights == "int8" and request.weight_points == 1
    if not is_plain or conv.window != Window((1, 1)) or vectors is None:
        return None
    packing = _Packing(conv.in_channels, vectors)
    lanes = len(packing.channel_rows)
    types = integer_array_types(lanes, "float32", lanes, 1, 1, "int32")
    del types[STARTS]

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        arrays = list(pack_integer(constants, packing, 0, "int32"))
        del arrays[STARTS]  # the zero point is subtracted from the code
        return tuple(arrays)

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        _emit(request, packing, processor, inputs, arrays, output)

    name = f"{family}.depthwise_conv2d[scale {vectors.width}]"
    return Kernel(request, name, kernel_function(request, types, emit), pack)


@dataclass(frozen=True)
class _Packing:
    """Constants in blocks of a vector of bytes; the last block overlaps the one before it."""

    channels: int
    vectors: CodeVectors
    planes: int = 1
    points: int = 1

    @property
    def blocks(self) -> int:
        return -(-self.channels // self.vectors.width)

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Channel of every packed lane."""
        width = self.vectors.width
        order = channel_order(GROUPS, width, self.vectors.words).reshape(-1)
        return np.concatenate([min(block * width, self.channels - width) + order for block in range(self.blocks)])

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., channels] in the order of the lanes."""
        return np.ascontiguousarray(values[..., self.channel_rows])

    def pack_weights(self, weights: Array) -> Array:
        """[1, channels, 1, 1, 1] as float32, which holds them exactly."""
        return self.pack_channels(weights.reshape(-1)).astype(np.float32)


def _emit(
    request: KernelRequest,
    packing: _Packing,
    processor: Processor,
    inputs: Sequence[Buffer],
    arrays: Sequence[Buffer],
    output: Buffer,
) -> None:
    conv, vectors, channels = request.operator, packing.vectors, packing.channels
    assert isinstance(conv, Conv2D)
    weights, multipliers, offsets, limits, zero_points = arrays
    source, place = flat(inputs[0]), input_place(request, 0)
    residual = flat(inputs[1]) if conv.epilogue.has_residual else None
    epilogue = PackedEpilogue(vectors, residual, limits, zero_points, flat(output), request.ending)
    pixels, words = int(np.prod(conv.input_shape[:3])), vectors.words
    instructions = pixels * packing.blocks * GROUPS * ARITHMETIC
    with flat_loop(pixels, 1, work(request, instructions), processor) as pixel, T.serial(packing.blocks) as block:
        channel = T.bind(T.min(block * vectors.width, channels - vectors.width))
        codes = T.bind(load(source, pixel * place.channels + (channel + place.offset), vectors.width))
        values: list[Expression] = []
        for group, difference in enumerate(centred_floats(vectors, codes, zero_points[2])):
            at = block * vectors.width + group * words
            weight, multiplier, offset = (load(array, at, words) for array in (weights, multipliers, offsets))
            values.append(LlvmPrimitives().fma(difference * weight, multiplier, offset))
        epilogue.finish([values], [pixel * request.output_shape[-1] + request.output_offset + channel])
