"""Operators that compute each element from the elements at the same place: Add, Unary and Convert.

An :class:`ElementwiseForm` is the arithmetic of one request, on scalars or vectors. The vector kernel of this module and the
plain loops of the reference family both take it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_hquant import numerics
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.constant_arrays import to_arrays
from tvm_hquant.kernels.float_math import unary
from tvm_hquant.kernels.interface import (
    Array,
    DequantizeConstants,
    FloatElementwiseConstants,
    IntegerElementwiseConstants,
    Kernel,
    KernelRequest,
    LayerConstants,
    NoConstants,
    QuantizeConstants,
    TableConstants,
)
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, kernel_function
from tvm_hquant.kernels.primitives import (
    Expression,
    LlvmPrimitives,
    Primitives,
    broadcast,
    centred,
    clamp,
    convert,
    float_like,
    lanes_of,
    narrow,
    quantize,
    requantize,
    widen,
)
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import (
    ARITHMETIC,
    MOVE,
    elements,
    flat,
    load,
    store,
    vectors,
)
from tvm_hquant.kernels.weightless.element_loops import element_loop, fitting_width, neighbours
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Add, Convert, Unary
from tvm_hquant.tensor_format import STORAGE_DTYPE

_UNROLLED = 16
"""Look-ups written out one after the other: of a plain loop LLVM makes AVX-512 gathers, at a third of the speed."""
_FUNCTION = 30
"""Instructions that compute a function of a vector of float32."""

QUANTIZE_TYPES: tuple[ArrayType, ...] = (((3,), "float32"), ((1,), "int32"))
"""Types of the arrays of ``QuantizeConstants``."""

Pack = Callable[[LayerConstants], tuple[Array, ...]]
Value = Callable[[Primitives, Sequence[Expression], Sequence[Any]], Expression]
"""The stored output from the stored inputs; the constants are buffers or ``te`` tensors, read by index."""


@dataclass(frozen=True)
class ElementwiseForm:
    """The arithmetic of an elementwise request.

    Attributes:
        name: for reports.
        constants: types of the constant arrays.
        value: see :data:`Value`.
        pack: makes the constant arrays.
        vectorizes: whether it works on vectors; looking up a table does not gain from them.
        instructions: of a vector, or of an element where there are none.
    """

    name: str
    constants: tuple[ArrayType, ...]
    value: Value
    pack: Pack
    vectorizes: bool = True
    instructions: int = ARITHMETIC


def is_code(storage: str) -> bool:
    """Whether a storage holds integer codes."""
    return storage in ("uint8", "uint16")


def wrong_constants(request: KernelRequest, constants: LayerConstants, wanted: str) -> KernelError:
    """The error for constants of another class than the kernel of a request takes."""
    return KernelError(
        f"{request.operator} from {', '.join(request.inputs)} to {request.output} takes {wanted}, "
        f"but {type(constants).__name__} were given"
    )


def pack_only(request: KernelRequest, wanted: type[Any]) -> Pack:
    """A ``pack`` that takes constants of one class, as ``constant_arrays`` lays them out."""

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        if not isinstance(constants, wanted):
            raise wrong_constants(request, constants, wanted.__name__)
        return to_arrays(constants)

    return pack


def float_ending(request: KernelRequest) -> tuple[ArrayType, ...]:
    """Types of the constants with which a float operator ends: those of a quantize where it stores codes, else none."""
    return QUANTIZE_TYPES if is_code(request.output) else ()


def stored_float(p: Primitives, value: Expression, request: KernelRequest, ending: Sequence[Any]) -> Expression:
    """What a float operator stores of a float32: floats of its storage, or codes by the constants of :func:`float_ending`."""
    if not ending:
        return narrow(p, value, request.output)
    floats, zero_point = ending
    return quantize(p, value, floats, zero_point, request.output)


def pack_ending(request: KernelRequest) -> Pack:
    """The ``pack`` of a float operator whose constants are those of :func:`float_ending` alone."""
    return pack_only(request, QuantizeConstants if is_code(request.output) else NoConstants)


def elementwise_form(request: KernelRequest) -> ElementwiseForm | None:
    """The arithmetic of a request, or None if it is not an elementwise one."""
    operator, source = request.operator, request.inputs[0]
    match operator:
        case Add():
            if all(is_code(storage) for storage in request.inputs):
                return _integer_form(request, "add")
            return None if any(is_code(storage) for storage in request.inputs) else _float_add(request, operator)
        case Unary():
            if source == "uint8":
                return _table_form(request)
            if source == "uint16":
                return _integer_form(request, "clip") if operator.function == "clip" else None
            return _float_unary(request, operator) if not is_code(request.output) else None
        case Convert():
            return _convert(request)
    return None


def _integer_form(request: KernelRequest, name: str) -> ElementwiseForm:
    count = len(request.inputs)

    def value(p: Primitives, inputs: Sequence[Expression], constants: Sequence[Any]) -> Expression:
        *multipliers, bounds, zero_points = constants
        v = float_like(0.0, inputs[0])
        for index, (code, multiplier) in enumerate(zip(inputs, multipliers, strict=True)):
            difference = convert(centred(code, zero_points[index]), "float32")
            v = p.fma(difference, broadcast(multiplier[0], lanes_of(code)), v)
        return requantize(p, v, bounds[0], bounds[1], zero_points[count], request.output)

    types: tuple[ArrayType, ...] = (*[((1,), "float32")] * count, ((2,), "float32"), ((count + 1,), "int32"))
    return ElementwiseForm(name, types, value, pack_only(request, IntegerElementwiseConstants))


def _parameter_pack(request: KernelRequest, own: tuple[float, ...]) -> Pack:
    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        if not isinstance(constants, FloatElementwiseConstants | NoConstants):
            raise wrong_constants(request, constants, "FloatElementwiseConstants")
        given = constants.parameters if isinstance(constants, FloatElementwiseConstants) else ()
        if given and len(given) != len(own):
            raise KernelError(f"{request.operator} has {len(own)} parameters, but {len(given)} were given")
        return to_arrays(FloatElementwiseConstants(given or own))

    return pack


def _float_add(request: KernelRequest, operator: Add) -> ElementwiseForm:
    def value(p: Primitives, inputs: Sequence[Expression], constants: Sequence[Any]) -> Expression:
        a, b = (widen(x, storage) for x, storage in zip(inputs, request.inputs, strict=True))
        clamped = clamp(p, p.add(a, b), constants[0][0], constants[0][1])
        return narrow(p, clamped, request.output, may_be_nan=False)

    pack = _parameter_pack(request, (operator.lower, operator.upper))
    return ElementwiseForm("add", (((2,), "float32"),), value, pack)


def _float_unary(request: KernelRequest, operator: Unary) -> ElementwiseForm:
    count = len(operator.parameters)

    def value(p: Primitives, inputs: Sequence[Expression], constants: Sequence[Any]) -> Expression:
        parameters = [constants[0][i] for i in range(count)]
        x = widen(inputs[0], request.inputs[0])
        return narrow(p, unary(p, operator.function, x, parameters), request.output)

    pack = _parameter_pack(request, operator.parameters)
    types: tuple[ArrayType, ...] = (((max(count, 1),), "float32"),)
    return ElementwiseForm(operator.function_name, types, value, pack, instructions=_FUNCTION)


def _table_form(request: KernelRequest) -> ElementwiseForm:
    def value(p: Primitives, inputs: Sequence[Expression], constants: Sequence[Any]) -> Expression:
        return constants[0][convert(inputs[0], "int32")]

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        if isinstance(constants, IntegerElementwiseConstants):
            codes = np.arange(256, dtype=np.uint8)
            every_code = KernelRequest(Convert((256,)), request.inputs, request.output)
            return (numerics.evaluate(every_code, constants, [codes]),)
        if not isinstance(constants, TableConstants):
            raise wrong_constants(request, constants, "TableConstants")
        return to_arrays(constants)

    types = (((256,), STORAGE_DTYPE[request.output]),)
    return ElementwiseForm("table", types, value, pack, vectorizes=False, instructions=MOVE)


def _convert(request: KernelRequest) -> ElementwiseForm:
    source, output = request.inputs[0], request.output
    if is_code(source):
        return _integer_form(request, "requantize") if is_code(output) else _dequantize(request)
    if is_code(output):
        return _quantize(request)

    def value(p: Primitives, inputs: Sequence[Expression], _: Sequence[Any]) -> Expression:
        return inputs[0] if source == output else narrow(p, widen(inputs[0], source), output)

    return ElementwiseForm("cast", (), value, pack_only(request, NoConstants))


def _quantize(request: KernelRequest) -> ElementwiseForm:
    def value(p: Primitives, inputs: Sequence[Expression], constants: Sequence[Any]) -> Expression:
        floats, zero_point = constants
        return quantize(p, widen(inputs[0], request.inputs[0]), floats, zero_point, request.output)

    return ElementwiseForm("quantize", QUANTIZE_TYPES, value, pack_only(request, QuantizeConstants))


def _dequantize(request: KernelRequest) -> ElementwiseForm:
    def value(p: Primitives, inputs: Sequence[Expression], constants: Sequence[Any]) -> Expression:
        scale, zero_point = constants
        difference = convert(centred(inputs[0], zero_point[0]), "float32")
        return narrow(p, p.multiply(difference, broadcast(scale[0], lanes_of(difference))), request.output)

    types = (((1,), "float32"), ((1,), "int32"))
    return ElementwiseForm("dequantize", types, value, pack_only(request, DequantizeConstants))


def elementwise_kernel(request: KernelRequest, lanes: int, processor: Processor = ASSUMED_PROCESSOR) -> Kernel | None:
    """One loop over the tensors, in vectors of ``lanes`` float32; None if the request is not elementwise, or is to be
    written over an input and vectors overlap."""
    form = elementwise_form(request)
    if form is None:
        return None
    width = fitting_width(request, lanes if form.vectorizes else _UNROLLED)
    vector = width if form.vectorizes else 1
    if request.overwritten is not None and (request.placement is not None or neighbours(request) % width):
        return None

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        sources, target = [flat(buffer) for buffer in inputs], flat(output)
        instructions = vectors(elements(request.operator.output_shape), vector) * form.instructions
        with element_loop(request, width, work(request, instructions), processor) as (starts, first):
            for offset in range(0, width, vector):
                values = [load(b, start + offset, vector) for b, start in zip(sources, starts, strict=True)]
                store(target, first + offset, form.value(LlvmPrimitives(), values, constants), vector)

    function = kernel_function(request, form.constants, emit)
    return Kernel(request, f"common.{form.name}[{width}]", function, form.pack)
