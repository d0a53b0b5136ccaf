"""The inner step of an anchor's kernel: what one instruction set does with a few input channels and a vector of outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, LlvmPrimitives, convert, lanes_of, vector_type, widen
from tvm_hquant.kernels.vector_loops import load


class ShortSums(Protocol):
    """Sums of a chain in a narrower type than the accumulators'. A tile may keep these in its registers, and leave its
    accumulators on the stack meanwhile.

    Attributes:
        dtype, lanes: of a vector of sums.
    """

    @property
    def dtype(self) -> str: ...
    @property
    def lanes(self) -> int: ...

    def add(self, total: Expression | None, operand: Expression, weights: Expression) -> Expression:
        """The sums so far, if there are any, plus the products of a step."""

    def widen(self, accumulator: Expression, total: Expression) -> Expression:
        """The accumulator plus the sums of a chain."""


class DotProduct(Protocol):
    """One way to accumulate products for ``lanes`` output channels at once.

    Attributes:
        name: for the kernel's name.
        lanes: output channels of a vector.
        registers: vector registers that a tile may use.
        products: consecutive input channels that a step takes.
        chain: steps that are summed before they reach the accumulator.
        operand_dtype: of activations in memory when the step reads them.
        operand_offset: what is added to stored codes on the way: by the step, or by the copy where ``operand_dtype`` is int8.
        weight_dtype: of packed weights.
        accumulator_dtype: int32 or float32.
        operand_cost: what loading and repeating an operand costs beside the multiply-adds, in multiply-adds of a vector.
        latency: accumulators that hide the latency of a multiply-add.
        operand_steps: steps whose operands come from memory at once, a power of two (a chain takes its own steps at least).
        unrolled: steps that the body of a loop takes. What stands around steps, as the loop itself and asking for memory, is
            instructions too: they count where steps alone are nearly as many as a core starts in their time, and more so where
            another thread runs on the same core.
        groups: groups of channels that the lanes take turns among. The ``products`` channels of every group that a step takes
            then lie side by side in memory, group after group, and ``operands`` gives all of them, for ``in_turns``.
        weight_cost: what loading a vector of weights costs, likewise.
        pixels: neighbouring pixels that share an accumulator.
        accumulator_elements: elements of an accumulator, ``lanes · pixels`` or, where a channel has several sums, a multiple.
        accumulator_registers: vector registers of an accumulator.
        row_vectors: vectors of channels that a tile of one pixel may have: sums enough to hide the latency of wide cores.
        splits_pixels: whether a step may take the last channels of a pixel with the first of the next one, and channels
            once more with weights of zero. Not where ``saturation_free_pairs``, which goes by the channels of a pixel, must
            hold, nor for floats, whose products with zero may be NaN.
        last_channels: how many channels may be left at the end of a pixel for a step of its own, without a chain, that takes
            channels before them once more, with weights of zero. All numbers may where ``splits_pixels``.
        groups_steps: whether any steps may make a chain that :mod:`tvm_hquant.kernels.convolution.step_groups` finds to fit.
        reverses_products: whether the weights of a step stand in the reverse order of its channels.
        prefetches: whether steps ask for memory that is read later: where they are so fast that what comes from behind the
            second-level cache would come too late.
        sweeps: whether convolutions on small maps may take one position of the kernel after the other, each for all outputs
            (:mod:`tvm_hquant.kernels.convolution.position_sweeps`).
        addresses: pixels of a tile of a sweep, at most: each is read at an address of its own, in a register.
        lookahead: instructions around a tile, most of them its epilogue's, that run beside the products of its neighbours,
            since they have units of their own and a core looks so many ahead; 0 where they add to the time of the products.
        prefetches_outputs: whether tiles ask for what their epilogue reads and writes.
        starts_late: whether accumulators start at zero, and what sums start at is added to :meth:`rows`.
        llvm_functions: definitions, in LLVM's language, of the functions that ``accumulate`` calls.
        with_wide_weights: the same for weights in memory in the type in which they are multiplied; None where they are packed
            so, or nothing is gained by it.
    """

    @property
    def name(self) -> str: ...
    @property
    def lanes(self) -> int: ...
    @property
    def registers(self) -> int: ...
    @property
    def products(self) -> int: ...
    @property
    def chain(self) -> int: ...
    @property
    def operand_dtype(self) -> str: ...
    @property
    def operand_offset(self) -> int: ...
    @property
    def weight_dtype(self) -> str: ...
    @property
    def accumulator_dtype(self) -> str: ...
    @property
    def operand_cost(self) -> float: ...
    @property
    def weight_cost(self) -> float: ...
    @property
    def latency(self) -> int: ...
    @property
    def operand_steps(self) -> int: ...
    @property
    def unrolled(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def pixels(self) -> int: ...
    @property
    def accumulator_elements(self) -> int: ...
    @property
    def accumulator_registers(self) -> int: ...
    @property
    def row_vectors(self) -> int: ...
    @property
    def splits_pixels(self) -> bool: ...
    @property
    def last_channels(self) -> tuple[int, ...]: ...
    @property
    def groups_steps(self) -> bool: ...
    @property
    def reverses_products(self) -> bool: ...
    @property
    def prefetches(self) -> bool: ...
    @property
    def sweeps(self) -> bool: ...
    @property
    def addresses(self) -> int: ...
    @property
    def lookahead(self) -> int: ...
    @property
    def prefetches_outputs(self) -> bool: ...
    @property
    def starts_late(self) -> bool: ...
    @property
    def llvm_functions(self) -> str: ...
    @property
    def with_wide_weights(self) -> DotProduct | None: ...

    def for_groups(self, groups: int) -> DotProduct | None:
        """The same for lanes that take turns among as many groups of channels; None if there is no such thing."""

    def spare_registers(self, groups: int, vectors: int, chain: int) -> int:
        """Registers that a step needs beside the accumulators of a tile of ``groups`` times ``pixels`` pixels."""

    def short_sums(self, chain: int) -> ShortSums | None:
        """How a tile keeps the sums of such a chain for all its accumulators at a time; None if each has its chain at once."""

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        """What ``accumulate`` takes for each of ``steps`` steps, from ``steps · products`` activations at each of the
        ``pixels`` indices."""

    def in_turns(self, operand: Expression, turns: Sequence[int]) -> Expression:
        """What ``accumulate`` takes, lane i with the activations of group ``turns[i]``; for one group the operand itself."""

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        """The accumulator plus the products of ``chain`` steps."""

    def fence(self, accumulator: Expression) -> Expression | None:
        """The accumulator behind a place across which compilers move no step; None where they may."""

    def start(self, values: Expression) -> Expression:
        """An accumulator that holds the values of ``lanes`` channels for each of its pixels."""

    def rows(self, accumulator: Expression) -> Sequence[Expression]:
        """The ``lanes`` sums of each pixel of an accumulator."""


class OnePixel:
    """The part of a dot product whose accumulators are vectors of channels of one pixel."""

    lanes: int
    latency: int = 12
    splits_pixels: bool = False
    last_channels: tuple[int, ...] = ()
    groups: int = 1
    groups_steps: bool = False
    reverses_products: bool = False
    prefetches: bool = False
    unrolled: int = 1
    sweeps: bool = False
    addresses: int = 8
    lookahead: int = 0
    prefetches_outputs: bool = True
    starts_late: bool = False
    llvm_functions: str = ""

    @property
    def with_wide_weights(self) -> DotProduct | None:
        return None

    @property
    def row_vectors(self) -> int:
        return 8

    @property
    def pixels(self) -> int:
        return 1

    @property
    def weight_cost(self) -> float:
        return 1.0

    @property
    def accumulator_elements(self) -> int:
        return self.lanes

    def short_sums(self, chain: int) -> ShortSums | None:
        return None

    def for_groups(self, groups: int) -> DotProduct | None:
        return None

    def in_turns(self, operand: Expression, turns: Sequence[int]) -> Expression:
        return operand

    def fence(self, accumulator: Expression) -> Expression | None:
        return None

    def start(self, values: Expression) -> Expression:
        return values

    def rows(self, accumulator: Expression) -> Sequence[Expression]:
        return [accumulator]


class RepeatedOperand(OnePixel, ABC):
    """The part of a dot product that loads one operand for each step and repeats it in all lanes."""

    chain: int
    products: int
    registers: int
    operand_dtype: str

    def operand(self, buffer: Buffer, index: Expression) -> Expression:
        """``products`` neighbouring activations, repeated in all lanes."""
        return self.of_units(T.broadcast(self.loaded_units(buffer, index, 1), self.lanes))

    @abstractmethod
    def of_units(self, units: Expression) -> Expression:
        """What ``accumulate`` takes, of the activations that every lane multiplies, as one integer a lane."""

    def loaded_units(self, buffer: Buffer, index: Expression, count: int) -> Expression:
        """``count`` times ``products`` neighbouring activations, as one integer each."""
        bits = np.dtype(self.operand_dtype).itemsize * 8 * self.products
        loaded = load(buffer, index, count * self.products)
        return T.reinterpret(vector_type(f"int{bits}", count), loaded)

    @property
    def operand_steps(self) -> int:
        return 1

    @property
    def accumulator_registers(self) -> int:
        return 1

    def spare_registers(self, groups: int, vectors: int, chain: int) -> int:
        # A chain keeps the weights of all its steps.
        if chain > 1 and vectors > 1:
            return self.registers
        return vectors + (2 if self.chain > 1 or self.products > 1 else 1)

    def operands(self, buffer: Buffer, indices: Sequence[Expression], steps: int) -> Sequence[Expression]:
        starts = [indices[0] + step * self.products * self.groups for step in range(steps)]
        if self.groups == 1:
            return [self.operand(buffer, start) for start in starts]
        return [self.loaded_units(buffer, start, units_loaded(self.groups)) for start in starts]

    def in_turns(self, operand: Expression, turns: Sequence[int]) -> Expression:
        if self.groups == 1:
            return operand
        # TVM wants no more lanes to come out of a shuffle than go into it.
        copies = -(-self.lanes // lanes_of(operand))
        return self.of_units(T.Shuffle([operand] * copies, list(turns)))


@dataclass(frozen=True)
class FloatDot(RepeatedOperand):
    """float32 fused multiply-adds; weights in any float storage are widened, which is exact."""

    lanes: int
    registers: int
    storage: str = "float32"
    products: int = 1
    chain: int = 1
    operand_dtype: str = "float32"
    operand_offset: int = 0
    accumulator_dtype: str = "float32"
    operand_cost: float = 0.5
    weight_cost: float = 1.0
    prefetches: bool = False
    unrolled: int = 1
    sweeps: bool = False
    lookahead: int = 0
    latency: int = 12
    groups: int = 1

    @property
    def name(self) -> str:
        return f"{self.storage}_fma"

    @property
    def weight_dtype(self) -> str:
        return "uint16" if self.storage == "bfloat16" else self.storage

    def for_groups(self, groups: int) -> DotProduct:
        return replace(self, groups=groups)

    def operand(self, buffer: Buffer, index: Expression) -> Expression:
        return T.broadcast(buffer[index], self.lanes)

    def of_units(self, units: Expression) -> Expression:
        return T.reinterpret(vector_type("float32", self.lanes), units)

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        return LlvmPrimitives().fma(operands[0], widen(weights[0], self.storage), accumulator)


@dataclass(frozen=True)
class WideningDot(RepeatedOperand):
    """int32 multiply-adds of widened codes: what any LLVM target compiles (``smlal`` on NEON, ``vpmaddwd`` on x86)."""

    lanes: int
    registers: int
    products: int = 1
    chain: int = 1
    operand_dtype: str = "int16"
    operand_offset: int = 0
    weight_dtype: str = "int16"
    accumulator_dtype: str = "int32"
    name: str = "widening"
    operand_cost: float = 0.5
    groups: int = 1

    def for_groups(self, groups: int) -> DotProduct:
        return replace(self, groups=groups)

    def of_units(self, units: Expression) -> Expression:
        return convert(units, "int32")

    def accumulate(
        self, accumulator: Expression, operands: Sequence[Expression], weights: Sequence[Expression]
    ) -> Expression:
        return accumulator + operands[0] * convert(weights[0], "int32")


def units_loaded(groups: int) -> int:
    """Groups whose activations are loaded at once, for so many that take turns: a power of two."""
    return 1 << (groups - 1).bit_length()


def repeated_word(buffer: Buffer, index: Expression, dtype: str, lanes: int) -> Expression:
    """Four bytes at ``index`` in each of ``lanes`` 32-bit lanes, as a vector of ``dtype``."""
    count = 4 // np.dtype(dtype).itemsize
    word = T.reinterpret("int32", buffer.vload([index], vector_type(str(buffer.dtype), count)))
    return T.reinterpret(vector_type(dtype, count * lanes), T.broadcast(word, lanes))
