"""Words of four codes on AArch64 with dot products, for depthwise layers: ``zip``, ``sdot`` or ``usdot``, ``uzp1``.

``scvtf`` and ``fcvtns`` take one of the vector pipes for two cycles on Neoverse cores. Integers of fewer than 23 bits are
converted by an addition instead: 1.5·2²³ plus such an integer, as a float32, has the integer in its low bits, and an addition
rounds to nearest, ties to even, as ``rint`` does.
Source: Arm Architecture Reference Manual, SDOT, USDOT, UZP1; Arm Neoverse N1 Software Optimization Guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.arm_operands import LANES, TOP_BITS
from tvm_hquant.kernels.interface import ProvenEnding
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, broadcast, float_like, int_like
from tvm_hquant.kernels.word_vectors import GROUPS, CodeClamp, WordVectors

_BYTES = 16
_BIAS = 1.5 * 2**23
"""A float32 whose last bit counts 1, and of which integers of 22 bits may be taken or added."""
BIAS_BITS = 0x4B400000
"""Its bits: added to the sum before the first product, they are there for nothing."""
MOST_PRODUCTS = 2**22 // (255 * 128)
"""Products of codes and weights whose sum has 22 bits."""


@dataclass(frozen=True)
class ArmWords:
    """Registers of sixteen channels. ``sdot`` takes codes less 128."""

    product: Literal["sdot", "usdot"]
    width: int = _BYTES
    words: int = LANES
    operands: int = 1
    operand_lanes: int = _BYTES
    weight_dtype: str = "int8"
    start_offset: int = BIAS_BITS
    most_products: int = MOST_PRODUCTS
    most_pixels: int = 2
    copies_offsets: bool = True

    @property
    def operand_dtype(self) -> str:
        return "int8" if self.product == "sdot" else "uint8"

    @property
    def operand_offset(self) -> int:
        return -128 if self.product == "sdot" else 0

    @property
    def channel_order(self) -> npt.NDArray[np.int64]:
        return np.arange(_BYTES).reshape(GROUPS, LANES)

    def interleave(self, rows: Sequence[Expression]) -> list[list[Expression]]:
        pairs = [[T.bind(_zip(rows[i], rows[i + 1], half, 1)) for half in (0, 1)] for i in (0, 2)]
        words = [_zip(pairs[0][g // 2], pairs[1][g // 2], g % 2, 2) for g in range(GROUPS)]
        return [[self._operand(word)] for word in words]

    def _operand(self, word: Expression) -> Expression:
        if self.product == "usdot":
            return word
        value = T.reinterpret(f"int32x{LANES}", word)
        return T.reinterpret(f"int8x{_BYTES}", value ^ int_like(TOP_BITS, value))

    def multiply(self, total: Expression, operand: Expression, weights: Expression) -> Expression:
        return T.call_llvm_pure_intrin("int32x4", f"llvm.aarch64.neon.{self.product}", total, operand, weights)

    def multiply_chain(
        self, total: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        for operand, codes in zip(operands, weights, strict=True):
            total = self.multiply(total, operand, codes)
        return total

    def to_float(self, total: Expression) -> Expression:
        return unbiased(total)


def unbiased(total: Expression) -> Expression:
    """float32 of integers that are ``BIAS_BITS`` larger."""
    value = T.reinterpret(f"float32x{LANES}", total)
    return value - float_like(_BIAS, value)


@dataclass(frozen=True)
class ArmClamp:
    """Clamps to codes as :func:`tvm_hquant.kernels.primitives.requantize` does.

    Where the constants prove that values fit int16, codes are clamped as they are narrowed, by saturation; elsewhere values
    are, before they are rounded. ``limits`` and ``zero_points`` are as for :class:`tvm_hquant.kernels.epilogue.Epilogue`.
    """

    limits: Buffer
    zero_points: Buffer
    ending: ProvenEnding

    def rounded(self, value: Expression) -> Expression:
        """Four float32 with codes less the zero point in their low halves."""
        if not self.ending.fits_int16:
            # fmaxnm takes the limit in place of a NaN, as the contract does; they differ in the sign of a zero only.
            value = _intrinsic("llvm.maxnum", value, broadcast(self.limits[0], LANES))
            value = _intrinsic("llvm.minnum", value, broadcast(self.limits[1], LANES))
        return T.bind(value + float_like(_BIAS, value))

    def half(self, low: Expression, high: Expression) -> Expression:
        """Eight int16 codes."""
        codes = _even([T.reinterpret(f"int16x{2 * LANES}", part) for part in (low, high)])
        if self.ending.starts_at_zero:
            return T.bind(codes)
        return T.bind(codes + broadcast(T.Cast("int16", self.zero_points[0]), 2 * LANES))

    def codes(self, low: Expression, high: Expression) -> Expression:
        if not self.ending.fits_int16:
            return T.bind(_even([T.reinterpret(f"uint8x{_BYTES}", part) for part in (low, high)]))
        narrowed = [T.bind(T.call_llvm_pure_intrin("int8x8", "llvm.aarch64.neon.sqxtun", part)) for part in (low, high)]
        codes = T.reinterpret(f"uint8x{_BYTES}", T.Shuffle(narrowed, list(range(_BYTES))))
        if self.ending.is_whole_range:
            return T.bind(codes)
        return T.bind(T.min(T.max(codes, self._limit(0)), self._limit(1)))

    def _limit(self, number: int) -> Expression:
        code = T.Cast("uint8", T.Cast("int32", self.limits[number]) + self.zero_points[0])
        return broadcast(code, _BYTES)


def word_clamp(vectors: WordVectors, limits: Buffer, zero_points: Buffer, ending: ProvenEnding) -> CodeClamp:
    """The clamp for a kernel of words."""
    return ArmClamp(limits, zero_points, ending)


def _zip(a: Expression, b: Expression, half: int, unit: int) -> Expression:
    """Units of ``unit`` bytes of a and b in turn, from their lower or upper halves."""
    count = _BYTES // 2 // unit
    starts = [(half * count + i) * unit for i in range(count)]
    return T.Shuffle(
        [a, b], [start + source + byte for start in starts for source in (0, _BYTES) for byte in range(unit)]
    )


def _even(parts: Sequence[Expression]) -> Expression:
    """The even elements of two vectors."""
    vectors = [T.bind(part) for part in parts]
    size = int(vectors[0].ty.dtype.lanes)
    return T.Shuffle(vectors, list(range(0, 2 * size, 2)))


def _intrinsic(name: str, a: Expression, b: Expression) -> Expression:
    return T.call_llvm_pure_intrin(f"float32x{LANES}", name, a, b)
