"""Plain AArch64 NEON (Cortex-A53, A72): ``smull`` and ``smlal`` sum two products of bytes in int16, ``sadalp`` widens.

Activations less 128 and weights within −127…127 make products of at most 2¹⁴ − 128, so two of them always fit int16. That is
twice as many products an instruction as ``smlal`` of int16 values gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.dot_product import DotProduct, FloatDot, WideDot, repeated_word
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, convert

_LANES = 4
_REGISTERS = 32
_TOP_BITS = 0x80808080 - 2**32
"""The top bit of each byte of an int32."""


@dataclass(frozen=True)
class ByteDot:
    """Four channels a step: the first and the third of them, then the second and the fourth, meet in int16 lanes."""

    lanes: int = _LANES
    registers: int = _REGISTERS
    products: int = 4
    chain: int = 1
    operand_dtype: str = "uint8"
    operand_offset: int = -128
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "smlal"
    operand_cost: float = 1.0

    def operand(self, buffer: Buffer, index: Expression) -> Expression:
        return repeated_word(buffer, index, "int8", self.lanes, flip=_TOP_BITS)

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        pairs = _pairs(operands[0], 0) * _pairs(weights[0], 0) + _pairs(operands[0], 1) * _pairs(weights[0], 1)
        return accumulator + T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", pairs)


def _pairs(bytes_of_quads: Expression, half: int) -> Expression:
    """The first or the second two bytes of each of four quads, as int16x8."""
    halves = T.Shuffle([T.reinterpret("int16x8", bytes_of_quads)], [2 * lane + half for lane in range(_LANES)])
    return convert(T.reinterpret("int8x8", halves), "int16")


def _dot(request: KernelRequest) -> DotProduct:
    if request.weights == "int8":
        return ByteDot()
    if request.weights == "int16":
        return WideDot(2, _REGISTERS)
    return FloatDot(_LANES, _REGISTERS, request.weights, operand_cost=1.0)


FAMILY = AnchorFamily("arm_neon", _dot, _LANES)
"""The kernel family of this instruction set."""
