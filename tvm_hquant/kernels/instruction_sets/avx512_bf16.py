"""AVX512-BF16: ``vdpbf16ps`` adds two products of bfloat16 values to each of 16 float32 sums.

A product of two bfloat16 values is exact in float32. The instruction adds the product of the upper halves first, rounds to
nearest even, adds the product of the lower halves and rounds again. With the halves of both operands exchanged that is two
fused multiply-adds in the order of the channels, as in the contract, but for one thing: values below 2⁻¹²⁶ count as
zero on the way.

TVM has no vectors of bfloat16 in its LLVM types, so the call stands in a few lines of LLVM's own language.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VDPBF16PS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.dot_product import DotProduct, RepeatedOperand
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, broadcast, vector_type
from tvm_hquant.kernels.x86.common_family import common_family
from tvm_hquant.operators import Conv2D, Dense

_LANES = 16
_REGISTERS = 32
_FUNCTION = "hquant_vdpbf16ps"
_DEFINITION = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @{_FUNCTION}(<16 x float> %sums, <16 x i32> %a, <16 x i32> %b) alwaysinline
    "target-features"="+avx512f,+avx512bf16" {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sums, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
"""


@dataclass(frozen=True)
class BFloatDot(RepeatedOperand):
    """Two channels a step."""

    lanes: int = _LANES
    registers: int = _REGISTERS
    products: int = 2
    chain: int = 1
    operand_dtype: str = "uint16"
    operand_offset: int = 0
    weight_dtype: str = "uint16"
    accumulator_dtype: str = "float32"
    name: str = "vdpbf16ps"
    operand_cost: float = 0.5
    reverses_products: bool = True
    prefetches: bool = True
    sweeps: bool = True
    llvm_functions: str = _DEFINITION
    groups: int = 1

    def for_groups(self, groups: int) -> DotProduct:
        return replace(self, groups=groups)

    def loaded_units(self, buffer: Buffer, index: Expression, count: int) -> Expression:
        words = super().loaded_units(buffer, index, count)
        # Exchanged before they are repeated: rotating a vector would take the place of a product.
        sixteen = broadcast(T.int32(16), count)
        return T.call_llvm_pure_intrin(vector_type("int32", count), "llvm.fshl", words, words, sixteen)

    def of_units(self, units: Expression) -> Expression:
        return units

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        words = T.reinterpret(f"int32x{self.lanes}", weights[0])
        return T.call_pure_extern(f"float32x{self.lanes}", _FUNCTION, accumulator, operands[0], words)


def _dot(request: KernelRequest) -> DotProduct | None:
    """For layers from bfloat16 with an even number of channels in each group; others are left to the next family.

    Channels are made even where a clamp at 0 or above follows: a product of two zeros changes nothing but a sum of −0.
    """
    operator = request.operator
    if request.weights != "bfloat16" or request.inputs[0] != "bfloat16":
        return None
    if isinstance(operator, Conv2D):
        is_even = operator.in_channels // operator.groups % 2 == 0
        return BFloatDot() if is_even or (operator.epilogue.lower >= 0 and not operator.is_depthwise) else None
    return BFloatDot() if isinstance(operator, Dense) and operator.in_features % 2 == 0 else None


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("avx512_bf16", _dot, _LANES), common_family(_LANES)),
    frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}),
    host=Host("x86_64", "x86-64-avx512-bf16", "x86-64-v4", ("+avx512vnni", "+avx512bf16")),
    preference=50,
)
