"""Products of two tensors, the smaller one repeated along the axes where it has size 1.

So squeeze-and-excitation blocks (a map times one factor per channel) stay in codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import (
    IntegerElementwiseConstants,
    Kernel,
    KernelRequest,
    NoConstants,
)
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, input_place, kernel_function
from tvm_hquant.kernels.primitives import (
    Expression,
    LlvmPrimitives,
    Primitives,
    broadcast,
    centred,
    convert,
    float_like,
    lanes_of,
    narrow,
    requantize,
    widen,
)
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.reference.blocks import block
from tvm_hquant.kernels.vector_loops import ARITHMETIC, fitting_lanes, flat, store, vectors
from tvm_hquant.kernels.weightless.broadcast_rows import BroadcastRows
from tvm_hquant.kernels.weightless.elementwise import is_code, pack_only
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Multiply

_INTEGER_TYPES: tuple[ArrayType, ...] = (((1,), "float32"), ((2,), "float32"), ((3,), "int32"))


def multiplication_kernel(
    request: KernelRequest, lanes: int, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel | None:
    """Rows of neighbours in vectors of ``lanes`` float32; None for other operators, and for codes times floats."""
    if not isinstance(request.operator, Multiply) or not _is_uniform(request):
        return None
    places = tuple(input_place(request, number) for number in range(2)) if request.sources else ()
    geometry = BroadcastRows(request.operator.output_shape, request.operator.input_shapes, places)
    if not geometry.reaches_places:
        return None
    width = fitting_lanes(geometry.run, lanes)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        sources, target = [flat(buffer) for buffer in inputs], flat(output)

        def finish(row: Expression, start: Expression) -> None:
            values = [geometry.load(source, k, row, start, width) for k, source in enumerate(sources)]
            store(target, row * geometry.run + start, _product(request, LlvmPrimitives(), values, constants), width)

        in_all = work(request, geometry.rows * vectors(geometry.run, width) * ARITHMETIC)
        geometry.each_vector(width, in_all, processor, finish)

    return _kernel(request, f"common.multiply[{width}]", emit)


def reference_multiplication(request: KernelRequest, p: Primitives) -> Kernel | None:
    """The same as a plain loop nest; None where :func:`multiplication_kernel` has none."""
    operator = request.operator
    if not isinstance(operator, Multiply) or not _is_uniform(request):
        return None
    shape = operator.output_shape

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        with block("multiply", shape) as (axes, _):
            values = []
            for source, own in zip(inputs, operator.input_shapes, strict=True):
                kept = axes[len(shape) - len(own) :]
                values.append(source[tuple(a if size > 1 else T.int32(0) for a, size in zip(kept, own, strict=True))])
            T.buffer_store(output, _product(request, p, values, constants), axes)

    return _kernel(request, "reference.multiply", emit)


def _is_uniform(request: KernelRequest) -> bool:
    """Whether all inputs are codes, or all tensors are floats."""
    codes = [is_code(storage) for storage in request.inputs]
    return all(codes) or not (any(codes) or is_code(request.output))


def _kernel(request: KernelRequest, name: str, emit: Any) -> Kernel:
    if is_code(request.inputs[0]):
        function = kernel_function(request, _INTEGER_TYPES, emit)
        return Kernel(request, name, function, pack_only(request, IntegerElementwiseConstants))
    return Kernel(request, name, kernel_function(request, (), emit), pack_only(request, NoConstants))


def _product(
    request: KernelRequest, p: Primitives, values: Sequence[Expression], constants: Sequence[Any]
) -> Expression:
    """The stored output. In codes: v = fma(float32(q_a − zp_a) · float32(q_b − zp_b), m, 0), then requantized."""
    if not is_code(request.inputs[0]):
        a, b = (widen(x, storage) for x, storage in zip(values, request.inputs, strict=True))
        return narrow(p, p.multiply(a, b), request.output)
    multiplier, bounds, zero_points = constants
    a, b = (convert(centred(code, zero_points[k]), "float32") for k, code in enumerate(values))
    v = p.fma(p.multiply(a, b), broadcast(multiplier[0], lanes_of(a)), float_like(0.0, a))
    return requantize(p, v, bounds[0], bounds[1], zero_points[2], request.output)
