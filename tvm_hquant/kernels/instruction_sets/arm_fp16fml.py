"""AArch64 with products of halves into float32 (FEAT_FHM, ``asimdfhm``: Neoverse V1 and N2, Apple): ``fmlal``, ``fmlal2``.

They multiply the lower and the upper four of eight float16 weights by one float16 activation and add to four float32 sums,
rounding once. That is the contract's fused multiply-add of widened values, bit for bit, without widening anything beforehand:
activations stay as they are stored, and half as many bytes are loaded as for float32.

Source: Arm Architecture Reference Manual, FMLAL and FMLAL2 (by element); ``FPMulAddH`` in its pseudocode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.arm.operands import LANES, REGISTERS, ElementOperands, element_in_all_lanes, halves
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, vector_type
from tvm_hquant.kernels.weightless.family import CommonFamily
from tvm_hquant.operators import Conv2D, Dense

_HALVES = 2 * LANES
"""float16 lanes of a register."""


@dataclass(frozen=True)
class HalfDot(ElementOperands):
    """One channel a step for eight output channels; eight activations are loaded at once."""

    lanes: int = _HALVES
    registers: int = REGISTERS
    products: int = 1
    chain: int = 1
    operand_dtype: str = "float16"
    operand_offset: int = 0
    weight_dtype: str = "float16"
    accumulator_dtype: str = "float32"
    name: str = "fmlal"
    operand_cost: float = 0.25
    operand_steps: int = 8
    accumulator_registers: int = 2

    def spare_registers(self, groups: int, vectors: int, chain: int) -> int:
        return groups + vectors + 1

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        loaded = T.bind(buffer.vload([indices[0]], vector_type("float16", steps)))
        if steps == 1:
            return [T.broadcast(loaded, self.lanes)]
        return [element_in_all_lanes(loaded, step, self.lanes) for step in range(steps)]

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        sums = [
            T.call_llvm_pure_intrin("float32x4", f"llvm.aarch64.neon.{instruction}", part, weights[0], operands[0])
            for instruction, part in zip(("fmlal", "fmlal2"), halves(accumulator), strict=True)
        ]
        return T.Shuffle(sums, list(range(self.lanes)))


def _dot(request: KernelRequest) -> DotProduct | None:
    """For layers from float16 with channels enough for a vector; others are left to the next family."""
    operator = request.operator
    if request.weights != "float16" or request.inputs[0] != "float16":
        return None
    if isinstance(operator, Conv2D):
        return HalfDot() if operator.out_channels // operator.groups >= _HALVES else None
    return HalfDot() if isinstance(operator, Dense) and operator.out_features >= _HALVES else None


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("arm_fp16fml", _dot, LANES), CommonFamily(LANES)),
    frozenset({"asimd", "asimdhp", "asimdfhm"}),
    host=Host("aarch64"),
    preference=40,
)
