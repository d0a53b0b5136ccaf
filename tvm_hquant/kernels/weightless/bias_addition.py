"""Sums of a tensor and constants that are repeated along axes where they have size 1."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import BiasConstants, Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, kernel_function
from tvm_hquant.kernels.primitives import Expression, LlvmPrimitives, Primitives, widen
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.reference.blocks import block
from tvm_hquant.kernels.vector_loops import ARITHMETIC, fitting_lanes, flat, store, vectors
from tvm_hquant.kernels.weightless.broadcast_rows import BroadcastRows
from tvm_hquant.kernels.weightless.elementwise import float_ending, is_code, pack_only, stored_float
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import BiasAdd


def bias_addition_kernel(request: KernelRequest, lanes: int, processor: Processor = ASSUMED_PROCESSOR) -> Kernel | None:
    """Rows of neighbours in vectors of ``lanes`` float32, from floats to floats or codes; None for everything else."""
    operator = request.operator
    if not isinstance(operator, BiasAdd) or is_code(request.inputs[0]):
        return None
    geometry = BroadcastRows(operator.shape, (operator.shape, operator.bias_shape))
    width = fitting_lanes(geometry.run, lanes)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        (source, bias), target = [flat(buffer) for buffer in (inputs[0], constants[0])], flat(output)

        def finish(row: Expression, start: Expression) -> None:
            x, b = (geometry.load(buffer, k, row, start, width) for k, buffer in enumerate((source, bias)))
            place = row * geometry.run + start
            store(target, place, _stored_sum(LlvmPrimitives(), request, x, b, constants[1:]), width)

        in_all = work(request, geometry.rows * vectors(geometry.run, width) * ARITHMETIC)
        geometry.each_vector(width, in_all, processor, finish)

    function = kernel_function(request, _types(request, operator), emit)
    return Kernel(request, f"common.bias_add[{width}]", function, pack_only(request, BiasConstants))


def reference_bias_addition(request: KernelRequest, operator: BiasAdd, p: Primitives) -> Kernel | None:
    """The same as a plain loop nest."""
    if is_code(request.inputs[0]):
        return None

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        with block("bias_add", operator.shape) as (axes, _):
            kept = axes[len(operator.shape) - len(operator.bias_shape) :]
            place = [a if size > 1 else T.int32(0) for a, size in zip(kept, operator.bias_shape, strict=True)]
            x, b = inputs[0][tuple(axes)], constants[0][tuple(place)]
            T.buffer_store(output, _stored_sum(p, request, x, b, constants[1:]), axes)

    function = kernel_function(request, _types(request, operator), emit)
    return Kernel(request, "reference.bias_add", function, pack_only(request, BiasConstants))


def _types(request: KernelRequest, operator: BiasAdd) -> tuple[ArrayType, ...]:
    return ((operator.bias_shape, "float32"), *float_ending(request))


def _stored_sum(
    p: Primitives, request: KernelRequest, x: Expression, bias: Expression, ending: Sequence[Buffer]
) -> Expression:
    return stored_float(p, p.add(widen(x, request.inputs[0]), bias), request, ending)
