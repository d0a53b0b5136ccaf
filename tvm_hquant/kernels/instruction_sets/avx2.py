"""Plain AVX2: ``vpmaddwd`` for any int8 weights, ``vpmaddubsw`` where the weights prove that int16 sums suffice.

``vpmaddwd`` adds two products of int16 values in int32. ``vpmaddubsw`` adds two products of u8 and s8 codes in int16; with
weights of 7 bits one such sum cannot saturate, nor can mostly two in an order of steps that the weights decide; with 6 bits
two, with 4 bits eight or, mostly, 16 and more, and then half as many instructions or fewer do the same work, bit for bit. Sums
of long chains stay in the registers of a tile, and its int32 sums wait on the stack: so each weight and each activation is
loaded once for the whole tile. 3×3 layers mostly take Winograd's algorithm in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.convolution.winograd import can_transform, saved_products
from tvm_hquant.kernels.dot_product import DotProduct, FloatDot, RepeatedOperand, ShortSums
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.primitives import Expression, convert
from tvm_hquant.kernels.processor import Processor
from tvm_hquant.kernels.x86.byte_vectors import WordProduct
from tvm_hquant.kernels.x86.common_family import common_family
from tvm_hquant.operators import Conv2D

_LANES = 8
_REGISTERS = 16
_LONG_CHAIN = 4
"""Steps from which sums of a chain stay in registers, and the wide ones go to the stack meanwhile."""

_SAVED = ((4, 2.15), (2, 2.0), (1, 1.8), (0, 1.5))
"""Times fewer products that make Winograd's algorithm worth its transforms, by how many sums of pairs fit int16 at least: the
products are ``vpmaddwd``, and without it narrower weights take less time."""


@dataclass(frozen=True)
class WordDot(RepeatedOperand):
    """``vpmaddwd``: two channels a step. Activations are widened to int16 beforehand; so are weights, or by steps."""

    lanes: int = _LANES
    registers: int = _REGISTERS
    products: int = 2
    chain: int = 1
    operand_dtype: str = "int16"
    operand_offset: int = 0
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "vpmaddwd"
    splits_pixels: bool = True
    operand_cost: float = 0.5
    groups: int = 1

    @property
    def with_wide_weights(self) -> DotProduct | None:
        return replace(self, weight_dtype="int16") if self.weight_dtype == "int8" else None

    def for_groups(self, groups: int) -> DotProduct:
        return replace(self, groups=groups)

    def of_units(self, units: Expression) -> Expression:
        return T.reinterpret(f"int16x{2 * self.lanes}", units)

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        return accumulator + _add_pairs(operands[0], convert(weights[0], "int16"))


@dataclass(frozen=True)
class _WordSums:
    """Sums of pairs in int16."""

    lanes: int
    dtype: str = "int16"

    def add(self, total: Expression | None, operand: Expression, weights: Expression) -> Expression:
        products = self.product(operand, weights)
        if total is None:
            return products
        # LLVM would add products of several steps first, which takes more registers.
        fenced = T.call_llvm_pure_intrin(
            f"float32x{self.lanes // 2}",
            "llvm.arithmetic.fence",
            T.reinterpret(f"float32x{self.lanes // 2}", total + products),
        )
        return T.reinterpret(f"int16x{self.lanes}", fenced)

    def product(self, operand: Expression, weights: Expression) -> Expression:
        return T.call_llvm_pure_intrin(f"int16x{self.lanes}", "llvm.x86.avx2.pmadd.ub.sw", operand, weights)

    def widen(self, accumulator: Expression, total: Expression) -> Expression:
        return accumulator + _add_pairs(total, T.broadcast(T.int16(1), self.lanes))


@dataclass(frozen=True)
class ByteDot(RepeatedOperand):
    """``vpmaddubsw``: four channels a step, ``chain`` steps summed in int16, then widened by ``vpmaddwd`` with ones."""

    chain: int
    lanes: int = _LANES
    registers: int = _REGISTERS
    products: int = 4
    operand_dtype: str = "uint8"
    operand_offset: int = 0
    weight_dtype: str = "int8"
    accumulator_dtype: str = "int32"
    name: str = "vpmaddubsw"
    operand_cost: float = 0.5
    groups: int = 1
    # Two channels are a pair that the weights were asked about; of three, the first would meet another neighbour.
    last_channels: tuple[int, ...] = (1, 2)
    groups_steps: bool = True

    def short_sums(self, chain: int) -> ShortSums | None:
        return _WordSums(2 * self.lanes) if chain >= _LONG_CHAIN else None

    def spare_registers(self, groups: int, vectors: int, chain: int) -> int:
        # Measured: what a step needs, and some more, or sums go to the stack and are waited for.
        if chain == 1:
            return 6 if vectors == 1 else 8
        if chain >= _LONG_CHAIN:
            return 8 if vectors == 1 else vectors + 4
        return super().spare_registers(groups, vectors, chain)

    def for_groups(self, groups: int) -> DotProduct:
        return replace(self, groups=groups)

    def of_units(self, units: Expression) -> Expression:
        return T.reinterpret(f"int8x{4 * self.lanes}", units)

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        sums = _WordSums(2 * self.lanes)
        total = sums.product(operands[0], weights[0])
        for x, w in zip(operands[1:], weights[1:], strict=True):
            total = total + sums.product(x, w)
        return sums.widen(accumulator, total)


def _add_pairs(a: Expression, b: Expression) -> Expression:
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)


def _dot(request: KernelRequest) -> DotProduct:
    if request.weights == "int8":
        pairs = request.saturation_free_pairs
        return ByteDot(pairs) if pairs else WordDot()
    # Measured on a Zen 4: an operand, which is repeated as it is loaded, costs less than half of what a vector of weights does.
    # The latency is four cycles of two multiply-adds each.
    sweeps = request.weights == request.inputs[0] == "float32"
    return FloatDot(
        _LANES,
        _REGISTERS,
        request.weights,
        operand_cost=0.45,
        prefetches=True,
        unrolled=4,
        sweeps=sweeps,
        lookahead=176,
        latency=8,
    )


def _word_product(request: KernelRequest) -> WordProduct:
    return "vpmaddubsw" if request.saturation_free_pairs else "vpmaddwd"


def _is_faster_transformed(request: KernelRequest, processor: Processor) -> bool:
    """Whether a 3×3 layer takes less time by Winograd's algorithm."""
    if not can_transform(request, _LANES):
        return False
    assert isinstance(request.operator, Conv2D)
    least = next(saved for pairs, saved in _SAVED if request.saturation_free_pairs >= pairs)
    return saved_products(request.operator, _LANES, processor) >= least


INSTRUCTION_SET = InstructionSet(
    (
        AnchorFamily("avx2", _dot, _LANES, _word_product, (16, 32), winograd=_is_faster_transformed),
        common_family(_LANES),
    ),
    frozenset({"avx2", "fma"}),
    host=Host("x86_64", "x86-64-avx2", "x86-64-v3"),
    preference=20,
)
