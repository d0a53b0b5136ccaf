"""The end of a kernel on AArch64: from sums to uint8 codes, sixteen to a register.

``scvtf`` and ``fcvtns`` take one of the vector pipes for two cycles on Neoverse cores. Integers of fewer than 23 bits are
converted by an addition instead: 1.5·2²³ plus such an integer, as a float32, has the integer in its low bits, and an addition
rounds to nearest, ties to even, as ``rint`` does.
Source: Arm Architecture Reference Manual, ZIP1, UZP1, SQXTUN; Arm Neoverse N1 Software Optimization Guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.arm.operands import LANES
from tvm_hquant.kernels.interface import ProvenEnding
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, broadcast, float_like
from tvm_hquant.kernels.word_vectors import CodeClamp

BYTES = 16
"""Of a register."""
_BIAS = 1.5 * 2**23
"""A float32 whose last bit counts 1, and of which integers of 22 bits may be taken or added."""
BIAS_BITS = 0x4B400000
"""Its bits: added to the sum before the first product, they are there for nothing."""
MOST_PRODUCTS = 2**22 // (255 * 128)
"""Products of codes and weights whose sum has 22 bits."""


@dataclass(frozen=True)
class ArmRegisters:
    """Registers of sixteen codes, or of four sums."""

    width: int = BYTES
    words: int = LANES

    def unpack(self, a: Expression, b: Expression, high: int, unit: int) -> Expression:
        """Units of ``unit`` bytes of a and b in turn, from their lower or upper halves."""
        count = BYTES // 2 // unit
        starts = [(high * count + i) * unit for i in range(count)]
        return T.Shuffle(
            [a, b], [start + source + byte for start in starts for source in (0, BYTES) for byte in range(unit)]
        )

    def clamp(self, limits: Buffer, zero_points: Buffer, ending: ProvenEnding) -> CodeClamp:
        return ArmClamp(limits, zero_points, ending)


def unbiased(total: Expression) -> Expression:
    """float32 of integers that are ``BIAS_BITS`` larger."""
    value = T.reinterpret(f"float32x{LANES}", total)
    return value - float_like(_BIAS, value)


@dataclass(frozen=True)
class ArmClamp:
    """Clamps to codes as :func:`tvm_hquant.kernels.primitives.requantize` does.

    Where the constants prove that values fit int16, codes are clamped as they are narrowed, by saturation; elsewhere values
    are, before they are rounded. ``limits`` and ``zero_points`` are as for :class:`.Epilogue`.
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
            return T.bind(_even([T.reinterpret(f"uint8x{BYTES}", part) for part in (low, high)]))
        narrowed = [T.bind(T.call_llvm_pure_intrin("int8x8", "llvm.aarch64.neon.sqxtun", part)) for part in (low, high)]
        codes = T.reinterpret(f"uint8x{BYTES}", T.Shuffle(narrowed, list(range(BYTES))))
        if self.ending.is_whole_range:
            return T.bind(codes)
        return T.bind(T.min(T.max(codes, self._limit(0)), self._limit(1)))

    def _limit(self, number: int) -> Expression:
        code = T.Cast("uint8", T.Cast("int32", self.limits[number]) + self.zero_points[0])
        return broadcast(code, BYTES)


def _even(parts: Sequence[Expression]) -> Expression:
    """The even elements of two vectors."""
    vectors = [T.bind(part) for part in parts]
    size = int(vectors[0].ty.dtype.lanes)
    return T.Shuffle(vectors, list(range(0, 2 * size, 2)))


def _intrinsic(name: str, a: Expression, b: Expression) -> Expression:
    return T.call_llvm_pure_intrin(f"float32x{LANES}", name, a, b)
