"""The copy of activations that convolution steps read: padded, filled up to whole steps, in the operand's dtype."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, broadcast, convert, widen
from tvm_hquant.kernels.vector_loops import fitting_lanes, flat_loop, load, store, vector_loop
from tvm_hquant.operators import Conv2D

_COPY_LANES = 32


def emit_activation_copy(
    conv: Conv2D,
    padded_inputs: int,
    operand_dtype: str,
    storage: str,
    source: Buffer,
    target: Buffer,
    fills: list[Expression],
) -> None:
    """Copies ``source`` (flat, ``storage``) to ``target`` (flat: planes, batch, rows, columns, groups, channels).

    ``fills`` has the value of padding for every plane, in the operand's dtype; there are two planes, low bytes first, where
    the storage is uint16.
    """
    n, height, width, channels = conv.input_shape
    top, left, bottom, right = conv.window.padding
    group_inputs = channels // conv.groups
    rows, columns = height + top + bottom, width + left + right
    row_elements = columns * conv.groups * padded_inputs
    plane_elements = n * rows * row_elements
    planes = len(fills)

    def converted(value: Expression, plane: int) -> Expression:
        if storage in ("float16", "bfloat16"):
            return widen(value, storage)
        if planes > 1:
            byte = value >> broadcast(T.uint16(8), _lanes(value)) if plane else value & broadcast(T.uint16(255), _lanes(value))
            return convert(byte, operand_dtype)
        return convert(value, operand_dtype) if str(source.dtype) != operand_dtype else value

    def copy_run(start_source: Expression, start_target: Expression, length: int) -> None:
        lanes = fitting_lanes(length, _COPY_LANES)
        with vector_loop(length, lanes) as offset:
            for plane in range(planes):
                value = converted(load(source, start_source + offset, lanes), plane)
                store(target, start_target + plane * plane_elements + offset, value, lanes)

    def fill_run(start: Expression, length: int) -> None:
        if length == 0:
            return
        lanes = fitting_lanes(length, _COPY_LANES)
        with vector_loop(length, lanes) as offset:
            for plane, value in enumerate(fills):
                store(target, start + plane * plane_elements + offset, broadcast(value, lanes), lanes)

    whole_channels = padded_inputs == group_inputs
    if whole_channels and not any(conv.window.padding):
        length = n * height * width * channels
        lanes = fitting_lanes(length, _COPY_LANES)
        with flat_loop(length, lanes) as position:
            for plane in range(planes):
                value = converted(load(source, position, lanes), plane)
                store(target, position + plane * plane_elements, value, lanes)
        return

    with T.parallel(n * rows) as row:
        image, y = row // rows, row % rows
        start = T.bind(row * row_elements)
        if top or bottom:
            with T.If(T.And(y >= top, y < top + height)):
                with T.Then():
                    _copy_row(conv, padded_inputs, image, y, start, copy_run, fill_run)
                with T.Else():
                    fill_run(start, row_elements)
        else:
            _copy_row(conv, padded_inputs, image, y, start, copy_run, fill_run)


def _copy_row(conv, padded_inputs, image, y, start, copy_run, fill_run) -> None:  # type: ignore[no-untyped-def]
    _, height, width, channels = conv.input_shape
    top, left, _, right = conv.window.padding
    pixel = conv.groups * padded_inputs
    group_inputs = channels // conv.groups
    source = T.bind((image * height + (y - top)) * (width * channels))
    fill_run(start, left * pixel)
    if padded_inputs == group_inputs:
        copy_run(source, start + left * pixel, width * channels)
    else:
        with T.serial(width) as x:
            with T.serial(conv.groups) as group:
                run = T.bind(start + (left + x) * pixel + group * padded_inputs)
                copy_run(source + x * channels + group * group_inputs, run, group_inputs)
                fill_run(run + group_inputs, padded_inputs - group_inputs)
    fill_run(start + (left + width) * pixel, right * pixel)


def _lanes(value: Expression) -> int:
    return int(value.ty.dtype.lanes)
