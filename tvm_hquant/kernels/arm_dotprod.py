"""AArch64 with the dot product extension (Cortex-A76 and later): ``sdot`` adds four s8 products to each of 4 int32 sums.

Source: Arm Architecture Reference Manual, SDOT (vector). Activations are stored as uint8: flipping the top bit makes them
signed, smaller by 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.dot_product import DotProduct, FloatDot, WideDot, repeated_word
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression

_LANES = 4
_REGISTERS = 32
_TOP_BITS = 0x80808080 - 2**32
"""The top bit of each byte of an int32."""


@dataclass(frozen=True)
class SdotDot:
    """Four channels a step."""

    lanes: int = _LANES
    registers: int = _REGISTERS
    products: int = 4
    chain: int = 1
    operand_dtype: str = "uint8"
    operand_offset: int = -128
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "sdot"
    operand_cost: float = 1.5

    def operand(self, buffer: Buffer, index: Expression) -> Expression:
        return repeated_word(buffer, index, "int8", self.lanes, flip=_TOP_BITS)

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot", accumulator, operands[0], weights[0])


def _dot(request: KernelRequest) -> DotProduct:
    if request.weights == "int8":
        return SdotDot()
    if request.weights == "int16":
        return WideDot(2, _REGISTERS)
    return FloatDot(_LANES, _REGISTERS, request.weights, operand_cost=1.0)


FAMILY = AnchorFamily("arm_dotprod", _dot, _LANES)
"""The kernel family of this instruction set."""
