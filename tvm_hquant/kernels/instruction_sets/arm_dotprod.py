"""AArch64 with the dot product extension (Cortex-A76 and later): ``sdot`` adds four s8 products to each of 4 int32 sums.

Source: Arm Architecture Reference Manual, SDOT (vector). Activations are stored as uint8: flipping the top bit makes them
signed, smaller by 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.arm.codes import ArmRegisters
from tvm_hquant.kernels.arm.floats import arm_float_dot
from tvm_hquant.kernels.arm.operands import LANES, REGISTERS, TOP_BITS, ElementOperands, word_operands
from tvm_hquant.kernels.arm.words import ArmWords
from tvm_hquant.kernels.depthwise.interleaved import interleaved_depthwise_kernel
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.processor import Processor
from tvm_hquant.kernels.weightless.family import CommonFamily


@dataclass(frozen=True)
class SdotDot(ElementOperands):
    """Four channels a step; sixteen are loaded and made signed at once."""

    lanes: int = LANES
    registers: int = REGISTERS
    products: int = 4
    chain: int = 1
    operand_dtype: str = "uint8"
    operand_offset: int = -128
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "sdot"
    operand_cost: float = 0.5
    operand_steps: int = 4

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        return word_operands(buffer, indices[0], steps, "int8", flip=TOP_BITS)

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot", accumulator, weights[0], operands[0])


def _dot(request: KernelRequest) -> DotProduct:
    if request.weights == "int8":
        return SdotDot()
    return arm_float_dot(request)


def _depthwise(request: KernelRequest, family: str, processor: Processor) -> Kernel | None:
    return interleaved_depthwise_kernel(request, (ArmWords(product="sdot"),), family, processor)


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("arm_dotprod", _dot, LANES, depthwise=_depthwise, codes=ArmRegisters()), CommonFamily(LANES)),
    frozenset({"asimd", "asimddp"}),
    host=Host("aarch64", "cortex-a76", "generic", ("+neon", "+dotprod")),
    preference=30,
)
