"""What the CUDA kernels of integer convolutions have in common: tiles, how activations are read, and how a sum ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import integer_array_types, pack_integer
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, kernel_function
from tvm_hquant.kernels.primitives import CudaPrimitives, Expression, centred, clamp, convert, narrow, requantize
from tvm_hquant.kernels.vector_loops import flat
from tvm_hquant.operators import Conv2D, Dense

WORD = 4
"""Bytes that are read and multiplied at once."""
_EVERY_BYTE = 0x01010101
PRIMITIVES = CudaPrimitives(in_blocks=False)
"""Arithmetic of kernels that bind their threads themselves."""


def load_word(buffer: Buffer, index: Any) -> Expression:
    """Four bytes from an index that is a multiple of four, as int32."""
    return T.reinterpret("int32", buffer.vload([index], f"{buffer.dtype}x{WORD}"))


@dataclass(frozen=True)
class TileGeometry(ABC):
    """A convolution cut into tiles of pixels times output channels; packs its constants (``anchor_constants.ChannelPacking``).

    Attributes:
        conv: the convolution; dense layers are 1×1 ones.
        points: weight tensors.
        planes: byte planes of the activations.
    """

    conv: Conv2D
    points: int
    planes: int

    @property
    def group_inputs(self) -> int:
        return self.conv.in_channels // self.conv.groups

    @property
    def group_outputs(self) -> int:
        return self.conv.out_channels // self.conv.groups

    @property
    def words(self) -> int:
        """Words of input channels of a group; bytes that lie behind the last channel have weight 0."""
        return -(-self.group_inputs // WORD)

    @property
    @abstractmethod
    def channels(self) -> int:
        """Output channels of a tile."""

    @property
    def blocks(self) -> int:
        """Tiles over the output channels of a group; the last one overlaps the one before it."""
        return -(-self.group_outputs // self.channels)

    @property
    def output_size(self) -> tuple[int, int]:
        return self.conv.window.output_size(*self.conv.input_shape[1:3])

    @property
    def positions(self) -> int:
        """Output pixels of all images."""
        height, width = self.output_size
        return self.conv.input_shape[0] * height * width

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Output channel of every packed channel, [groups · blocks · channels]."""
        starts = np.minimum(np.arange(self.blocks) * self.channels, self.group_outputs - self.channels)
        within = (starts[:, None] + np.arange(self.channels)).reshape(-1)
        return (np.arange(self.conv.groups)[:, None] * self.group_outputs + within).reshape(-1)

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., out_channels] in the order of the tiles."""
        return np.ascontiguousarray(values[..., self.channel_rows])

    @property
    @abstractmethod
    def weight_elements(self) -> int:
        """Elements of the packed weights of one point."""

    @abstractmethod
    def pack_weights(self, weights: Array) -> Array:
        """[points, out, in / groups, kh, kw] in the order in which the kernel reads them, flat."""


def integer_kernel(
    request: KernelRequest,
    geometry: TileGeometry,
    operand_offset: int,
    name: str,
    write: Callable[[Sequence[Buffer], Sequence[Buffer], Buffer], None],
) -> Kernel:
    """A kernel that binds its threads itself.

    Args:
        request: codes with int8 weights.
        geometry: packs its constants.
        operand_offset: what is added to the codes that it multiplies.
        name: what the tiles are called in reports.
        write: writes the body for flat inputs, arrays and output.
    """
    lanes, passes = len(geometry.channel_rows), geometry.points * geometry.planes
    count = geometry.weight_elements * geometry.points
    types = integer_array_types(count, "int8", lanes, passes, geometry.planes, "int32")

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        return pack_integer(constants, geometry, operand_offset, "int32")

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        write([flat(b) for b in inputs], arrays, flat(output))

    function = kernel_function(request, types, emit).with_attr("tirx.is_scheduled", True)
    return Kernel(request, f"cuda.conv2d[{name}]", function, pack)


@dataclass(frozen=True)
class ActivationWords:
    """Reads four neighbouring channels of a pixel as the bytes of an int32.

    Attributes:
        conv: the convolution.
        planes: byte planes of the activations: 2 for uint16 codes.
        source: flat activations.
        zero_points: int32 [output, residual, planes…].
        flip: bits that are inverted in every word.
    """

    conv: Conv2D
    planes: int
    source: Buffer
    zero_points: Buffer
    flip: int = 0

    @property
    def _group_inputs(self) -> int:
        return self.conv.in_channels // self.conv.groups

    def padding(self, plane: int) -> Expression:
        """The word that padding holds."""
        return self._flipped(self.zero_points[2 + plane] * T.int32(_EVERY_BYTE))

    def read(
        self,
        position: Expression,
        tap: tuple[Expression, Expression],
        channel: tuple[Expression, Expression],
        plane: int,
        padding: Expression,
    ) -> Expression:
        """The word for an output pixel.

        Args:
            position: of the output pixel, counted over all images.
            tap: row and column of the kernel.
            channel: the group, and the number of the word in it. Bytes behind the group's last channel are unspecified.
            plane: of the activations.
            padding: what :meth:`padding` gives for it.
        """
        _, height, width, channels = self.conv.input_shape
        window = self.conv.window
        out_height, out_width = window.output_size(height, width)
        top, left, _, _ = window.padding
        row = position // out_width % out_height * window.strides[0] + tap[0] * window.dilation[0] - top
        column = position % out_width * window.strides[1] + tap[1] * window.dilation[1] - left
        image, (group, word) = position // (out_height * out_width), channel
        at = ((image * height + row) * width + column) * channels + group * self._group_inputs + word * WORD
        value = self._flipped(self._load(at, word, plane))
        if not any(window.padding):
            return value
        exists = T.And(T.And(row >= 0, row < height), T.And(column >= 0, column < width))
        return T.if_then_else(exists, value, padding)

    def _load(self, at: Expression, word: Expression, plane: int) -> Expression:
        if self._group_inputs % WORD == 0 and self.planes == 1:
            return load_word(self.source, at)
        # Bytes behind the last channel have weight 0; those behind the last element do not exist.
        last = self._group_inputs - 1 - word * WORD
        parts = [T.Cast("int32", self.source[at + T.min(byte, last)]) for byte in range(WORD)]
        if self.planes == 2:
            parts = [part >> T.int32(8) if plane else part & T.int32(255) for part in parts]
        value = parts[0]
        for byte, part in enumerate(parts[1:], 1):
            value = value | (part << T.int32(8 * byte))
        return value

    def _flipped(self, word: Expression) -> Expression:
        return word ^ T.int32(self.flip) if self.flip else word


@dataclass(frozen=True)
class SumFinish:
    """The end of a sum: residual, clamp, rounding, store.

    ``conv`` is what the kernel computes; ``arrays`` are those of ``anchor_constants.integer_array_types``; ``residual`` is read
    if the operator has one.
    """

    request: KernelRequest
    conv: Conv2D
    arrays: Sequence[Buffer]
    residual: Buffer
    output: Buffer

    def finish(self, value: Expression, position: Expression, group: Expression, within: Expression) -> None:
        """Finishes the float32 value of an output pixel, counted over all images, and a channel of a group."""
        p, request, limits, zero_points = PRIMITIVES, self.request, self.arrays[4], self.arrays[5]
        groups, outputs = self.conv.groups, self.conv.out_channels // self.conv.groups
        channel = within * groups + group if request.shuffled else group * outputs + within
        index = position * request.output_shape[-1] + request.output_offset + channel
        if len(request.inputs) > 1:
            difference = convert(centred(self.residual[index], zero_points[1]), "float32")
            value = p.fma(difference, limits[2], value)
        if request.output in ("uint8", "uint16"):
            result = requantize(p, value, limits[0], limits[1], zero_points[0], request.output)
        else:
            result = narrow(p, clamp(p, value, limits[0], limits[1]), request.output)
        T.buffer_store(self.output, result, [index])


def is_served(request: KernelRequest) -> bool:
    """Whether a request is for an integer convolution or dense layer, not a depthwise one, that these kernels can write."""
    operator = request.operator
    if not isinstance(operator, (Conv2D, Dense)) or request.weights != "int8":
        return False
    # A residual is read at the place where the result is written.
    is_apart = (request.placement is not None or request.shuffled) and len(request.inputs) > 1
    return not is_apart and not (isinstance(operator, Conv2D) and operator.is_depthwise)
