"""Operands of AArch64 kernels: one load serves several steps, which read its elements by number."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.dot_product import OnePixel
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, int_like, vector_type

LANES = 4
"""32-bit lanes of a register."""
REGISTERS = 32
TOP_BITS = 0x80808080 - 2**32
"""The top bit of each byte of an int32."""


class ElementOperands(OnePixel):
    """The part of a dot product that loads a register of activations for a pixel and multiplies by its elements.

    ``sdot v0.4s, v1.16b, v2.4b[3]`` and ``fmla v0.4s, v1.4s, v2.s[3]`` name the element that they repeat, so no instruction is
    spent on repeating it. Registers hold the operands of all pixels and the weights of a step.
    """

    accumulator_registers: int = 1
    prefetches_outputs: bool = False

    @property
    def row_vectors(self) -> int:
        return 16

    def spare_registers(self, groups: int, vectors: int, chain: int) -> int:
        return groups + chain * vectors * self.accumulator_registers + 1


def element_in_all_lanes(vector: Expression, element: int, lanes: int) -> Expression:
    """One element of a vector in each of ``lanes`` lanes."""
    size = int(vector.ty.dtype.lanes)
    # TVM wants no more lanes to come out of a shuffle than go into it.
    return T.Shuffle([vector] * -(-lanes // size), [element] * lanes)


def load_words(buffer: Buffer, index: Expression, words: int, flip: int = 0) -> Expression:
    """``words`` times four bytes as int32; bits in ``flip`` inverted in each."""
    loaded = buffer.vload([index], vector_type(str(buffer.dtype), 4 * words))
    value = T.reinterpret(vector_type("int32", words), loaded)
    return T.bind(value ^ int_like(flip, value)) if flip else T.bind(value)


def word_operands(buffer: Buffer, index: Expression, words: int, dtype: str, flip: int = 0) -> Sequence[Expression]:
    """Words of four bytes, each repeated in a register of ``dtype`` bytes."""
    value = load_words(buffer, index, words, flip)
    if words == 1:
        return [T.reinterpret(f"{dtype}x16", T.broadcast(value, LANES))]
    return [T.reinterpret(f"{dtype}x16", element_in_all_lanes(value, word, LANES)) for word in range(words)]


def add_neighbours(pairs: Expression) -> Expression:
    """int16x8 to int32x4; with the addition of an accumulator LLVM makes ``sadalp`` of it."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", pairs)


def halves(vector: Expression) -> tuple[Expression, Expression]:
    """The two halves of a vector of two registers."""
    vector = T.bind(vector)
    size = int(vector.ty.dtype.lanes)
    return T.Shuffle([vector], list(range(size // 2))), T.Shuffle([vector], list(range(size // 2, size)))
