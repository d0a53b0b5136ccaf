"""Convolutions and dense layers as plain loop nests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.lane_order import place_of_channel
from tvm_hquant.kernels.interface import (
    Array,
    FloatAnchorConstants,
    IntegerAnchorConstants,
    Kernel,
    KernelRequest,
    LayerConstants,
)
from tvm_hquant.kernels.kernel_function import (
    ArrayType,
    Buffer,
    input_place,
    interleaved_place,
    kernel_function,
)
from tvm_hquant.kernels.primitives import Expression, Primitives, centred, clamp, convert, narrow, requantize, widen
from tvm_hquant.kernels.reference.blocks import Axes, accumulate, block, intermediate, within_map
from tvm_hquant.kernels.weightless.elementwise import Pack, is_code, pack_only
from tvm_hquant.operators import Anchor, Conv2D, Dense
from tvm_hquant.tensor_format import STORAGE_DTYPE


class _Sums:
    """Where the factors of an anchor's products lie in memory: the difference between a convolution and a dense layer."""

    def __init__(self, operator: Anchor, first_channel: int = 0) -> None:
        self.operator = operator
        self.first_channel = first_channel

    @property
    def reduced_shape(self) -> tuple[int, ...]:
        """Axes that are summed over, in the order of the contract: (kh, kw, ci), or (ci)."""
        if isinstance(self.operator, Dense):
            return (self.operator.in_features,)
        _, depth, kernel_h, kernel_w = self.operator.weight_shape
        return kernel_h, kernel_w, depth

    def weight_index(self, axes: Axes, summed: Axes) -> Axes:
        """Indices of a weight, without that of the point."""
        if isinstance(self.operator, Dense):
            return [axes[-1], summed[0]]
        row, column, channel = summed
        return [axes[-1], channel, row, column]

    def input_value(self, source: Buffer, axes: Axes, summed: Axes, fill: Expression) -> Expression:
        """The stored input of a product; ``fill`` in the padding."""
        operator = self.operator
        if isinstance(operator, Dense):
            return source[(*axes[:-1], summed[0] + self.first_channel)]
        _, height, width, channels = operator.input_shape
        window, groups = operator.window, operator.groups
        image, out_row, out_column, out_channel = axes
        row = out_row * window.strides[0] + summed[0] * window.dilation[0] - window.padding[0]
        column = out_column * window.strides[1] + summed[1] * window.dilation[1] - window.padding[1]
        group = T.floordiv(out_channel, operator.out_channels // groups)
        channel = group * (channels // groups) + summed[2] + self.first_channel
        value = source[image, row, column, channel]
        return within_map(row, column, height, width, value, fill) if any(window.padding) else value


def reference_anchor(request: KernelRequest, p: Primitives) -> Kernel | None:
    """The kernel of a convolution or dense layer; None for other operators."""
    operator = request.operator
    if not isinstance(operator, Conv2D | Dense):
        return None
    return _integer(request, operator, p) if is_code(request.inputs[0]) else _float(request, operator, p)


def _store(request: KernelRequest, inputs: Sequence[Buffer], output: Buffer, axes: Axes, result: Expression) -> None:
    """Stores an output element where it belongs, and beside it the one that it takes turns with."""
    channel = axes[-1]
    if request.interleaved is not None:
        place, position = interleaved_place(request), request.interleaved.position
        other = inputs[-1][(*axes[:-1], channel + place.offset)]
        T.buffer_store(output, other, [*axes[:-1], 2 * channel + (1 - position)])
        channel = 2 * channel + position
    elif request.shuffled:
        channel = place_of_channel(channel, request.output_shape[-1], request.shuffled)
    T.buffer_store(output, result, [*axes[:-1], channel])


def _kind(operator: Anchor) -> str:
    return "conv2d" if isinstance(operator, Conv2D) else "dense"


def _pack(request: KernelRequest, wanted: type[Any], weight_shape: tuple[int, ...]) -> Pack:
    check = pack_only(request, wanted)

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        weights, *others = check(constants)
        return np.ascontiguousarray(weights).reshape(weight_shape), *others

    return pack


def _integer(request: KernelRequest, operator: Anchor, p: Primitives) -> Kernel:
    first_channel = input_place(request, 0).offset
    sums, points, channels = _Sums(operator, first_channel), request.weight_points, operator.weight_shape[0]
    planes = 2 if request.inputs[0] == "uint16" else 1
    total = "int32" if request.weights == "int8" else "int64"
    weight_shape = (points, *operator.weight_shape)
    types: list[ArrayType] = [
        (weight_shape, request.weights),
        ((points, channels), "float32"),
        ((channels,), "float32"),
        ((3,), "float32"),
        ((3,), "int32"),
    ]

    def byte(stored: Expression, plane: int) -> Expression:
        value = convert(stored, "int32")
        if planes == 1:
            return value
        return value & T.int32(255) if plane == 0 else value >> T.int32(8)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        weights, multiplier, offset, floats, integers = constants
        shape = operator.output_shape
        passes = [(point, plane) for point in range(points) for plane in range(planes)]
        accumulators = [intermediate(shape, total) for _ in passes]
        for (point, plane), accumulator in zip(passes, accumulators, strict=True):
            with block(f"sum_{point}_{plane}", shape, sums.reduced_shape) as (axes, summed):
                fill = T.Cast(STORAGE_DTYPE[request.inputs[0]], integers[0])
                stored = sums.input_value(inputs[0], axes, summed, fill)
                difference = byte(stored, plane) - byte(integers[0], plane)
                weight = convert(weights[(point, *sums.weight_index(axes, summed))], total)
                product = convert(difference, total) * weight
                accumulate(accumulator, axes, T.Cast(total, T.int32(0)), accumulator[tuple(axes)] + product)
        with block("epilogue", shape) as (axes, _):
            value = offset[axes[-1]]
            for (point, plane), accumulator in zip(passes, accumulators, strict=True):
                factor = multiplier[point, axes[-1]]
                # Multiplying by 256 is exact.
                factor = factor * T.float32(256) if plane == 1 else factor
                value = p.fma(convert(accumulator[tuple(axes)], "float32"), factor, value)
            if operator.epilogue.has_residual:
                residual = convert(centred(inputs[1][tuple(axes)], integers[1]), "float32")
                value = p.fma(residual, floats[2], value)
            result = requantize(p, value, floats[0], floats[1], integers[2], request.output)
            _store(request, inputs, output, axes, result)

    function = kernel_function(request, types, emit)
    pack = _pack(request, IntegerAnchorConstants, weight_shape)
    return Kernel(request, f"reference.{_kind(operator)}", function, pack)


def _float(request: KernelRequest, operator: Anchor, p: Primitives) -> Kernel:
    sums, storage = _Sums(operator, input_place(request, 0).offset), request.inputs[0]
    weight_storage = request.weights or "float32"
    types: list[ArrayType] = [
        (operator.weight_shape, STORAGE_DTYPE[weight_storage]),  # type: ignore[index]
        ((operator.weight_shape[0],), "float32"),
        ((2,), "float32"),
    ]

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        weights, bias, bounds = constants
        shape = operator.output_shape
        accumulator = intermediate(shape, "float32")
        zero = T.Cast(STORAGE_DTYPE[storage], T.int32(0))
        with block("sum", shape, sums.reduced_shape) as (axes, summed):
            value = widen(sums.input_value(inputs[0], axes, summed, zero), storage)
            weight = widen(weights[tuple(sums.weight_index(axes, summed))], weight_storage)
            start = bias[axes[-1]] if operator.epilogue.has_bias else T.float32(0)
            accumulate(accumulator, axes, start, p.fma(value, weight, accumulator[tuple(axes)]))
        with block("epilogue", shape) as (axes, _):
            total = accumulator[tuple(axes)]
            if operator.epilogue.has_residual:
                total = p.add(total, widen(inputs[1][tuple(axes)], request.inputs[-1]))
            result = narrow(p, clamp(p, total, bounds[0], bounds[1]), request.output)
            _store(request, inputs, output, axes, result)

    function = kernel_function(request, types, emit)
    pack = _pack(request, FloatAnchorConstants, operator.weight_shape)
    return Kernel(request, f"reference.{_kind(operator)}", function, pack)
