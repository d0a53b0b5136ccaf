"""The float32 operations that kernels are written with, each rounded alone, spelled for one compiler.

A bare ``a * b`` that feeds an addition would be contracted to a fused multiply-add by LLVM as TVM sets it up, and by nvcc.
So kernels never write one: they take these primitives, and a target that spells them otherwise replaces the object.
All of them work on scalars and on vectors; the number of lanes is that of the operands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tvm.tirx.script import builder as T

Expression = Any
"""A TIR expression of a primitive type."""


def lanes_of(value: Expression) -> int:
    """How many lanes an expression has; 1 for scalars."""
    return int(value.ty.dtype.lanes)


def vector_type(dtype: str, lanes: int) -> str:
    """The name of a vector type such as ``float32x8``; the scalar type for one lane."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def broadcast(value: Expression, lanes: int) -> Expression:
    """A scalar in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def convert(value: Expression, dtype: str) -> Expression:
    """``value`` converted to the element type ``dtype``."""
    return T.Cast(vector_type(dtype, lanes_of(value)), value)


def reinterpret(value: Expression, dtype: str) -> Expression:
    """The bits of ``value`` as another element type of the same width."""
    return T.reinterpret(vector_type(dtype, lanes_of(value)), value)


def float_like(number: float, value: Expression) -> Expression:
    """The float32 ``number`` in as many lanes as ``value`` has."""
    return broadcast(T.float32(number), lanes_of(value))


def int_like(number: int, value: Expression) -> Expression:
    """The int32 ``number`` in as many lanes as ``value`` has."""
    return broadcast(T.int32(number), lanes_of(value))


def select(condition: Expression, chosen: Expression, other: Expression) -> Expression:
    """``condition ? chosen : other``, lane by lane; both are evaluated."""
    return T.Select(condition, chosen, other)


def is_nan(value: Expression) -> Expression:
    """Whether a float32 is NaN, from its bits: a comparison with itself could be folded away."""
    magnitude = reinterpret(value, "int32") & int_like(0x7FFFFFFF, value)
    return magnitude > int_like(0x7F800000, value)


class Primitives(Protocol):
    """Arithmetic of float32 scalars or vectors as one compiler must be told to do it."""

    def fma(self, a: Expression, b: Expression, c: Expression) -> Expression:
        """a·b + c, rounded once."""

    def multiply(self, a: Expression, b: Expression) -> Expression:
        """a·b, rounded alone whatever follows."""

    def add(self, a: Expression, b: Expression) -> Expression:
        """a + b, rounded alone."""

    def subtract(self, a: Expression, b: Expression) -> Expression:
        """a − b, rounded alone."""

    def divide(self, a: Expression, b: Expression) -> Expression:
        """a / b, correctly rounded."""

    def square_root(self, a: Expression) -> Expression:
        """√a, correctly rounded."""

    def round(self, a: Expression) -> Expression:
        """The nearest integer, ties to even, as float32."""

    def round_to_int32(self, a: Expression) -> Expression:
        """The nearest integer, ties to even, as int32. ``a`` lies within int32."""

    def bind(self, value: Expression) -> Expression:
        """A value that is used more than once, kept so that it is computed once. Emits statements at this place."""


def _llvm(name: str, dtype: str, *arguments: Expression) -> Expression:
    result = vector_type(dtype, lanes_of(arguments[0]))
    return T.call_llvm_pure_intrin(result, name, *arguments)


@dataclass(frozen=True)
class LlvmPrimitives:
    """For LLVM on any processor. ``in_blocks`` says that expressions are made inside schedulable blocks."""

    in_blocks: bool = False

    def fma(self, a: Expression, b: Expression, c: Expression) -> Expression:
        return _llvm("llvm.fma", "float32", a, b, c)

    def multiply(self, a: Expression, b: Expression) -> Expression:
        return _llvm("llvm.arithmetic.fence", "float32", a * b)

    def add(self, a: Expression, b: Expression) -> Expression:
        return a + b

    def subtract(self, a: Expression, b: Expression) -> Expression:
        return a - b

    def divide(self, a: Expression, b: Expression) -> Expression:
        return a / b

    def square_root(self, a: Expression) -> Expression:
        return _llvm("llvm.sqrt", "float32", a)

    def round(self, a: Expression) -> Expression:
        return _llvm("llvm.rint", "float32", a)

    def round_to_int32(self, a: Expression) -> Expression:
        return _llvm("llvm.lrint", "int32", a)

    def bind(self, value: Expression) -> Expression:
        return _cell(value, STACK, self.in_blocks)


STACK = "global"
"""The storage scope in which TVM puts small buffers of a CPU function on the stack, where LLVM makes registers of them.
A ``local`` buffer is fetched from the workspace allocator instead, at run time (``lower_tvm_builtin.cc``)."""


def _cell(value: Expression, scope: str, in_block: bool) -> Expression:
    """The value in a buffer of its own, which compilers keep in a register.

    Not a variable: TVM's simplifier puts a variable's value back wherever it is used, so that chains of them grow
    exponentially. A block must own its buffers, or schedules take them for its inputs and outputs.
    """
    lanes = lanes_of(value)
    element = str(value.ty.dtype).partition("x")[0] if lanes > 1 else str(value.ty.dtype)
    allocate = T.sblock_alloc_buffer if in_block else T.alloc_buffer
    cell = allocate((lanes,), element, scope=scope)
    T.buffer_store(cell, value, [0 if lanes == 1 else T.ramp(0, 1, lanes)])
    return cell[0] if lanes == 1 else cell.vload([0], vector_type(element, lanes))


def _device_function(dtype: str, name: str, *arguments: Expression) -> Expression:
    if lanes_of(arguments[0]) != 1:
        raise ValueError(f"{name} takes scalars: CUDA kernels are written without vectors")
    return T.call_pure_extern(dtype, name, *arguments)


@dataclass(frozen=True)
class CudaPrimitives:
    """For CUDA: the intrinsics that nvcc never contracts and that ``--use_fast_math`` does not replace.

    That option still flushes denormals; set ``TVM_CUDA_NVCC_NO_FAST_MATH=1`` when compiling. ``in_blocks`` says that
    expressions are made inside schedulable blocks.
    """

    in_blocks: bool = True

    def fma(self, a: Expression, b: Expression, c: Expression) -> Expression:
        return _device_function("float32", "__fmaf_rn", a, b, c)

    def multiply(self, a: Expression, b: Expression) -> Expression:
        return _device_function("float32", "__fmul_rn", a, b)

    def add(self, a: Expression, b: Expression) -> Expression:
        return _device_function("float32", "__fadd_rn", a, b)

    def subtract(self, a: Expression, b: Expression) -> Expression:
        return _device_function("float32", "__fsub_rn", a, b)

    def divide(self, a: Expression, b: Expression) -> Expression:
        return _device_function("float32", "__fdiv_rn", a, b)

    def square_root(self, a: Expression) -> Expression:
        return _device_function("float32", "__fsqrt_rn", a)

    def round(self, a: Expression) -> Expression:
        return _device_function("float32", "rintf", a)

    def round_to_int32(self, a: Expression) -> Expression:
        return _device_function("int32", "__float2int_rn", a)

    def bind(self, value: Expression) -> Expression:
        return _cell(value, "local", self.in_blocks)


def _c_function(name: str, *arguments: Expression) -> Expression:
    if lanes_of(arguments[0]) != 1:
        raise ValueError(f"{name} takes scalars: kernels in C are written without vectors")
    return T.call_pure_extern("float32", name, *arguments)


@dataclass(frozen=True)
class CSourcePrimitives:
    """For C99, compiled with ``-ffp-contract=off``: then operators round alone, and ``fmaf`` fuses where it is meant to."""

    def fma(self, a: Expression, b: Expression, c: Expression) -> Expression:
        return _c_function("fmaf", a, b, c)

    def multiply(self, a: Expression, b: Expression) -> Expression:
        return a * b

    def add(self, a: Expression, b: Expression) -> Expression:
        return a + b

    def subtract(self, a: Expression, b: Expression) -> Expression:
        return a - b

    def divide(self, a: Expression, b: Expression) -> Expression:
        return a / b

    def square_root(self, a: Expression) -> Expression:
        return _c_function("sqrtf", a)

    def round(self, a: Expression) -> Expression:
        return _c_function("rintf", a)

    def round_to_int32(self, a: Expression) -> Expression:
        return convert(self.round(a), "int32")

    def bind(self, value: Expression) -> Expression:
        return _cell(value, STACK, in_block=True)


def clamp(p: Primitives, value: Expression, lower: Expression, upper: Expression) -> Expression:
    """v = v > lower ? v : lower; v = v < upper ? v : upper. A NaN gives ``lower``. The bounds are scalars."""
    lanes = lanes_of(value)
    low, high = broadcast(lower, lanes), broadcast(upper, lanes)
    value = p.bind(value)
    value = p.bind(select(value > low, value, low))
    return select(value < high, value, high)


def widen(value: Expression, storage: str) -> Expression:
    """The float32 of a value in float storage; exact."""
    if storage == "bfloat16":
        return reinterpret(convert(value, "int32") << int_like(16, value), "float32")
    return value if storage == "float32" else convert(value, "float32")


def narrow(p: Primitives, value: Expression, storage: str, may_be_nan: bool = True) -> Expression:
    """A float32 rounded once to a float storage, ties to even; bfloat16 by integer arithmetic, as its uint16 pattern.

    What comes from a clamp or a maximum is a number, whose bits take fewer steps.
    """
    if storage == "bfloat16":
        value = p.bind(value)
        # In uint32, whose sums may wrap: the largest NaN pattern does.
        bits = p.bind(reinterpret(value, "uint32"))
        one, sixteen = _unsigned_like(1, value), _unsigned_like(16, value)
        high = p.bind(bits >> sixteen)
        rounded = (bits + _unsigned_like(0x7FFF, value) + (high & one)) >> sixteen
        if not may_be_nan:
            return convert(rounded, "uint16")
        return convert(select(is_nan(value), high | _unsigned_like(0x40, value), rounded), "uint16")
    return value if storage == "float32" else convert(value, "float16")


def _unsigned_like(number: int, value: Expression) -> Expression:
    return broadcast(T.uint32(number), lanes_of(value))


def requantize(
    p: Primitives, value: Expression, lower: Expression, upper: Expression, zero_point: Expression, storage: str
) -> Expression:
    """The end of an integer epilogue (``kernels.interface.Requantization``) for float32 ``value``: its stored form.

    Clamping comes before converting, since what a conversion does out of range differs between processors.
    """
    value = clamp(p, value, lower, upper)
    if storage not in ("uint8", "uint16"):
        return narrow(p, value, storage)
    codes = p.round_to_int32(value) + broadcast(zero_point, lanes_of(value))
    return convert(codes, storage)


def quantize(p: Primitives, value: Expression, floats: Any, zero_point: Any, storage: str) -> Expression:
    """The stored code of float32 ``value``: a true division by the scale, then :func:`requantize`.

    ``floats`` and ``zero_point`` are the arrays of ``QuantizeConstants``: [scale, lower, upper] and [zero point].
    """
    v = p.divide(value, broadcast(floats[0], lanes_of(value)))
    return requantize(p, v, floats[1], floats[2], zero_point[0], storage)


def centred(value: Expression, zero_point: Expression) -> Expression:
    """int32 code − zero point, of a stored uint8 or uint16 code."""
    return convert(value, "int32") - broadcast(zero_point, lanes_of(value))
