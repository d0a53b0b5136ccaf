"""What kernels of codes ask of an instruction set: vectors of bytes that sums become, and words of four codes to multiply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.interface import ProvenEnding
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression

GROUPS = 4
"""Vectors of words, or of 32-bit sums, that hold the channels of a vector of bytes."""


_BLOCK_COST = 16
"""What a block of channels costs beside its bytes, in bytes: loads of constants, loops."""


class CodeVectors(Protocol):
    """Vectors of bytes that sums are packed into.

    Attributes:
        width: bytes of a vector.
        words: 32-bit lanes.
    """

    @property
    def width(self) -> int: ...
    @property
    def words(self) -> int: ...

    def unpack(self, a: Expression, b: Expression, high: int, unit: int) -> Expression:
        """Units of ``unit`` bytes of a and b in turn, from the lower or upper half of each part of 16 bytes."""

    def clamp(self, limits: Buffer, zero_points: Buffer, ending: ProvenEnding) -> CodeClamp:
        """The end of a kernel. ``limits`` and ``zero_points`` are as for :class:`.Epilogue`."""


class WordVectors(CodeVectors, Protocol):
    """Vectors of bytes, one for each channel, of which words of four rows are made.

    Attributes:
        operands: vectors that hold the words of a group of channels as the products want them.
        operand_dtype, operand_lanes, operand_offset: of an operand, and what its elements have been added to codes.
        weight_dtype: of packed weights.
        channel_order: int64 [groups, words], the channel in every lane of the vectors that interleaving makes.
        start_offset: what is added to the sums before the first product, for :meth:`to_float`.
        most_products: of a window, beyond which sums may be too large.
        most_pixels: output columns of a tile.
        copies_offsets: whether every output of a tile has offsets of its own in memory, for instructions that add to one of
            their operands: loading it once more is cheaper than copying a register.
        product: name of the multiplication.
    """

    @property
    def operands(self) -> int: ...
    @property
    def operand_dtype(self) -> str: ...
    @property
    def operand_lanes(self) -> int: ...
    @property
    def operand_offset(self) -> int: ...
    @property
    def weight_dtype(self) -> str: ...
    @property
    def channel_order(self) -> npt.NDArray[np.int64]: ...
    @property
    def start_offset(self) -> int: ...
    @property
    def most_products(self) -> int: ...
    @property
    def most_pixels(self) -> int: ...
    @property
    def copies_offsets(self) -> bool: ...
    @property
    def product(self) -> Any: ...

    def interleave(self, rows: Sequence[Expression]) -> list[list[Expression]]:
        """[group][operand] vectors of the codes of four rows (uint8 vectors of ``width`` channels)."""

    def multiply(self, total: Expression, operand: Expression, weights: Expression) -> Expression:
        """The int32 sums plus the products of an operand's words and weights."""

    def multiply_chain(
        self, total: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        """The same for several operands whose products are known to fit int16 together."""

    def to_float(self, total: Expression) -> Expression:
        """float32 of sums that began ``start_offset`` higher."""


class CodeClamp(Protocol):
    """The end of a vector of channels: from float32 values to uint8 codes."""

    def rounded(self, value: Expression) -> Expression:
        """A vector of float32 values, in the first of three forms that lead to codes."""

    def half(self, low: Expression, high: Expression) -> Expression:
        """Two of them in the second form."""

    def codes(self, low: Expression, high: Expression) -> Expression:
        """uint8 codes of two vectors of :meth:`half`."""


Vectors = TypeVar("Vectors", bound=CodeVectors)


def fitting_vectors(candidates: Sequence[Vectors], channels: int) -> Vectors | None:
    """Those that take so many channels in the least time, if the last block may overlap the one before it.

    None if there are too few channels for any.
    """
    fitting = [v for v in candidates if v.width <= channels]
    return min(fitting, key=lambda v: -(-channels // v.width) * (v.width + _BLOCK_COST), default=None)
