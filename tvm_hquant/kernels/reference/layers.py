"""Operators without weights as plain loop nests. The arithmetic is that of the vector kernels, on scalars."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.float_math import exp
from tvm_hquant.kernels.interface import IntegerElementwiseConstants, Kernel, KernelRequest, NoConstants
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, kernel_function
from tvm_hquant.kernels.primitives import Expression, Primitives, centred, convert, narrow, requantize, select, widen
from tvm_hquant.kernels.reference.batch_matmul import reference_batch_matmul
from tvm_hquant.kernels.reference.blocks import Axes, accumulate, block, inside, intermediate, within_map
from tvm_hquant.kernels.reference.group_normalization import reference_group_normalization
from tvm_hquant.kernels.weightless.bias_addition import reference_bias_addition
from tvm_hquant.kernels.weightless.elementwise import (
    elementwise_form,
    float_ending,
    is_code,
    pack_ending,
    pack_only,
    stored_float,
)
from tvm_hquant.kernels.weightless.movement import (
    FILL_TYPES,
    fill_pack,
    slice_starts,
    stored_fill,
    take_pack,
    take_types,
)
from tvm_hquant.kernels.weightless.multiplication import reference_multiplication
from tvm_hquant.kernels.weightless.normalization import normalized
from tvm_hquant.kernels.weightless.pooling import Pool, reciprocal, sum_dtype
from tvm_hquant.kernels.weightless.resizing import reference_resize
from tvm_hquant.numerics.movement import unknown_movement
from tvm_hquant.operators import (
    AveragePool2D,
    BatchMatmul,
    BiasAdd,
    Concat,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Multiply,
    Resize2D,
    Softmax,
)
from tvm_hquant.tensor_format import STORAGE_DTYPE


def reference_layer(request: KernelRequest, p: Primitives) -> Kernel | None:
    """The kernel of an operator without weights; None for opaque ones and combinations of storages that nothing makes."""
    operator, source = request.operator, request.inputs[0]
    same_storage = {*request.inputs} == {request.output}
    floats = not is_code(source) and not is_code(request.output)
    match operator:
        case MaxPool2D():
            return _max_pool(request, operator, p) if same_storage else None
        case AveragePool2D():
            if is_code(source):
                return _integer_average_pool(request, operator, p)
            return _float_average_pool(request, operator, p) if floats else None
        case Resize2D():
            return reference_resize(request, operator, p)
        case Concat():
            return _concat(request, operator) if same_storage else None
        case BiasAdd():
            return reference_bias_addition(request, operator, p)
        case Multiply():
            return reference_multiplication(request, p)
        case BatchMatmul():
            return reference_batch_matmul(request, operator, p)
        case Movement():
            return _movement(request, operator, p) if same_storage else None
        case Softmax():
            return _softmax(request, operator, p) if not is_code(source) else None
        case GroupNormalization():
            return reference_group_normalization(request, operator, p)
        case LocalResponseNormalization():
            return _local_response_normalization(request, operator, p) if floats else None
    return _elementwise(request, p)


def _elementwise(request: KernelRequest, p: Primitives) -> Kernel | None:
    form = elementwise_form(request)
    if form is None:
        return None
    value = form.value

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        with block("elementwise", request.operator.output_shape) as (axes, _):
            values = [source[tuple(axes)] for source in inputs]
            T.buffer_store(output, value(p, values, constants), axes)

    return Kernel(request, f"reference.{form.name}", kernel_function(request, form.constants, emit), form.pack)


def _under_window(operator: Pool, source: Buffer, axes: Axes, summed: Axes, fill: Expression) -> Expression:
    window, (_, height, width, _) = operator.window, operator.input_shape
    image, out_row, out_column, channel = axes
    row = out_row * window.strides[0] + summed[0] * window.dilation[0] - window.padding[0]
    column = out_column * window.strides[1] + summed[1] * window.dilation[1] - window.padding[1]
    return within_map(row, column, height, width, source[image, row, column, channel], fill)


def _max_pool(request: KernelRequest, operator: MaxPool2D, p: Primitives) -> Kernel:
    storage = request.inputs[0]
    dtype = STORAGE_DTYPE[storage]

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        lowest = T.Cast(dtype, T.int32(0)) if is_code(storage) else narrow(p, T.float32(float("-inf")), storage)
        with block("maximum", operator.output_shape, operator.window.kernel) as (axes, summed):
            value, largest = _under_window(operator, inputs[0], axes, summed, lowest), output[tuple(axes)]
            larger = value > largest if is_code(storage) else widen(value, storage) > widen(largest, storage)
            accumulate(output, axes, lowest, select(larger, value, largest))

    return Kernel(request, "reference.max_pool2d", kernel_function(request, (), emit), pack_only(request, NoConstants))


def _integer_average_pool(request: KernelRequest, operator: AveragePool2D, p: Primitives) -> Kernel:
    _, out_h, out_w, _ = shape = operator.output_shape
    types: tuple[ArrayType, ...] = (((out_h, out_w), "float32"), ((2,), "float32"), ((2,), "int32"))
    dtype = sum_dtype(operator, request.inputs[0])

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        multiplier, bounds, zero_points = constants
        total = intermediate(shape, dtype)
        with block("sum", shape, operator.window.kernel) as (axes, summed):
            fill = T.Cast(STORAGE_DTYPE[request.inputs[0]], zero_points[0])
            difference = centred(_under_window(operator, inputs[0], axes, summed, fill), zero_points[0])
            value = total[tuple(axes)] + convert(difference, dtype)
            accumulate(total, axes, T.Cast(dtype, T.int32(0)), value)
        with block("epilogue", shape) as (axes, _):
            mean = p.fma(convert(total[tuple(axes)], "float32"), multiplier[axes[1], axes[2]], T.float32(0))
            result = requantize(p, mean, bounds[0], bounds[1], zero_points[1], request.output)
            T.buffer_store(output, result, axes)

    pack = pack_only(request, IntegerElementwiseConstants)
    return Kernel(request, "reference.average_pool2d", kernel_function(request, types, emit), pack)


def _float_average_pool(request: KernelRequest, operator: AveragePool2D, p: Primitives) -> Kernel:
    storage = request.inputs[0]

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        total = intermediate(operator.output_shape, "float32")
        with block("sum", operator.output_shape, operator.window.kernel) as (axes, summed):
            # A sum that starts at +0 stays what it is when +0 is added for padding.
            zero = T.Cast(STORAGE_DTYPE[storage], T.int32(0))
            value = widen(_under_window(operator, inputs[0], axes, summed, zero), storage)
            accumulate(total, axes, T.float32(0), p.add(total[tuple(axes)], value))
        with block("mean", operator.output_shape) as (axes, _):
            factor = reciprocal(p, operator, axes[1], axes[2])
            T.buffer_store(output, narrow(p, p.multiply(total[tuple(axes)], factor), request.output), axes)

    function = kernel_function(request, (), emit)
    return Kernel(request, "reference.average_pool2d", function, pack_only(request, NoConstants))


def _concat(request: KernelRequest, operator: Concat) -> Kernel:
    axis = operator.axis

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        with block("concat", operator.output_shape) as (axes, _summed):
            end = operator.output_shape[axis]
            value: Expression = None
            # From the last input to the first, each wherever the axis lies before its end.
            for source, shape in reversed(list(zip(inputs, operator.input_shapes, strict=True))):
                first = end - shape[axis]
                own = source[tuple(a - first if k == axis else a for k, a in enumerate(axes))]
                value = own if value is None else T.if_then_else(axes[axis] < end, own, value)
                end = first
            T.buffer_store(output, value, axes)

    return Kernel(request, "reference.concat", kernel_function(request, (), emit), pack_only(request, NoConstants))


def _movement(request: KernelRequest, operator: Movement, p: Primitives) -> Kernel:
    name, parameters = operator.function, operator.parameters
    types: tuple[ArrayType, ...] = ()
    pack = pack_only(request, NoConstants)
    source_of: Callable[[Axes, Sequence[Buffer]], Axes]
    match name:
        case "reshape":
            source_of = _reshaped(operator)
        case "permute_dims":
            order = [parameters.index(axis) for axis in range(len(parameters))]
            source_of = lambda axes, _: [axes[k] for k in order]  # noqa: E731
        case "strided_slice":
            starts = slice_starts(operator)
            source_of = lambda axes, _: [  # noqa: E731
                a * step + begin for a, (begin, step) in zip(axes, starts, strict=True)
            ]
        case "take":
            types, pack, taken = take_types(operator), take_pack(request, operator), parameters[0]
            source_of = lambda axes, constants: [  # noqa: E731
                constants[0][a] if k == taken else a for k, a in enumerate(axes)
            ]
        case "depth_to_space":
            source_of = _blocks(operator)
        case "pad":
            types, pack = FILL_TYPES, fill_pack(request, operator)
            source_of = lambda axes, _: [  # noqa: E731
                a - before for a, before in zip(axes, parameters[::2], strict=True)
            ]
        case _:
            raise unknown_movement(name)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        with block(name, operator.output_shape) as (axes, _):
            source = source_of(axes, constants)
            value = inputs[0][tuple(source)]
            if name == "pad":
                condition = inside(source[0], operator.input_shape[0])
                for index, size in zip(source[1:], operator.input_shape[1:], strict=True):
                    condition = T.And(condition, inside(index, size))
                value = T.if_then_else(condition, value, stored_fill(p, constants[0][0], request.output))
            T.buffer_store(output, value, axes)

    return Kernel(request, f"reference.{name}", kernel_function(request, types, emit), pack)


def _reshaped(operator: Movement) -> Callable[[Axes, Sequence[Buffer]], Axes]:
    def source(axes: Axes, _: Sequence[Buffer]) -> Axes:
        position: Expression = T.int32(0)
        for axis, size in zip(axes, operator.output_shape, strict=True):
            position = position * size + axis
        indices: Axes = []
        for size in reversed(operator.input_shape):
            indices.insert(0, T.floormod(position, size))
            position = T.floordiv(position, size)
        return indices

    return source


def _blocks(operator: Movement) -> Callable[[Axes, Sequence[Buffer]], Axes]:
    """The pixel and channel that :class:`Movement` ``depth_to_space`` takes an element from."""
    groups, rows, columns, top, left = operator.parameters
    depth = operator.output_shape[-1] // groups

    def source(axes: Axes, _: Sequence[Buffer]) -> Axes:
        batch, y, x, channel = axes[0], axes[1] + top, axes[2] + left, axes[3]
        block = T.floordiv(channel, depth) * rows + T.floormod(y, rows)
        within = (block * columns + T.floormod(x, columns)) * depth + T.floormod(channel, depth)
        return [batch, T.floordiv(y, rows), T.floordiv(x, columns), within]

    return source


def _softmax(request: KernelRequest, operator: Softmax, p: Primitives) -> Kernel:
    shape, axis, storage = operator.shape, operator.axis, request.inputs[0]
    kept = shape[:axis] + shape[axis + 1 :] or (1,)

    def without_axis(axes: Axes) -> Axes:
        return axes[:axis] + axes[axis + 1 :] or [T.int32(0)]

    def with_axis(axes: Axes, position: Expression) -> tuple[Expression, ...]:
        return tuple([*axes[:axis], position, *axes[axis:]][: len(shape)])

    def emit(inputs: Sequence[Buffer], ending: Sequence[Buffer], output: Buffer) -> None:
        largest, total = intermediate(kept, "float32"), intermediate(kept, "float32")
        power = intermediate(shape, "float32")
        with block("maximum", kept, (shape[axis],)) as (axes, summed):
            value, best = widen(inputs[0][with_axis(axes, summed[0])], storage), largest[tuple(axes)]
            accumulate(largest, axes, T.float32(float("-inf")), select(value > best, value, best))
        with block("exponential", shape) as (axes, _summed):
            x = widen(inputs[0][tuple(axes)], storage)
            T.buffer_store(power, exp(p, p.subtract(x, largest[tuple(without_axis(axes))])), axes)
        with block("sum", kept, (shape[axis],)) as (axes, summed):
            value = p.add(total[tuple(axes)], power[with_axis(axes, summed[0])])
            accumulate(total, axes, T.float32(0), value)
        with block("quotient", shape) as (axes, _summed):
            value = p.divide(power[tuple(axes)], total[tuple(without_axis(axes))])
            T.buffer_store(output, stored_float(p, value, request, ending), axes)

    function = kernel_function(request, float_ending(request), emit)
    return Kernel(request, "reference.softmax", function, pack_ending(request))


def _local_response_normalization(
    request: KernelRequest, operator: LocalResponseNormalization, p: Primitives
) -> Kernel:
    shape, storage, channels = operator.shape, request.inputs[0], operator.shape[-1]
    before = (operator.size - 1) // 2

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        squares = intermediate(shape, "float32")
        zero = T.Cast(STORAGE_DTYPE[storage], T.int32(0))
        with block("squares", shape, (operator.size,)) as (axes, summed):
            channel = axes[-1] + summed[0] - before
            stored = T.if_then_else(inside(channel, channels), inputs[0][(*axes[:-1], channel)], zero)
            neighbour = widen(stored, storage)
            value = p.fma(neighbour, neighbour, squares[tuple(axes)])
            accumulate(squares, axes, T.float32(0), value)
        with block("normalize", shape) as (axes, _summed):
            x = widen(inputs[0][tuple(axes)], storage)
            value = normalized(p, operator, x, squares[tuple(axes)])
            T.buffer_store(output, narrow(p, value, request.output), axes)

    function = kernel_function(request, (), emit)
    name = "reference.local_response_normalization"
    return Kernel(request, name, function, pack_only(request, NoConstants))
