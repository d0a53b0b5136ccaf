"""How the threads of CUDA kernels read activations: some neighbouring channels of an input pixel at once, or padding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, widen
from tvm_hquant.operators import Conv2D

WORD = 4
"""Bytes of a word: of a register that holds several operands."""
_EVERY_BYTE = 0x01010101


def load_word(buffer: Buffer, index: Any, channels: int) -> Expression:
    """That many elements of one or two bytes, from an index that is a multiple of their number, as int32."""
    return T.reinterpret("int32", buffer.vload([index], f"{buffer.dtype}x{channels}"))


def as_bits(buffer: Buffer) -> Buffer:
    """The memory of a flat buffer of 16-bit floats as integers."""
    return T.decl_buffer(buffer.shape, "uint16", data=buffer.data)


def byte_of(code: Expression, plane: int, planes: int) -> Expression:
    """What a byte plane holds of an int32 code; the code itself where there is one plane only."""
    if planes == 1:
        return code
    return code >> T.int32(8) if plane else code & T.int32(255)


@dataclass(frozen=True)
class Activations(ABC):
    """Reads activations of a convolution from ``source``, a flat buffer."""

    conv: Conv2D
    source: Buffer

    @property
    def group_inputs(self) -> int:
        return self.conv.in_channels // self.conv.groups

    @property
    @abstractmethod
    def word(self) -> int:
        """Channels that are read at once."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Of what is read."""

    @property
    @abstractmethod
    def ends_in_zeros(self) -> bool:
        """Whether channels behind a group's last one are read as zeros: they have weight 0, but 0 times infinity is NaN."""

    @abstractmethod
    def padding(self, plane: int) -> Expression:
        """What padding holds."""

    @abstractmethod
    def _load(self, at: Expression, word: Expression, plane: int) -> Expression:
        """The word of that number within its group; its first channel lies at the index ``at``."""

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
            channel: the group, and the number of the word in it.
            plane: byte plane of the activations.
            padding: what :meth:`padding` gives for it.
        """
        _, height, width, channels = self.conv.input_shape
        window = self.conv.window
        out_height, out_width = window.output_size(height, width)
        top, left, _, _ = window.padding
        row = position // out_width % out_height * window.strides[0] + tap[0] * window.dilation[0] - top
        column = position % out_width * window.strides[1] + tap[1] * window.dilation[1] - left
        image, (group, word) = position // (out_height * out_width), channel
        at = ((image * height + row) * width + column) * channels + group * self.group_inputs + word * self.word
        value = self._load(at, word, plane)
        if not any(window.padding):
            return value
        exists = T.And(T.And(row >= 0, row < height), T.And(column >= 0, column < width))
        return T.if_then_else(exists, value, padding)


@dataclass(frozen=True)
class CodeWords(Activations):
    """Four codes as the bytes of an int32.

    Attributes:
        planes: byte planes of the activations: 2 for uint16 codes.
        zero_points: int32 [output, residual, planes…].
        flip: bits that are inverted in every word.
    """

    planes: int
    zero_points: Buffer
    flip: int = 0

    @property
    def word(self) -> int:
        return WORD

    @property
    def dtype(self) -> str:
        return "int32"

    @property
    def ends_in_zeros(self) -> bool:
        return False

    def padding(self, plane: int) -> Expression:
        return self._flipped(self.zero_points[2 + plane] * T.int32(_EVERY_BYTE))

    def _load(self, at: Expression, word: Expression, plane: int) -> Expression:
        if self.group_inputs % WORD == 0 and self.planes == 1:
            return self._flipped(load_word(self.source, at, WORD))
        # Bytes behind the last channel have weight 0; those behind the last element do not exist.
        last = self.group_inputs - 1 - word * WORD
        parts = [T.Cast("int32", self.source[at + T.min(byte, last)]) for byte in range(WORD)]
        parts = [byte_of(part, plane, self.planes) for part in parts]
        value = parts[0]
        for byte, part in enumerate(parts[1:], 1):
            value = value | (part << T.int32(8 * byte))
        return self._flipped(value)

    def _flipped(self, word: Expression) -> Expression:
        return word ^ T.int32(self.flip) if self.flip else word


@dataclass(frozen=True)
class SingleCodes(Activations):
    """One code, or a byte of one, as int32. ``planes`` and ``zero_points`` are those of :class:`CodeWords`."""

    planes: int
    zero_points: Buffer

    @property
    def word(self) -> int:
        return 1

    @property
    def dtype(self) -> str:
        return "int32"

    @property
    def ends_in_zeros(self) -> bool:
        return False

    def padding(self, plane: int) -> Expression:
        return self.zero_points[2 + plane]

    def _load(self, at: Expression, word: Expression, plane: int) -> Expression:
        return byte_of(T.Cast("int32", self.source[at]), plane, self.planes)


@dataclass(frozen=True)
class FloatPairs(Activations):
    """Two 16-bit floats as the halves of an int32; ``source`` holds their bits as uint16."""

    @property
    def word(self) -> int:
        return 2

    @property
    def dtype(self) -> str:
        return "int32"

    @property
    def ends_in_zeros(self) -> bool:
        return True

    def padding(self, plane: int) -> Expression:
        return T.int32(0)

    def _load(self, at: Expression, word: Expression, plane: int) -> Expression:
        if self.group_inputs % 2 == 0:
            return load_word(self.source, at, 2)
        has_second = word * 2 + 1 < self.group_inputs
        second = T.if_then_else(has_second, T.Cast("int32", self.source[at + 1]), T.int32(0))
        return T.Cast("int32", self.source[at]) | (second << T.int32(16))


@dataclass(frozen=True)
class SingleFloats(Activations):
    """One float of a ``storage``, as float32."""

    storage: str

    @property
    def word(self) -> int:
        return 1

    @property
    def dtype(self) -> str:
        return "float32"

    @property
    def ends_in_zeros(self) -> bool:
        return False

    def padding(self, plane: int) -> Expression:
        return T.float32(0)

    def _load(self, at: Expression, word: Expression, plane: int) -> Expression:
        return widen(self.source[at], self.storage)
