"""What the CUDA kernels of convolutions and dense layers have in common: tiles, how a sum starts and ends, the function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import float_array_types, integer_array_types, pack_float, pack_integer
from tvm_hquant.kernels.convolution.lane_order import place_of_channel
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, kernel_function
from tvm_hquant.kernels.primitives import CudaPrimitives, Expression, centred, clamp, convert, narrow, requantize, widen
from tvm_hquant.kernels.vector_loops import flat
from tvm_hquant.operators import Conv2D, Dense

PRIMITIVES = CudaPrimitives(in_blocks=False)
"""Arithmetic of kernels that bind their threads themselves."""


@dataclass(frozen=True)
class TileGeometry(ABC):
    """A convolution cut into tiles of pixels times output channels; packs its constants (``anchor_constants.ChannelPacking``).

    Attributes:
        conv: the convolution; dense layers are 1×1 ones.
        points: weight tensors.
        planes: byte planes of the activations.
        word: input channels that are read and multiplied at once.
    """

    conv: Conv2D
    points: int
    planes: int
    word: int

    @property
    def group_inputs(self) -> int:
        return self.conv.in_channels // self.conv.groups

    @property
    def group_outputs(self) -> int:
        return self.conv.out_channels // self.conv.groups

    @property
    def words(self) -> int:
        """Words of input channels of a group; channels that lie behind the last one have weight 0."""
        return -(-self.group_inputs // self.word)

    @property
    @abstractmethod
    def channels(self) -> int:
        """Output channels of a tile."""

    @property
    def blocks(self) -> int:
        """Tiles over the output channels of a group; the last one overlaps the one before it."""
        return -(-self.group_outputs // self.channels)

    @property
    def output_size(self) -> tuple[int, int]:
        return self.conv.window.output_size(*self.conv.input_shape[1:3])

    @property
    def positions(self) -> int:
        """Output pixels of all images."""
        height, width = self.output_size
        return self.conv.input_shape[0] * height * width

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Output channel of every packed channel, [groups · blocks · channels]."""
        starts = np.minimum(np.arange(self.blocks) * self.channels, self.group_outputs - self.channels)
        within = (starts[:, None] + np.arange(self.channels)).reshape(-1)
        return (np.arange(self.conv.groups)[:, None] * self.group_outputs + within).reshape(-1)

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., out_channels] in the order of the tiles."""
        return np.ascontiguousarray(values[..., self.channel_rows])

    @property
    @abstractmethod
    def weight_elements(self) -> int:
        """Elements of the packed weights of one point."""

    @abstractmethod
    def pack_weights(self, weights: Array) -> Array:
        """[points, out, in / groups, kh, kw] in the order in which the kernel reads them, flat."""


@dataclass(frozen=True)
class Cell:
    """A register of a thread: an element of a small array that the compiler keeps there."""

    buffer: Buffer
    index: int = 0

    @property
    def value(self) -> Expression:
        return self.buffer[self.index]

    def store(self, value: Expression) -> None:
        T.buffer_store(self.buffer, value, [self.index])


def register(dtype: str) -> Cell:
    """A register of its own."""
    return Cell(T.alloc_buffer((1,), dtype, scope="local"))


@dataclass(frozen=True)
class TileSum:
    """Which sum a thread computes.

    Attributes:
        position: output pixel, counted over all images.
        lane: packed channel.
        channel: output channel within its group.
    """

    position: Expression
    lane: Expression
    channel: Expression


class Tile(Protocol):
    """The sums of a thread."""

    @property
    def group(self) -> Expression:
        """The group of channels that all of them belong to."""

    @property
    def sums(self) -> Sequence[TileSum]: ...

    def registers(self, dtype: str) -> Sequence[Cell]:
        """A register for each of them."""

    def accumulate(self, totals: Sequence[Cell], point: int, plane: int) -> None:
        """Adds the products of one point of the weights with one byte plane of the activations."""


Launch = Callable[[Sequence[Buffer], Sequence[Buffer], Callable[[Tile], None]], None]
"""Binds blocks and threads of a kernel of flat inputs and of arrays; calls its last argument where a thread has its tile."""


def integer_kernel(
    request: KernelRequest, geometry: TileGeometry, operand_offset: int, name: str, launch: Launch
) -> Kernel:
    """A kernel that sums products of codes.

    Args:
        request: codes with int8 weights.
        geometry: packs its constants.
        operand_offset: what is added to the codes that it multiplies.
        name: what the tiles are called in reports.
        launch: binds the threads.
    """
    lanes, passes = len(geometry.channel_rows), geometry.points * geometry.planes
    count = geometry.weight_elements * geometry.points
    types = integer_array_types(count, "int8", lanes, passes, geometry.planes, "int32")

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        return pack_integer(constants, geometry, operand_offset, "int32")

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        sources = [flat(b) for b in inputs]
        layer = _IntegerLayer(request, geometry, arrays, sources[-1], flat(output))
        launch(sources, arrays, layer.write)

    function = kernel_function(request, types, emit).with_attr("tirx.is_scheduled", True)
    return Kernel(request, f"cuda.conv2d[{name}]", function, pack)


def float_kernel(
    request: KernelRequest,
    geometry: TileGeometry,
    name: str,
    launch: Launch,
    weight_dtype: str,
    is_bit_exact: bool = True,
) -> Kernel:
    """A kernel that sums products of floats in float32.

    Args:
        request: floats.
        geometry: packs its constants.
        name: what the tiles are called in reports.
        launch: binds the threads.
        weight_dtype: in which the kernel gets the bits of the weights.
        is_bit_exact: whether it adds in the contract's order.
    """
    types = float_array_types(geometry.weight_elements, weight_dtype, len(geometry.channel_rows))

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        weights, *others = pack_float(constants, geometry)
        return weights.view(weight_dtype), *others

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        sources = [flat(b) for b in inputs]
        layer = _FloatLayer(request, geometry, arrays, sources[-1], flat(output))
        launch(sources, arrays, layer.write)

    function = kernel_function(request, types, emit).with_attr("tirx.is_scheduled", True)
    return Kernel(request, f"cuda.conv2d[{name}]", function, pack, is_bit_exact)


@dataclass(frozen=True)
class _Layer(ABC):
    """Writes what becomes of a thread's sums. ``residual`` is read if the operator has one."""

    request: KernelRequest
    geometry: TileGeometry
    arrays: Sequence[Buffer]
    residual: Buffer
    output: Buffer

    @abstractmethod
    def write(self, tile: Tile) -> None:
        """Writes all that a thread does."""

    def index(self, tile: Tile, place: TileSum) -> Expression:
        """Where a sum's result goes in the flat output, and where the residual comes from."""
        request, channel = self.request, tile.group * self.geometry.group_outputs + place.channel
        if request.shuffled:
            channel = place_of_channel(channel, self.geometry.conv.out_channels, request.shuffled)
        return place.position * request.output_shape[-1] + request.output_offset + channel


class _IntegerLayer(_Layer):
    """Sums of codes: ``arrays`` are those of ``anchor_constants.integer_array_types``."""

    def write(self, tile: Tile) -> None:
        _, starts, multipliers, offsets, _, _ = self.arrays
        lanes, planes = len(self.geometry.channel_rows), self.geometry.planes
        values, totals = tile.registers("float32"), tile.registers("int32")
        for value, place in zip(values, tile.sums, strict=True):
            value.store(offsets[place.lane])
        # In the contract's order: points ascending, within a point the low plane before the high one.
        for number in range(self.geometry.points * planes):
            for total, place in zip(totals, tile.sums, strict=True):
                total.store(starts[number * lanes + place.lane])
            tile.accumulate(totals, *divmod(number, planes))
            for value, total, place in zip(values, totals, tile.sums, strict=True):
                multiplier = multipliers[number * lanes + place.lane]
                value.store(PRIMITIVES.fma(T.Cast("float32", total.value), multiplier, value.value))
        for value, place in zip(values, tile.sums, strict=True):
            self._finish(value.value, self.index(tile, place))

    def _finish(self, value: Expression, index: Expression) -> None:
        p, output, limits, zero_points = PRIMITIVES, self.request.output, self.arrays[4], self.arrays[5]
        if len(self.request.inputs) > 1:
            difference = convert(centred(self.residual[index], zero_points[1]), "float32")
            value = p.fma(difference, limits[2], value)
        if output in ("uint8", "uint16"):
            result = requantize(p, value, limits[0], limits[1], zero_points[0], output)
        else:
            result = narrow(p, clamp(p, value, limits[0], limits[1]), output)
        T.buffer_store(self.output, result, [index])


class _FloatLayer(_Layer):
    """Sums of floats: ``arrays`` are those of ``anchor_constants.float_array_types``."""

    def write(self, tile: Tile) -> None:
        totals = tile.registers("float32")
        for total, place in zip(totals, tile.sums, strict=True):
            total.store(self.arrays[1][place.lane] if self.geometry.conv.epilogue.has_bias else T.float32(0))
        tile.accumulate(totals, 0, 0)
        for total, place in zip(totals, tile.sums, strict=True):
            self._finish(total.value, self.index(tile, place))

    def _finish(self, value: Expression, index: Expression) -> None:
        p, request, limits = PRIMITIVES, self.request, self.arrays[2]
        if len(request.inputs) > 1:
            value = p.add(value, widen(self.residual[index], request.inputs[-1]))
        result = narrow(p, clamp(p, value, limits[0], limits[1]), request.output)
        T.buffer_store(self.output, result, [index])


def served_convolution(request: KernelRequest) -> Conv2D | Dense | None:
    """The convolution or dense layer of a request that these kernels can write; else None."""
    operator: Any = request.operator
    # A residual is read at the place where the result is written.
    is_apart = (request.placement is not None or request.shuffled > 0) and len(request.inputs) > 1
    is_plain = request.overwritten is None and request.has_own_buffers
    if not isinstance(operator, (Conv2D, Dense)) or is_apart or not is_plain:
        return None
    return operator
