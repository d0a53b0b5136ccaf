"""Depthwise convolution: every lane is a channel, activations and weights are multiplied lane by lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.activation_copy import ActivationCopy
from tvm_hquant.kernels.anchor_constants import float_array_types, integer_array_types, pack_float, pack_integer
from tvm_hquant.kernels.epilogue import Epilogue, scale_accumulator
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, kernel_function
from tvm_hquant.kernels.primitives import STACK, Expression, LlvmPrimitives, convert, widen
from tvm_hquant.kernels.vector_loops import fitting_lanes, flat, load, store
from tvm_hquant.operators import Conv2D
from tvm_hquant.tensor_format import STORAGE_DTYPE

_PARALLEL_MACS = 50_000
_PIXELS = 4
"""Pixels of a tile at most; with the weights of a 3×3 kernel they fill the registers."""


@dataclass(frozen=True)
class DepthwiseGeometry:
    """A depthwise convolution in vectors of ``lanes`` channels; the last vector overlaps the one before it."""

    conv: Conv2D
    lanes: int
    planes: int
    points: int

    @property
    def channels(self) -> int:
        return self.conv.in_channels

    @property
    def vectors(self) -> int:
        return -(-self.channels // self.lanes)

    @property
    def output_size(self) -> tuple[int, int]:
        return self.conv.window.output_size(*self.conv.input_shape[1:3])

    @property
    def pixels(self) -> int:
        """Pixels of a tile: as many as divide a row best."""
        width = self.output_size[1]
        return min(range(1, min(_PIXELS, width) + 1), key=lambda p: (-(-width // p) * (p + 1), -p))

    @property
    def padded_size(self) -> tuple[int, int]:
        _, h, w, _ = self.conv.input_shape
        top, left, bottom, right = self.conv.window.padding
        return h + top + bottom, w + left + right

    @property
    def plane_elements(self) -> int:
        height, width = self.padded_size
        return self.conv.input_shape[0] * height * width * self.channels

    @property
    def passes(self) -> int:
        return self.planes * self.points

    @property
    def packed_lanes(self) -> int:
        """Channels in the packed order, the overlap counted twice."""
        return self.vectors * self.lanes

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        starts = [min(v * self.lanes, self.channels - self.lanes) for v in range(self.vectors)]
        return np.concatenate([start + np.arange(self.lanes) for start in starts])

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., channels] in the order of the vectors."""
        return np.ascontiguousarray(values[..., self.channel_rows])

    def pack_weights(self, weights: Array) -> Array:
        """[points, channels, 1, kh, kw] as point, vector, kernel row, kernel column, lane; codes widened to int16."""
        points, _, _, height, width = weights.shape
        rows = weights[:, self.channel_rows, 0].reshape(points, self.vectors, self.lanes, height, width)
        ordered = rows.transpose(0, 1, 3, 4, 2).reshape(-1)
        return np.ascontiguousarray(ordered.astype(np.int16) if ordered.dtype == np.int8 else ordered)


def depthwise_kernel(request: KernelRequest, lanes: int, family: str) -> Kernel:
    """The kernel of a depthwise convolution with vectors of up to ``lanes`` channels."""
    conv = request.operator
    assert isinstance(conv, Conv2D)
    is_integer = request.weights == "int8"
    planes = 2 if is_integer and request.inputs[0] == "uint16" else 1
    geometry = DepthwiseGeometry(conv, fitting_lanes(conv.in_channels, lanes), planes, request.weight_points)
    kh, kw = conv.window.kernel
    count = geometry.packed_lanes * kh * kw * geometry.points
    if is_integer:
        types = integer_array_types(count, "int16", geometry.packed_lanes, geometry.passes, planes, "int32")
    else:
        weight_dtype = "uint16" if request.weights == "bfloat16" else request.weights
        types = float_array_types(count, weight_dtype, geometry.packed_lanes)

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        return pack_integer(constants, geometry, 0, "int32") if is_integer else pack_float(constants, geometry)

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        _Emitter(request, geometry, inputs, arrays, output, is_integer).emit()

    name = f"{family}.depthwise_conv2d[{geometry.pixels}x{geometry.lanes}]"
    return Kernel(request, name, kernel_function(request, types, emit), pack)


class _Emitter:
    def __init__(
        self,
        request: KernelRequest,
        geometry: DepthwiseGeometry,
        inputs: Sequence[Buffer],
        arrays: Sequence[Buffer],
        output: Buffer,
        is_integer: bool,
    ) -> None:
        self.request = request
        self.geometry = geometry
        self.is_integer = is_integer
        self.inputs = [flat(b) for b in inputs]
        self.weights = arrays[0]
        if is_integer:
            _, self.starts, self.multipliers, self.offsets, limits, self.zero_points = arrays
        else:
            _, self.starts, limits = arrays
            self.zero_points = None
        residual = self.inputs[1] if geometry.conv.epilogue.has_residual else None
        lanes = geometry.lanes
        self.epilogue = Epilogue(request, lanes, lanes, residual, limits, self.zero_points, flat(output))
        self.source: Buffer = self.inputs[0]
        self.operand_dtype = STORAGE_DTYPE[request.inputs[0]]

    def emit(self) -> None:
        geometry, conv = self.geometry, self.geometry.conv
        # Widening 16-bit floats once beats widening them at every kernel position.
        is_narrow_float = self.request.inputs[0] in ("float16", "bfloat16")
        if any(conv.window.padding) or geometry.planes > 1 or is_narrow_float:
            self.operand_dtype = "uint8" if self.is_integer else "float32"
            self.source = T.alloc_buffer((geometry.plane_elements * geometry.planes,), self.operand_dtype)
            ActivationCopy(
                Conv2D(conv.input_shape, conv.in_channels, conv.window),
                conv.in_channels,
                self.operand_dtype,
                self.request.inputs[0],
                self.inputs[0],
                self.source,
                tuple(self._fill(plane) for plane in range(geometry.planes)),
            ).emit()
        rows = conv.input_shape[0] * geometry.output_size[0]
        width = geometry.output_size[1]
        loop = T.parallel if conv.macs > _PARALLEL_MACS and rows > 1 else T.serial
        with loop(rows) as row, T.serial(geometry.vectors) as vector, T.serial(-(-width // geometry.pixels)) as tile:
            self._tile(row, vector, tile)

    def _fill(self, plane: int) -> Expression:
        return T.float32(0) if self.zero_points is None else T.Cast("uint8", self.zero_points[2 + plane])

    def _tile(self, row: Expression, vector: Expression, tile: Expression) -> None:
        geometry, lanes, pixels = self.geometry, self.geometry.lanes, self.geometry.pixels
        width, channels = geometry.output_size[1], geometry.channels
        x = T.bind(tile * pixels if width % pixels == 0 else T.min(tile * pixels, width - pixels))
        channel = T.bind(vector * lanes if channels % lanes == 0 else T.min(vector * lanes, channels - lanes))
        constants = T.bind(vector * lanes)
        if geometry.passes == 1:
            sums = self._sums(row, x, channel, vector, None)
            for i, value in enumerate(sums):
                if self.is_integer:
                    multiplier, offset = load(self.multipliers, constants, lanes), load(self.offsets, constants, lanes)
                    value = scale_accumulator(value, multiplier, offset)
                self.epilogue.finish(T.bind(value), (row * width + x + i) * channels + channel)
            return
        values = T.alloc_buffer((pixels * lanes,), "float32", scope=STACK)
        for i in range(pixels):
            store(values, i * lanes, load(self.offsets, constants, lanes), lanes)
        with T.serial(geometry.passes) as number:
            sums = self._sums(row, x, channel, vector, number)
            multiplier = load(self.multipliers, number * geometry.packed_lanes + constants, lanes)
            for i, value in enumerate(sums):
                store(values, i * lanes, scale_accumulator(value, multiplier, load(values, i * lanes, lanes)), lanes)
        for i in range(pixels):
            self.epilogue.finish(T.bind(load(values, i * lanes, lanes)), (row * width + x + i) * channels + channel)

    def _sums(
        self, row: Expression, x: Expression, channel: Expression, vector: Expression, number: Expression | None
    ) -> list[Expression]:
        """Sums of one pass for every pixel of the tile."""
        geometry, window, lanes = self.geometry, self.geometry.conv.window, self.geometry.lanes
        (kh, kw), (sh, sw), (dh, dw) = window.kernel, window.strides, window.dilation
        height = geometry.output_size[0]
        padded_height, padded_width = geometry.padded_size
        plane = number % geometry.planes if number is not None and geometry.planes > 1 else 0
        point = number // geometry.planes if number is not None and geometry.points > 1 else 0
        start_at = vector * lanes + (number * geometry.packed_lanes if number is not None else 0)
        corner = T.bind(
            ((row // height * padded_height + row % height * sh) * padded_width + x * sw) * geometry.channels
            + channel
            + plane * geometry.plane_elements
        )
        weight_base = T.bind((point * geometry.vectors + vector) * (kh * kw * lanes))
        dtype = "int32" if self.is_integer else "float32"
        sums = T.alloc_buffer((geometry.pixels * lanes,), dtype, scope=STACK)
        for i in range(geometry.pixels):
            store(sums, i * lanes, load(self.starts, start_at, lanes), lanes)
        with T.serial(kh) as ky:
            for kx in range(kw):
                weight = T.bind(self._weight(weight_base + (ky * kw + kx) * lanes))
                for i in range(geometry.pixels):
                    at = corner + (ky * dh * padded_width + kx * dw + i * sw) * geometry.channels
                    value = self._multiply_add(load(self.source, at, lanes), weight, load(sums, i * lanes, lanes))
                    store(sums, i * lanes, value, lanes)
        return [load(sums, i * lanes, lanes) for i in range(geometry.pixels)]

    def _weight(self, index: Expression) -> Expression:
        value = load(self.weights, index, self.geometry.lanes)
        return convert(value, "int32") if self.is_integer else widen(value, self.request.weights)

    def _multiply_add(self, activation: Expression, weight: Expression, value: Expression) -> Expression:
        if self.is_integer:
            return value + convert(activation, "int32") * weight
        return LlvmPrimitives().fma(activation, weight, value)
