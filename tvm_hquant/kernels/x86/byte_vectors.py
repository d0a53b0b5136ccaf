"""Byte vectors of x86, 128 to 512 bits wide: interleaving rows into words, products of words, packing sums to codes.

``vpunpcklbw`` and its relatives work within parts of 16 bytes. Interleaving bytes, then 16-bit pairs, of four rows gives
words of four codes, four channels of every part to a vector; ``vpackssdw`` and ``vpackuswb`` put four such vectors of sums
back into the order of the channels, without a shuffle across parts.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PUNPCKLBW, PACKSSDW, PACKUSWB, PMADDUBSW, PMADDWD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.epilogues.saturating_clamp import SaturatingClamp
from tvm_hquant.kernels.interface import ProvenEnding
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, convert
from tvm_hquant.kernels.word_vectors import GROUPS, CodeClamp

_NAMES = {
    ("packssdw", 16): "llvm.x86.sse2.packssdw.128",
    ("packssdw", 32): "llvm.x86.avx2.packssdw",
    ("packssdw", 64): "llvm.x86.avx512.packssdw.512",
    ("packuswb", 16): "llvm.x86.sse2.packuswb.128",
    ("packuswb", 32): "llvm.x86.avx2.packuswb",
    ("packuswb", 64): "llvm.x86.avx512.packuswb.512",
    ("vpmaddubsw", 16): "llvm.x86.ssse3.pmadd.ub.sw.128",
    ("vpmaddubsw", 32): "llvm.x86.avx2.pmadd.ub.sw",
    ("vpmaddubsw", 64): "llvm.x86.avx512.pmaddubs.w.512",
    ("vpmaddwd", 16): "llvm.x86.sse2.pmadd.wd",
    ("vpmaddwd", 32): "llvm.x86.avx2.pmadd.wd",
    ("vpmaddwd", 64): "llvm.x86.avx512.pmaddw.d.512",
    ("vpdpbusd", 16): "llvm.x86.avx512.vpdpbusd.128",
    ("vpdpbusd", 32): "llvm.x86.avx512.vpdpbusd.256",
    ("vpdpbusd", 64): "llvm.x86.avx512.vpdpbusd.512",
}

WordProduct = Literal["vpdpbusd", "vpmaddubsw", "vpmaddwd"]
"""How the four products of a word are added: at once, as two saturating 16-bit sums, or as two exact ones."""


@dataclass(frozen=True)
class ByteVectors:
    """Vectors of ``width`` bytes, whose words of four codes are multiplied by ``product``."""

    width: int
    product: WordProduct
    operand_offset: int = 0
    start_offset: int = 0
    most_products: int = 2**31 // (2 * 255 * 128)
    most_pixels: int = 7
    copies_offsets: bool = False

    @property
    def words(self) -> int:
        """32-bit lanes."""
        return self.width // 4

    @property
    def operands(self) -> int:
        """Vectors that hold the words of a group as the products want them."""
        return 2 if self.product == "vpmaddwd" else 1

    @property
    def operand_dtype(self) -> str:
        return "int16" if self.product == "vpmaddwd" else "uint8"

    @property
    def weight_dtype(self) -> str:
        return "int16" if self.product == "vpmaddwd" else "int8"

    @property
    def operand_lanes(self) -> int:
        """Elements of an operand or weight vector."""
        return self.width // 2 if self.product == "vpmaddwd" else self.width

    @property
    def channel_order(self) -> npt.NDArray[np.int64]:
        """int64 [groups, words]: the channel in every lane of the vectors that interleaving makes."""
        parts = range(self.width // 16)
        return np.array([[16 * part + 4 * group + i for part in parts for i in range(4)] for group in range(GROUPS)])

    def interleave(self, rows: Sequence[Expression]) -> list[list[Expression]]:
        """[group][operand] vectors of the codes of four rows (uint8 vectors of ``width`` channels).

        A word holds the codes of a channel in the order of the rows; two operands hold the first and the last two.
        """
        pairs = [[T.bind(self.unpack(rows[i], rows[i + 1], high, 1)) for high in (0, 1)] for i in (0, 2)]
        if self.product != "vpmaddwd":
            return [[self.unpack(pairs[0][g // 2], pairs[1][g // 2], g % 2, 2)] for g in range(GROUPS)]
        zero = T.broadcast(T.uint8(0), self.width)
        return [
            [T.reinterpret(f"int16x{self.width // 2}", self.unpack(pair[g // 2], zero, g % 2, 1)) for pair in pairs]
            for g in range(GROUPS)
        ]

    def unpack(self, a: Expression, b: Expression, high: int, unit: int) -> Expression:
        """Units of ``unit`` bytes of a and b in turn, from the lower or upper half of each part of 16 bytes."""
        count = 8 // unit
        order = [
            16 * part + (high * count + i) * unit + byte + self.width * source
            for part in range(self.width // 16)
            for i in range(count)
            for source in (0, 1)
            for byte in range(unit)
        ]
        return T.Shuffle([a, b], order)

    def multiply(self, total: Expression, operand: Expression, weights: Expression) -> Expression:
        """The int32 sums plus the products of an operand's words and weights."""
        if self.product == "vpmaddwd":
            return total + self._call("vpmaddwd", f"int32x{self.words}", operand, weights)
        if self.product == "vpdpbusd":
            codes = T.reinterpret(f"int8x{self.width}", operand)
            return self._call("vpdpbusd", f"int32x{self.words}", total, codes, weights)
        return self._widen(total, self._pairs(operand, weights))

    def multiply_chain(
        self, total: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        """The same for several operands, whose products of ``vpmaddubsw`` are known to fit int16 together."""
        first, *others = (self._pairs(x, w) for x, w in zip(operands, weights, strict=True))
        return self._widen(total, sum(others, first))

    def _pairs(self, operand: Expression, weights: Expression) -> Expression:
        """int16 sums of two products each."""
        codes = T.reinterpret(f"int8x{self.width}", operand)
        return self._call("vpmaddubsw", f"int16x{self.width // 2}", codes, weights)

    def _widen(self, total: Expression, pairs: Expression) -> Expression:
        ones = T.broadcast(T.int16(1), self.width // 2)
        return total + self._call("vpmaddwd", f"int32x{self.words}", pairs, ones)

    def to_float(self, total: Expression) -> Expression:
        return convert(total, "float32")

    def clamp(self, limits: Buffer, zero_points: Buffer, ending: ProvenEnding) -> CodeClamp:
        return SaturatingClamp(self, limits, zero_points, ending)

    def pack_words(self, low: Expression, high: Expression) -> Expression:
        """int16 of two int32 vectors, saturated."""
        return self._call("packssdw", f"int16x{self.width // 2}", low, high)

    def pack_halves(self, low: Expression, high: Expression) -> Expression:
        """uint8 of two int16 vectors, saturated."""
        return T.reinterpret(f"uint8x{self.width}", self._call("packuswb", f"int8x{self.width}", low, high))

    def _call(self, name: str, dtype: str, *arguments: Expression) -> Expression:
        return T.call_llvm_pure_intrin(dtype, _NAMES[name, self.width], *arguments)
