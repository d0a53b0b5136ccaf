"""Depthwise convolution of codes: every lane is a channel, words of input rows and weights are multiplied lane by lane.

For each group of output rows and each vector of channels the input rows are first put together (:mod:`.rows`), in memory
that stays in the first-level cache, with the padding filled in; then tiles of some pixels are computed from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import integer_array_types, pack_integer
from tvm_hquant.kernels.depthwise.geometry import DepthwiseGeometry
from tvm_hquant.kernels.depthwise.rows import DepthwiseRows
from tvm_hquant.kernels.dot_product import DotProduct, WideningDot
from tvm_hquant.kernels.epilogues.epilogue import Epilogue, scale_accumulator
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, input_place, kernel_function
from tvm_hquant.kernels.primitives import STACK, Expression
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import fitting_lanes, flat, load, store
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Conv2D


def depthwise_kernel(
    request: KernelRequest, dot: DotProduct, family: str, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel:
    """The kernel of a depthwise convolution with int8 weights, and a dot product for these."""
    conv = request.operator
    assert isinstance(conv, Conv2D)
    planes = 2 if request.inputs[0] == "uint16" else 1
    geometry = DepthwiseGeometry(conv, _fitting_dot(dot, conv.in_channels), planes, request.weight_points, processor)
    dot = geometry.dot
    count = geometry.points * geometry.vectors * geometry.weight_elements
    types = integer_array_types(
        count, dot.weight_dtype, geometry.packed_lanes, geometry.passes, planes, dot.accumulator_dtype
    )

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        return pack_integer(constants, geometry, dot.operand_offset, dot.accumulator_dtype)

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        _Emitter(request, geometry, inputs, arrays, output).emit()

    name = f"{family}.depthwise_conv2d[{dot.name} {geometry.tile_rows}x{geometry.pixels}x{geometry.lanes}]"
    return Kernel(request, name, kernel_function(request, types, emit), pack)


def _fitting_dot(dot: DotProduct, channels: int) -> DotProduct:
    """``dot``, or a plain multiply-add where there are fewer channels than it has lanes."""
    lanes = fitting_lanes(channels, dot.lanes)
    return dot if lanes == dot.lanes else WideningDot(lanes, dot.registers)


class _Emitter:
    def __init__(
        self,
        request: KernelRequest,
        geometry: DepthwiseGeometry,
        inputs: Sequence[Buffer],
        arrays: Sequence[Buffer],
        output: Buffer,
    ) -> None:
        self.request = request
        self.geometry = geometry
        self.dot = geometry.dot
        self.inputs = [flat(b) for b in inputs]
        self.weights, self.starts, self.multipliers, self.offsets, limits, self.zero_points = arrays
        residual = self.inputs[1] if geometry.conv.epilogue.has_residual else None
        lanes = geometry.lanes
        self.epilogue = Epilogue(request, lanes, lanes, residual, limits, self.zero_points, flat(output))

    def emit(self) -> None:
        geometry, conv, lanes = self.geometry, self.geometry.conv, self.geometry.lanes
        items = conv.input_shape[0] * geometry.groups
        height = geometry.output_size[0]
        loop = (
            T.parallel
            if geometry.processor.shares(work(self.request, geometry.instructions)) and items > 1
            else T.serial
        )
        with loop(items) as item:
            words = T.alloc_buffer((geometry.planes * geometry.plane_elements,), "int32")
            image = T.bind(item // geometry.groups)
            row = T.bind(T.min(item % geometry.groups * geometry.group_rows, height - geometry.group_rows))
            rows = DepthwiseRows(geometry, self.inputs[0], input_place(self.request, 0), words, self._zero_points())
            with T.serial(geometry.vectors) as vector:
                channel = T.bind(T.min(vector * lanes, geometry.channels - lanes))
                rows.emit(image, row * conv.window.strides[0] - conv.window.padding[0], channel)
                output_row = T.bind(image * height + row)
                if geometry.has_words:
                    self._row(words, 0, output_row, vector, channel)
                else:
                    with T.serial(geometry.group_rows) as r:
                        self._row(words, r, output_row, vector, channel)

    def _zero_points(self) -> tuple[Expression, ...]:
        return tuple(self.zero_points[2 + plane] for plane in range(self.geometry.planes))

    def _row(
        self, words: Buffer, first: Expression, output_row: Expression, vector: Expression, channel: Expression
    ) -> None:
        """Tiles over the columns of ``tile_rows`` output rows, the first of which is row ``first`` of the group."""
        geometry, lanes, pixels = self.geometry, self.geometry.lanes, self.geometry.pixels
        width = geometry.output_size[1]
        places = [(r, i) for r in range(geometry.tile_rows) for i in range(pixels)]
        constants = T.bind(vector * lanes)
        with T.serial(-(-width // pixels)) as tile:
            x = T.bind(tile * pixels if width % pixels == 0 else T.min(tile * pixels, width - pixels))
            sums = {place: T.alloc_buffer((lanes,), self.dot.accumulator_dtype, scope=STACK) for place in places}

            def output_index(r: int, i: int, x: Expression = x) -> Expression:
                pixel = (output_row + first + r) * width + x + i
                return pixel * self.request.output_shape[-1] + self.request.output_offset + channel

            if geometry.passes == 1:
                self._accumulate(sums, words, first, x, vector, None)
                for place in places:
                    multiplier, offset = (load(a, constants, lanes) for a in (self.multipliers, self.offsets))
                    value = scale_accumulator(load(sums[place], 0, lanes), multiplier, offset)
                    self.epilogue.finish(value, output_index(*place))
            else:
                values = {place: T.alloc_buffer((lanes,), "float32", scope=STACK) for place in places}
                for value in values.values():
                    store(value, 0, load(self.offsets, constants, lanes), lanes)
                with T.serial(geometry.passes) as number:
                    self._accumulate(sums, words, first, x, vector, number)
                    multiplier = T.bind(load(self.multipliers, number * geometry.packed_lanes + constants, lanes))
                    for place in places:
                        scaled = scale_accumulator(
                            load(sums[place], 0, lanes), multiplier, load(values[place], 0, lanes)
                        )
                        store(values[place], 0, scaled, lanes)
                for place in places:
                    self.epilogue.finish(load(values[place], 0, lanes), output_index(*place))

    def _accumulate(
        self,
        sums: Mapping[tuple[int, int], Buffer],
        words: Buffer,
        first: Expression,
        x: Expression,
        vector: Expression,
        number: Expression | None,
    ) -> None:
        """Sums of one pass of a tile, from its start values."""
        geometry, dot, lanes = self.geometry, self.dot, self.geometry.lanes
        window = geometry.conv.window
        kernel_width, stride, dilation = window.kernel[1], window.strides[1], window.dilation[1]
        plane = number % geometry.planes if number is not None and geometry.planes > 1 else 0
        point = number // geometry.planes if number is not None and geometry.points > 1 else 0
        pass_start = 0 if number is None else number * geometry.packed_lanes
        start = T.bind(load(self.starts, pass_start + vector * lanes, lanes))
        for total in sums.values():
            store(total, 0, start, lanes)
        weight_base = T.bind((point * geometry.vectors + vector) * geometry.weight_elements)
        weight_lanes = lanes * dot.products
        columns = range((geometry.pixels - 1) * stride + (kernel_width - 1) * dilation + 1)
        with ExitStack() as loops:
            tap = loops.enter_context(T.serial(geometry.taps)) if geometry.taps > 1 else 0
            row_base = T.bind(
                plane * geometry.plane_elements
                + (geometry.prepared_row(first, tap) * geometry.padded_width + x * stride) * lanes
            )
            for column in columns:
                users = [
                    (r, i, kx) for kx in range(kernel_width) for r, i in sums if i * stride + kx * dilation == column
                ]
                if not users:
                    continue
                operand = T.bind(self._operand(load(words, row_base + column * lanes, lanes)))
                for r, i, kx in users:
                    at = weight_base + ((r * geometry.taps + tap) * kernel_width + kx) * weight_lanes
                    weight = load(self.weights, at, weight_lanes)
                    total = sums[r, i]
                    store(total, 0, dot.accumulate(load(total, 0, lanes), [operand], [weight]), lanes)

    def _operand(self, word: Expression) -> Expression:
        """A vector of words as the dot product takes it."""
        products = self.dot.products
        return word if products == 1 else T.reinterpret(f"int{32 // products}x{products * self.geometry.lanes}", word)
