"""From float32 values to uint8 codes on x86: rounding, zero point, clamp, with packs that saturate.

``vpackssdw`` and ``vpackuswb`` saturate, which is most of the clamp: what is left of it, and of the zero point, is what a
layer's constants do not prove to change nothing (:class:`tvm_hquant.kernels.interface.ProvenEnding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import ProvenEnding
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, LlvmPrimitives, broadcast, select


class PackingVectors(Protocol):
    """Vectors of ``width`` bytes or ``words`` sums."""

    @property
    def width(self) -> int: ...
    @property
    def words(self) -> int: ...

    def pack_words(self, low: Expression, high: Expression) -> Expression:
        """int16 of two int32 vectors, saturated."""

    def pack_halves(self, low: Expression, high: Expression) -> Expression:
        """uint8 of two int16 vectors, saturated."""


@dataclass(frozen=True)
class SaturatingClamp:
    """Clamps to codes as :func:`tvm_hquant.kernels.primitives.requantize` does.

    ``limits`` and ``zero_points`` are as for :class:`tvm_hquant.kernels.epilogues.epilogue.Epilogue`.
    """

    vectors: PackingVectors
    limits: Buffer
    zero_points: Buffer
    ending: ProvenEnding

    def rounded(self, value: Expression) -> Expression:
        """int32 codes less the zero point of a vector of float32 values, not yet limited, or from above only.

        Where values may leave int32, what is too large is cut off before it is converted. What is too small, and a NaN,
        converts to −2³¹, which saturates.
        """
        p = LlvmPrimitives()
        value = p.bind(value)
        if not self.ending.fits_int32:
            upper = broadcast(self.limits[1], self.vectors.words)
            value = select(upper < value, upper, value)
        return T.bind(p.round_to_int32(value))

    def half(self, low: Expression, high: Expression) -> Expression:
        """int16 codes of two vectors of :meth:`rounded`, saturated."""
        packed = self.vectors.pack_words(low, high)
        if self.ending.starts_at_zero:
            return T.bind(packed)
        zero_point = broadcast(T.Cast("int16", self.zero_points[0]), self.vectors.width // 2)
        if not self.ending.fits_int32:
            return T.bind(packed + zero_point)
        return T.bind(T.call_llvm_pure_intrin(f"int16x{self.vectors.width // 2}", "llvm.sadd.sat", packed, zero_point))

    def codes(self, low: Expression, high: Expression) -> Expression:
        """uint8 codes of two vectors of :meth:`half`."""
        codes = self.vectors.pack_halves(low, high)
        if self.ending.is_whole_range:
            return T.bind(codes)
        codes = T.max(codes, self._limit(0))
        return T.bind(T.min(codes, self._limit(1)) if self.ending.fits_int32 else codes)

    def _limit(self, number: int) -> Expression:
        code = T.Cast("uint8", T.Cast("int32", self.limits[number]) + self.zero_points[0])
        return broadcast(code, self.vectors.width)
