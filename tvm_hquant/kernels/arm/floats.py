"""Float multiply-adds of AArch64 with the operand's element named in the instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.arm.operands import LANES, REGISTERS, ElementOperands, element_in_all_lanes
from tvm_hquant.kernels.dot_product import DotProduct, FloatDot
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, LlvmPrimitives, vector_type, widen


@dataclass(frozen=True)
class FmlaDot(ElementOperands):
    """One channel a step, in float32; four are loaded at once. Weights in 16-bit storage are widened, which is exact."""

    storage: str = "float32"
    lanes: int = LANES
    registers: int = REGISTERS
    products: int = 1
    chain: int = 1
    operand_dtype: str = "float32"
    operand_offset: int = 0
    accumulator_dtype: str = "float32"
    operand_steps: int = 4
    sweeps: bool = False
    addresses: int = 14

    @property
    def operand_cost(self) -> float:
        # Loads have units of their own: they count for little beside conversions, which take those of the multiply-adds.
        return 0.25 if self.storage == "float32" else 0.1

    @property
    def row_vectors(self) -> int:
        # Weights that are widened take registers of their own: counted in assembly.
        return 16 if self.storage == "float32" else 8

    @property
    def weight_cost(self) -> float:
        # Widening takes vector pipes, and for float16 twice one that others have to wait for.
        return {"float32": 1.0, "float16": 3.0, "bfloat16": 2.0}[self.storage]

    @property
    def name(self) -> str:
        return f"{self.storage}_fma"

    @property
    def weight_dtype(self) -> str:
        return "uint16" if self.storage == "bfloat16" else self.storage

    def for_groups(self, groups: int) -> DotProduct | None:
        # As many neighbours in memory as groups make a vector: no element is named.
        return FloatDot(self.lanes, self.registers).for_groups(groups) if self.storage == "float32" else None

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        loaded = T.bind(buffer.vload([indices[0]], vector_type("float32", steps)))
        if steps == 1:
            return [T.broadcast(loaded, self.lanes)]
        return [element_in_all_lanes(loaded, step, self.lanes) for step in range(steps)]

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        return LlvmPrimitives().fma(operands[0], widen(weights[0], self.storage), accumulator)


def arm_float_dot(request: KernelRequest) -> DotProduct:
    """The multiply-add for a layer with float weights."""
    # Tiles over the ends of rows have more pixels, which share what is widened.
    return FmlaDot(request.weights, sweeps=request.weights != "float32")
