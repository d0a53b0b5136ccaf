"""Words of four codes on AArch64 with dot products, for depthwise layers: ``zip``, ``sdot`` or ``usdot``.

Sums start so much higher that the addition of :mod:`tvm_hquant.kernels.arm.codes` makes floats of them.
Source: Arm Architecture Reference Manual, SDOT, USDOT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.arm.codes import BIAS_BITS, BYTES, MOST_PRODUCTS, ArmRegisters, unbiased
from tvm_hquant.kernels.arm.operands import LANES, TOP_BITS
from tvm_hquant.kernels.primitives import Expression, int_like
from tvm_hquant.kernels.word_vectors import GROUPS


@dataclass(frozen=True)
class ArmWords(ArmRegisters):
    """Registers of sixteen channels. ``sdot`` takes codes less 128."""

    product: Literal["sdot", "usdot"] = "sdot"
    operands: int = 1
    operand_lanes: int = BYTES
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
        return np.arange(BYTES).reshape(GROUPS, LANES)

    def interleave(self, rows: Sequence[Expression]) -> list[list[Expression]]:
        pairs = [[T.bind(self.unpack(rows[i], rows[i + 1], half, 1)) for half in (0, 1)] for i in (0, 2)]
        words = [self.unpack(pairs[0][g // 2], pairs[1][g // 2], g % 2, 2) for g in range(GROUPS)]
        return [[self._operand(word)] for word in words]

    def _operand(self, word: Expression) -> Expression:
        if self.product == "usdot":
            return word
        value = T.reinterpret(f"int32x{LANES}", word)
        return T.reinterpret(f"int8x{BYTES}", value ^ int_like(TOP_BITS, value))

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
