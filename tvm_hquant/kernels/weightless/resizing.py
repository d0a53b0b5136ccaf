"""Linear resizing: vectors of channels between four pixels, and the same as a plain loop nest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import IntegerElementwiseConstants, Kernel, KernelRequest, NoConstants
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, Emit, kernel_function
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
from tvm_hquant.kernels.vector_loops import ARITHMETIC, fitting_lanes, flat, load, row_loop, store, vector_loop, vectors
from tvm_hquant.kernels.weightless.elementwise import is_code, pack_only
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Positions, Resize2D

_INTEGER_TYPES: tuple[ArrayType, ...] = (((1,), "float32"), ((2,), "float32"), ((2,), "int32"))
_PIXELS = 4
"""Of the input for one of the output."""

Pixel = Callable[[Expression, Expression], Expression]
"""The stored values at an input row and column."""


def resize_kernel(request: KernelRequest, lanes: int, processor: Processor = ASSUMED_PROCESSOR) -> Kernel | None:
    """The vector kernel of a linear resize; None for other operators and storages that no precision makes."""
    operator = request.operator
    if not isinstance(operator, Resize2D) or not _is_possible(request):
        return None
    _, height, width, channels = operator.input_shape
    (batch, out_height, out_width, _), vector = operator.output_shape, fitting_lanes(channels, lanes)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        source, target, p = flat(inputs[0]), flat(output), LlvmPrimitives()
        instructions = batch * out_height * out_width * vectors(channels, vector) * _PIXELS * ARITHMETIC
        with row_loop(batch * out_height, work(request, instructions), processor) as line:
            image, row = T.floordiv(line, out_height), T.floormod(line, out_height)
            rows = _between(p, operator.rows, row, height)
            with T.serial(out_width) as column:
                columns = _between(p, operator.columns, column, width)
                with vector_loop(channels, vector) as channel:

                    def pixel(y: Expression, x: Expression, channel: Expression = channel) -> Expression:
                        return load(source, ((image * height + y) * width + x) * channels + channel, vector)

                    result = _stored(p, request, _interpolated(p, request, pixel, rows, columns, constants), constants)
                    store(target, (line * out_width + column) * channels + channel, result, vector)

    return _kernel(request, f"common.resize2d[{vector}]", emit)


def reference_resize(request: KernelRequest, operator: Resize2D, p: Primitives) -> Kernel | None:
    """The same as plain loops."""
    if not _is_possible(request):
        return None

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        with block("resize2d", operator.output_shape) as (axes, _):
            image, row, column, channel = axes
            rows = _between(p, operator.rows, row, operator.input_shape[1])
            columns = _between(p, operator.columns, column, operator.input_shape[2])

            def pixel(y: Expression, x: Expression) -> Expression:
                return inputs[0][image, y, x, channel]

            value = _interpolated(p, request, pixel, rows, columns, constants)
            T.buffer_store(output, _stored(p, request, value, constants), axes)

    return _kernel(request, "reference.resize2d", emit)


def _is_possible(request: KernelRequest) -> bool:
    return is_code(request.inputs[0]) or not is_code(request.output)


def _kernel(request: KernelRequest, name: str, emit: Emit) -> Kernel:
    integer = is_code(request.inputs[0])
    pack = pack_only(request, IntegerElementwiseConstants if integer else NoConstants)
    return Kernel(request, name, kernel_function(request, _INTEGER_TYPES if integer else (), emit), pack)


def _between(
    p: Primitives, positions: Positions, index: Expression, size: int
) -> tuple[Expression, Expression, Expression]:
    """The input indices on both sides of an output index, and how far it lies from the first, as float32."""
    step, start, denominator = positions
    numerator = index * step + start
    below = T.floordiv(numerator, denominator)
    rest = convert(numerator - below * denominator, "float32")
    first, second = (T.max(0, T.min(side, size - 1)) for side in (below, below + 1))
    return first, second, p.bind(p.divide(rest, T.float32(denominator)))


def _interpolated(
    p: Primitives,
    request: KernelRequest,
    pixel: Pixel,
    rows: tuple[Expression, Expression, Expression],
    columns: tuple[Expression, Expression, Expression],
    constants: Sequence[Buffer],
) -> Expression:
    def value(y: Expression, x: Expression) -> Expression:
        stored = pixel(y, x)
        if is_code(request.inputs[0]):
            return p.bind(convert(centred(stored, constants[2][0]), "float32"))
        return p.bind(widen(stored, request.inputs[0]))

    def mixed(a: Expression, b: Expression, fraction: Expression) -> Expression:
        return p.bind(p.fma(p.subtract(b, a), broadcast(fraction, lanes_of(a)), a))

    top, bottom = (mixed(value(y, columns[0]), value(y, columns[1]), columns[2]) for y in rows[:2])
    return mixed(top, bottom, rows[2])


def _stored(p: Primitives, request: KernelRequest, value: Expression, constants: Sequence[Buffer]) -> Expression:
    if not is_code(request.inputs[0]):
        return narrow(p, value, request.output)
    multiplier, bounds, zero_points = constants
    scaled = p.fma(value, broadcast(multiplier[0], lanes_of(value)), float_like(0.0, value))
    return requantize(p, scaled, bounds[0], bounds[1], zero_points[1], request.output)
