"""Products of codes on plain NEON without repeating an activation: sixteen channels of a pixel times sixteen of each output.

``smull`` and ``smlal2`` multiply the two halves of a register of activations with those of a register of weights and add
eight pairs of products in int16; ``sadalp`` adds neighbours of these to four int32 sums of the output. So every register of
activations serves all outputs as it was loaded; the four sums are added up once, in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.arm.operands import LANES, REGISTERS, add_neighbours, halves
from tvm_hquant.kernels.dot_product import OnePixel
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, convert

_STEP = 16
"""Channels of a step: the bytes of a register."""
_FENCE = "hquant_fence_octets"
_FENCE_DEFINITION = f"""
define linkonce_odr <16 x i32> @{_FENCE}(<16 x i32> %sums) alwaysinline {{
  %a = shufflevector <16 x i32> %sums, <16 x i32> poison, <4 x i32> <i32 0, i32 1, i32 2, i32 3>
  %b = shufflevector <16 x i32> %sums, <16 x i32> poison, <4 x i32> <i32 4, i32 5, i32 6, i32 7>
  %c = shufflevector <16 x i32> %sums, <16 x i32> poison, <4 x i32> <i32 8, i32 9, i32 10, i32 11>
  %d = shufflevector <16 x i32> %sums, <16 x i32> poison, <4 x i32> <i32 12, i32 13, i32 14, i32 15>
  %r = call {{<4 x i32>, <4 x i32>, <4 x i32>, <4 x i32>}} asm sideeffect "", "=w,=w,=w,=w,0,1,2,3"(
    <4 x i32> %a, <4 x i32> %b, <4 x i32> %c, <4 x i32> %d)
  %e = extractvalue {{<4 x i32>, <4 x i32>, <4 x i32>, <4 x i32>}} %r, 0
  %f = extractvalue {{<4 x i32>, <4 x i32>, <4 x i32>, <4 x i32>}} %r, 1
  %g = extractvalue {{<4 x i32>, <4 x i32>, <4 x i32>, <4 x i32>}} %r, 2
  %h = extractvalue {{<4 x i32>, <4 x i32>, <4 x i32>, <4 x i32>}} %r, 3
  %ef = shufflevector <4 x i32> %e, <4 x i32> %f, <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  %gh = shufflevector <4 x i32> %g, <4 x i32> %h, <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  %all = shufflevector <8 x i32> %ef, <8 x i32> %gh, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
    i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  ret <16 x i32> %all
}}
"""
"""No instruction, but a place in a function: loads do not move across it, and the sums are there when it is reached."""


@dataclass(frozen=True)
class OctetDot(OnePixel):
    """Sixteen channels a step for four output channels, each with a register of four sums.

    ``chain`` steps are summed in int16, lane by lane, two products each.
    """

    chain: int
    splits_pixels: bool
    lanes: int = LANES
    registers: int = REGISTERS
    products: int = _STEP
    operand_dtype: str = "int8"
    operand_offset: int = -128
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "smlal2"
    operand_cost: float = 0.5
    operand_steps: int = 2
    accumulator_registers: int = LANES
    accumulator_elements: int = LANES * LANES
    # Four loads, which cores that work in order do not hide.
    weight_cost: float = 3.0
    row_vectors: int = 3
    prefetches_outputs: bool = False
    starts_late: bool = True
    llvm_functions: str = _FENCE_DEFINITION

    def spare_registers(self, groups: int, vectors: int, chain: int) -> int:
        # Counted in assembly: with more sums, LLVM puts some on the stack.
        return chain * groups + (8 + 4 * vectors if groups > 1 else 12 + 2 * chain)

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        return [buffer.vload([indices[0] + step * _STEP], f"int8x{_STEP}") for step in range(steps)]

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        accumulator = T.bind(accumulator)
        of_lanes = []
        for lane in range(LANES):
            of_lane = [T.Shuffle([w], [lane * _STEP + i for i in range(_STEP)]) for w in weights]
            factors = [
                (convert(x, "int16"), convert(w, "int16"))
                for operand, weight in zip(operands, of_lane, strict=True)
                for x, w in zip(halves(operand), halves(weight), strict=True)
            ]
            total = factors[0][0] * factors[0][1]
            for x, w in factors[1:]:
                total = total + x * w
            sums = T.Shuffle([accumulator], [lane * LANES + i for i in range(LANES)])
            of_lanes.append(sums + add_neighbours(total))
        return T.Shuffle(of_lanes, list(range(self.accumulator_elements)))

    def fence(self, accumulator: Expression) -> Expression:
        """Left alone, LLVM does the products of several kernel positions first, and puts them on the stack meanwhile."""
        return T.call_pure_extern("int32x16", _FENCE, accumulator)

    def start(self, values: Expression) -> Expression:
        """The value of each channel in the first of its sums, and zero in the others."""
        zeros = T.broadcast(T.int32(0), LANES)
        order = [i // LANES if i % LANES == 0 else LANES + i % LANES for i in range(self.accumulator_elements)]
        # TVM wants no more lanes to come out of a shuffle than go into it.
        return T.Shuffle([T.bind(values), zeros, zeros, zeros], order)

    def rows(self, accumulator: Expression) -> Sequence[Expression]:
        lower, upper = halves(accumulator)
        pairs = [_add_pairs(*halves(part)) for part in (lower, upper)]
        return [_add_pairs(*pairs)]


def octet_dot(centred_products: int) -> OctetDot:
    """The dot product where so many products surely fit int16, two at least."""
    chain = centred_products // 2
    # Any two products fit; what longer chains may hold was proven for the channels of a pixel.
    return OctetDot(chain, splits_pixels=chain == 1)


def _add_pairs(a: Expression, b: Expression) -> Expression:
    """Sums of neighbours: those of ``a``, then those of ``b``."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp", a, b)
