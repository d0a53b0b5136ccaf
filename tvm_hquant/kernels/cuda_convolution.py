"""What the CUDA kernels of integer convolutions have in common: how activations are read, and how a sum ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import CudaPrimitives, Expression, centred, clamp, convert, narrow, requantize
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
