"""Plain AArch64 NEON (Cortex-A53, A72): ``smull`` and ``smlal`` sum products of bytes in int16, ``sadalp`` widens.

Activations less 128 and weights within −127…127 make products of at most 2¹⁴ − 128, so two of them always fit int16. Narrower
weights let more products meet there before they are widened. Layers of some channels take sixteen at a time
(:mod:`tvm_hquant.kernels.arm.octets`); where a group has few, pairs of them are repeated for all outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.arm.codes import ArmRegisters
from tvm_hquant.kernels.arm.floats import arm_float_dot
from tvm_hquant.kernels.arm.lanes import lanes_depthwise_kernel
from tvm_hquant.kernels.arm.octets import octet_dot
from tvm_hquant.kernels.arm.operands import (
    LANES,
    REGISTERS,
    TOP_BITS,
    ElementOperands,
    add_neighbours,
    element_in_all_lanes,
    halves,
)
from tvm_hquant.kernels.convolution.geometry import as_conv2d
from tvm_hquant.kernels.convolution.patches import takes_patches
from tvm_hquant.kernels.dot_product import DotProduct, RepeatedOperand
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, convert, int_like, vector_type
from tvm_hquant.kernels.weightless.family import CommonFamily
from tvm_hquant.operators import Conv2D, Dense

_FEWEST_CHANNELS = 8
"""Of fewer channels in a group, most of a step of sixteen would be empty."""


@dataclass(frozen=True)
class PairDot(ElementOperands):
    """Two channels a step for eight output channels; ``chain`` steps, two at most, are summed in int16, then widened."""

    chain: int = 2
    lanes: int = 2 * LANES
    registers: int = REGISTERS
    products: int = 2
    operand_dtype: str = "int8"
    operand_offset: int = -128
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "smlal"
    operand_cost: float = 1.0
    accumulator_registers: int = 2

    @property
    def operand_steps(self) -> int:
        return 4

    def spare_registers(self, groups: int, vectors: int, chain: int) -> int:
        # Counted in assembly: with more, LLVM puts sums on the stack.
        return 5 * groups // 2 + (chain + 1) * vectors

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        loaded = buffer.vload([indices[0]], vector_type("int8", 2 * steps))
        pairs = T.bind(T.reinterpret(vector_type("int16", steps), loaded))
        if steps == 1:
            return [T.reinterpret("int8x16", T.broadcast(pairs, 8))]
        return [T.reinterpret("int8x16", element_in_all_lanes(pairs, step, 8)) for step in range(steps)]

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        products = [convert(x, "int16") * convert(w, "int16") for x, w in zip(operands, weights, strict=True)]
        total = products[0]
        for other in products[1:]:
            total = total + other
        return accumulator + T.Shuffle([add_neighbours(half) for half in halves(total)], list(range(8)))


@dataclass(frozen=True)
class QuadDot(RepeatedOperand):
    """Four products a lane, as depthwise layers have them: neighbouring products meet in int16, then in int32."""

    lanes: int = LANES
    registers: int = REGISTERS
    products: int = 4
    chain: int = 1
    operand_dtype: str = "uint8"
    operand_offset: int = -128
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "smull"
    operand_cost: float = 1.0

    def of_units(self, units: Expression) -> Expression:
        return T.reinterpret("int8x16", units ^ int_like(TOP_BITS, units))

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        products = convert(operands[0], "int16") * convert(weights[0], "int16")
        pairs = T.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.addp", *halves(products))
        return accumulator + add_neighbours(pairs)


def _dot(request: KernelRequest) -> DotProduct:
    if request.weights == "int8":
        if isinstance(request.operator, Conv2D) and request.operator.is_depthwise:
            return QuadDot()
        if _has_octets(request):
            return octet_dot(request.centred_products)
        return PairDot(min(2, request.centred_products))
    return arm_float_dot(request)


def _has_octets(request: KernelRequest) -> bool:
    """Whether steps of sixteen channels are worth it: not for few channels, nor where products fit alone only."""
    assert isinstance(request.operator, (Conv2D, Dense))
    if request.centred_products == 1:
        return False
    conv, dot = as_conv2d(request.operator), octet_dot(request.centred_products)
    has_patches = request.inputs[0] == "uint8" and takes_patches(conv, dot.products, dot.splits_pixels, dot.lanes)
    return has_patches or conv.in_channels // conv.groups >= _FEWEST_CHANNELS


INSTRUCTION_SET = InstructionSet(
    (
        AnchorFamily("arm_neon", _dot, LANES, depthwise=lanes_depthwise_kernel, codes=ArmRegisters()),
        CommonFamily(LANES),
    ),
    frozenset({"asimd"}),
    host=Host("aarch64", "cortex-a72", "generic", ("+neon",)),
    preference=20,
)
