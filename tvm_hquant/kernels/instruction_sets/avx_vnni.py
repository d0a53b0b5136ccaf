"""AVX-VNNI (Alder Lake, Arrow Lake, Zen 5 and later): ``vpdpbusd`` on 256-bit vectors, for CPUs with or without AVX-512.

Everything but 8-bit codes is as on plain AVX2.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD (VEX.256). LLVM has one intrinsic for it and for
the EVEX form of AVX512-VL; which one is emitted follows from the target's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.common import CommonFamily
from tvm_hquant.kernels.dot_product import DotProduct, RepeatedOperand, repeated_words
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression

_LANES = 8
_REGISTERS = 16


@dataclass(frozen=True)
class VnniDot(RepeatedOperand):
    """Four channels a step."""

    lanes: int = _LANES
    registers: int = _REGISTERS
    products: int = 4
    chain: int = 1
    operand_dtype: str = "uint8"
    operand_offset: int = 0
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "vpdpbusd"
    splits_pixels: bool = True
    operand_cost: float = 0.5
    groups: int = 1

    def for_groups(self, groups: int) -> DotProduct:
        return replace(self, groups=groups)

    def operand(self, buffer: Buffer, index: Expression) -> Expression:
        return repeated_words(buffer, index, "int8", self.lanes, self.groups)

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx512.vpdpbusd.256", accumulator, operands[0], weights[0])


def _dot(request: KernelRequest) -> DotProduct | None:
    return VnniDot() if request.weights == "int8" else None


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("avx_vnni", _dot, _LANES, lambda _: "vpdpbusd", (16, 32)), CommonFamily(_LANES)),
    frozenset({"avx2", "fma", "avx_vnni"}),
    host=Host("x86_64", "x86-64-avx-vnni", "x86-64-v3", ("+avxvnni",)),
    preference=30,
)
