"""AArch64 with int8 matrix multiplication (Neoverse V1 and N2, Apple M2, Armv8.6): ``usmmla`` and ``sudot``.

``usmmla`` multiplies the codes of two pixels by the weights of two output channels, eight input channels at once, and adds
the four sums to int32: twice the products of ``sdot``. Its activations are unsigned, as stored. Where a row has one pixel, as
in dense layers, ``sudot`` adds four products to each of four sums.

Source: Arm Architecture Reference Manual, USMMLA (vector) and SUDOT (by element).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.arm.codes import ArmRegisters
from tvm_hquant.kernels.arm.floats import arm_float_dot
from tvm_hquant.kernels.arm.operands import LANES, REGISTERS, ElementOperands, halves, word_operands
from tvm_hquant.kernels.arm.words import ArmWords
from tvm_hquant.kernels.convolution.geometry import as_conv2d
from tvm_hquant.kernels.depthwise.interleaved import interleaved_depthwise_kernel
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.processor import Processor
from tvm_hquant.kernels.weightless.family import CommonFamily
from tvm_hquant.operators import Conv2D, Dense


@dataclass(frozen=True)
class UsmmlaDot:
    """Eight channels a step, for two pixels and four output channels: two instructions.

    An accumulator holds pixel and channel as 00 01 10 11 02 03 12 13.
    """

    lanes: int = LANES
    registers: int = REGISTERS
    products: int = 8
    chain: int = 1
    operand_dtype: str = "uint8"
    operand_offset: int = 0
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "usmmla"
    operand_cost: float = 1.0
    weight_cost: float = 1.0
    operand_steps: int = 2
    pixels: int = 2
    accumulator_elements: int = 2 * LANES
    splits_pixels: bool = False
    last_channels: tuple[int, ...] = ()
    groups: int = 1
    groups_steps: bool = False
    reverses_products: bool = False
    prefetches: bool = False
    unrolled: int = 1
    sweeps: bool = False
    addresses: int = 0
    lookahead: int = 0
    prefetches_outputs: bool = False
    starts_late: bool = False
    latency: int = 12
    llvm_functions: str = ""
    with_wide_weights: None = None
    accumulator_registers: int = 2
    row_vectors: int = 8

    def for_groups(self, groups: int) -> DotProduct | None:
        return None

    def in_turns(self, operand: Expression, turns: Sequence[int]) -> Expression:
        return operand

    def spare_registers(self, groups: int, vectors: int, chain: int) -> int:
        return self.operand_steps * groups + 2 * vectors

    def short_sums(self, chain: int) -> None:
        return None

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        rows = [T.bind(buffer.vload([index], f"uint8x{8 * steps}")) for index in indices]
        length = 8 * steps
        return [
            T.Shuffle(rows, [pixel * length + 8 * step + i for pixel in range(2) for i in range(8)])
            for step in range(steps)
        ]

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        sums = [
            T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.usmmla", part, operands[0], of_two_channels)
            for part, of_two_channels in zip(halves(accumulator), halves(weights[0]), strict=True)
        ]
        return T.Shuffle(sums, list(range(8)))

    def fence(self, accumulator: Expression) -> None:
        return None

    def start(self, values: Expression) -> Expression:
        return T.Shuffle([values, values], [0, 1, 0, 1, 2, 3, 2, 3])

    def rows(self, accumulator: Expression) -> Sequence[Expression]:
        accumulator = T.bind(accumulator)
        return [T.Shuffle([accumulator], [0, 1, 4, 5]), T.Shuffle([accumulator], [2, 3, 6, 7])]


@dataclass(frozen=True)
class SudotDot(ElementOperands):
    """Four channels a step for one pixel."""

    lanes: int = LANES
    registers: int = REGISTERS
    products: int = 4
    chain: int = 1
    operand_dtype: str = "uint8"
    operand_offset: int = 0
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "sudot"
    operand_cost: float = 0.25
    operand_steps: int = 4

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        return word_operands(buffer, indices[0], steps, "int8")

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.usdot", accumulator, operands[0], weights[0])


def _dot(request: KernelRequest) -> DotProduct:
    if request.weights == "int8":
        return UsmmlaDot() if _has_pairs_of_pixels(request) else SudotDot()
    return arm_float_dot(request)


def _has_pairs_of_pixels(request: KernelRequest) -> bool:
    assert isinstance(request.operator, (Conv2D, Dense))
    conv = as_conv2d(request.operator)
    return not conv.is_depthwise and conv.output_shape[2] > 1 and conv.out_channels // conv.groups >= LANES


def _depthwise(request: KernelRequest, family: str, processor: Processor) -> Kernel | None:
    return interleaved_depthwise_kernel(request, (ArmWords(product="usdot"),), family, processor)


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("arm_i8mm", _dot, LANES, depthwise=_depthwise, codes=ArmRegisters()), CommonFamily(LANES)),
    frozenset({"asimd", "asimddp", "i8mm"}),
    host=Host("aarch64"),
    preference=35,
)
