"""AArch64 with bfloat16 (FEAT_BF16: Neoverse V1 and N2, Apple M2, Armv8.6): ``bfmlalb`` and ``bfmlalt``.

They multiply the even and the odd bfloat16 weights of a register by one activation and add to four float32 sums, rounding once:
two fused multiply-adds of widened values in the order of the channels, which is the contract bit for bit. ``bfdot`` and
``bfmmla`` make two and four times the products, but round sums to odd and take denormals for zero
(``BFDotAdd`` in Arm's pseudocode), so that no other machine could simulate them by the contract. They are not used.

TVM has no vectors of bfloat16 in its LLVM types, so the calls stand in a few lines of LLVM's own language.
Source: Arm Architecture Reference Manual, BFMLALB and BFMLALT (by element).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.arm.operands import LANES, REGISTERS, ElementOperands, element_in_all_lanes
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, vector_type
from tvm_hquant.kernels.weightless.family import CommonFamily
from tvm_hquant.operators import Conv2D, Dense

_FUNCTION = "hquant_bfmlal"
_DEFINITION = f"""
declare <4 x float> @llvm.aarch64.neon.bfmlalb(<4 x float>, <8 x bfloat>, <8 x bfloat>)
declare <4 x float> @llvm.aarch64.neon.bfmlalt(<4 x float>, <8 x bfloat>, <8 x bfloat>)
define linkonce_odr <4 x float> @{_FUNCTION}(<4 x float> %sums, <8 x i16> %weights, <8 x i16> %even, <8 x i16> %odd)
    alwaysinline "target-features"="+neon,+bf16" {{
  %w = bitcast <8 x i16> %weights to <8 x bfloat>
  %x = bitcast <8 x i16> %even to <8 x bfloat>
  %y = bitcast <8 x i16> %odd to <8 x bfloat>
  %s = call <4 x float> @llvm.aarch64.neon.bfmlalb(<4 x float> %sums, <8 x bfloat> %w, <8 x bfloat> %x)
  %r = call <4 x float> @llvm.aarch64.neon.bfmlalt(<4 x float> %s, <8 x bfloat> %w, <8 x bfloat> %y)
  ret <4 x float> %r
}}
"""


@dataclass(frozen=True)
class BFloatElementDot(ElementOperands):
    """Two channels a step for four output channels; eight activations are loaded at once."""

    lanes: int = LANES
    registers: int = REGISTERS
    products: int = 2
    chain: int = 1
    operand_dtype: str = "uint16"
    operand_offset: int = 0
    weight_dtype: str = "uint16"
    accumulator_dtype: str = "float32"
    name: str = "bfmlal"
    operand_cost: float = 0.25
    operand_steps: int = 4
    llvm_functions: str = _DEFINITION

    def spare_registers(self, groups: int, vectors: int, chain: int) -> int:
        # Counted in assembly: LLVM loads some weights of the next step early.
        return groups + vectors + min(vectors, 4) + 1

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        """Even and odd activation of a step, each in all lanes of its half of the result."""
        loaded = T.bind(buffer.vload([indices[0]], vector_type("uint16", 2 * steps)))
        pairs = [[element_in_all_lanes(loaded, 2 * step + part, 8) for part in range(2)] for step in range(steps)]
        return [T.Shuffle(pair, list(range(16))) for pair in pairs]

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        even, odd = (T.Shuffle([operands[0]], [8 * part + lane for lane in range(8)]) for part in range(2))
        return T.call_pure_extern("float32x4", _FUNCTION, accumulator, weights[0], even, odd)


def _dot(request: KernelRequest) -> DotProduct | None:
    """For layers from bfloat16 with an even number of channels in each group; others are left to the next family."""
    operator = request.operator
    if request.weights != "bfloat16" or request.inputs[0] != "bfloat16":
        return None
    if isinstance(operator, Conv2D):
        # A depthwise layer has one channel in each group.
        return BFloatElementDot() if operator.in_channels // operator.groups % 2 == 0 else None
    return BFloatElementDot() if isinstance(operator, Dense) and operator.in_features % 2 == 0 else None


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("arm_bf16", _dot, LANES), CommonFamily(LANES)),
    frozenset({"asimd", "bf16"}),
    host=Host("aarch64", "neoverse-v1", "generic", ("+neon", "+dotprod", "+fp16fml", "+i8mm", "+bf16")),
    preference=50,
)
