"""AVX512-VNNI: ``vpdpbusd`` adds four products of u8 and s8 codes to each of 16 int32 sums.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD. LLVM 22 wants its operands as <64 x i8>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.dot_product import DotProduct, FloatDot, RepeatedOperand
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.x86.common_family import common_family
from tvm_hquant.operators import Conv2D

_LANES = 16
_NARROW = (8, 4)
"""Lanes of shorter vectors. Cores start two of 256 bits a cycle, or of 128, and of 512 bits one or two."""
_REGISTERS = 32


@dataclass(frozen=True)
class VnniDot(RepeatedOperand):
    """Four channels a step; AVX-VNNI has it with shorter vectors.

    Costs are measured on a Zen 4: loads run beside the products, and so does the epilogue of a tile of up to about 16 sums.
    """

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
    prefetches: bool = True
    operand_cost: float = 0.01
    weight_cost: float = 0.01
    lookahead: int = 128
    groups: int = 1

    def for_groups(self, groups: int) -> DotProduct:
        return replace(self, groups=groups)

    def of_units(self, units: Expression) -> Expression:
        return T.reinterpret(f"int8x{4 * self.lanes}", units)

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        vector, intrinsic = f"int32x{self.lanes}", f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        return T.call_llvm_pure_intrin(vector, intrinsic, accumulator, operands[0], weights[0])


def _lanes(request: KernelRequest) -> int:
    """Lanes of vectors that take the least time for the output channels of a group, if these do not fill one.

    Of equal ones the widest that has no idle lanes. Shuffled channels share vectors instead.
    """
    conv = request.operator
    if not isinstance(conv, Conv2D) or conv.is_depthwise or request.shuffled:
        return _LANES
    channels = conv.out_channels // conv.groups
    if channels >= _LANES:
        return _LANES
    times = {lanes: -(-channels // lanes) * max(lanes, _NARROW[0]) for lanes in (_LANES, *_NARROW)}
    return min(times, key=lambda lanes: (times[lanes], lanes > channels, -lanes))


def _dot(request: KernelRequest) -> DotProduct:
    if request.weights == "int8":
        return VnniDot(_lanes(request))
    # Loads run beside the products here, too; most weights come from the second-level cache. Others are widened.
    is_plain = request.weights == "float32"
    return FloatDot(
        _lanes(request),
        _REGISTERS,
        request.weights,
        operand_cost=0.03,
        weight_cost=0.05 if is_plain else 1.0,
        prefetches=True,
        sweeps=is_plain and request.inputs[0] == "float32",
        lookahead=176,
    )


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("avx512_vnni", _dot, _LANES, lambda _: "vpdpbusd", (16, 32, 64)), common_family(_LANES)),
    frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}),
    host=Host("x86_64", "x86-64-avx512-vnni", "x86-64-v4", ("+avx512vnni",)),
    preference=40,
)
