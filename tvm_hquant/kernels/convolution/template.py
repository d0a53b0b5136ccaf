"""Convolution, grouped convolution and dense layers on register tiles, for any :class:`DotProduct`.

A tile holds some pixels of an output row times some vectors of output channels in registers. For every kernel position and
every step over the input channels it loads one operand per pixel, repeated in all lanes, and one weight vector per vector
of channels. Positions in the padding are left out, or activations are copied first with padding around them; so they are
where they are not in the operand's form. Sums of codes start at what the zero point adds in the positions taken. 16-bit
codes and weights of several points take several passes over the same tile, whose scaled sums meet in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from typing import Any

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import float_array_types, integer_array_types, pack_float, pack_integer
from tvm_hquant.kernels.convolution.geometry import AnchorGeometry, as_conv2d
from tvm_hquant.kernels.convolution.group_interleaving import interleave_groups
from tvm_hquant.kernels.convolution.map_bands import MapBands
from tvm_hquant.kernels.convolution.operand_copy import OperandCopy
from tvm_hquant.kernels.convolution.output_places import OutputPlaces
from tvm_hquant.kernels.convolution.packing import AnchorPacking
from tvm_hquant.kernels.convolution.patches import conv_of_patches, takes_patches
from tvm_hquant.kernels.convolution.position_sweeps import PositionSweeps
from tvm_hquant.kernels.convolution.row_tiles import TileRun
from tvm_hquant.kernels.convolution.steps import StepEmitter, register
from tvm_hquant.kernels.convolution.sweep_emitter import SweepEmitter
from tvm_hquant.kernels.convolution.tile_order import TileOrder, TilePlace
from tvm_hquant.kernels.convolution.wide_weights import wide_weights, widens_weights
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.epilogues.epilogue import Epilogue, scale_accumulator
from tvm_hquant.kernels.epilogues.packed_epilogue import PackedEpilogue
from tvm_hquant.kernels.epilogues.turns import Turns
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants, Tile
from tvm_hquant.kernels.kernel_function import Buffer, imported_functions, input_place, kernel_function
from tvm_hquant.kernels.primitives import Expression, broadcast
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import flat, load, store
from tvm_hquant.kernels.word_vectors import GROUPS, CodeVectors
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Conv2D, Dense
from tvm_hquant.tensor_format import STORAGE_DTYPE

_MOST_PRODUCTS = 2**31 // (2 * 255 * 128)
"""Products of bytes whose sum stays below 2^31 together with the zero point times any of their weights."""


StartPlaces = Callable[[int, int], Expression]


def conv2d_geometry(
    request: KernelRequest,
    dot: DotProduct,
    tile: Tile | None = None,
    vectors: CodeVectors | None = None,
    processor: Processor = ASSUMED_PROCESSOR,
) -> AnchorGeometry:
    """How a convolution or dense layer is cut into tiles."""
    assert isinstance(request.operator, (Conv2D, Dense))
    planes = 2 if request.weights == "int8" and request.inputs[0] == "uint16" else 1
    conv, patches = as_conv2d(request.operator), None
    has_codes = request.weights == "int8" and request.inputs[0] == "uint8"
    if has_codes and takes_patches(conv, dot.products, dot.splits_pixels, dot.lanes):
        conv, patches = conv_of_patches(conv, processor), conv
    packs_codes = (
        vectors is not None
        and dot.lanes == vectors.words
        and request.output == "uint8"
        and request.inputs[1:] in ((), ("uint8",))
        and conv.out_channels // conv.groups * dot.groups >= dot.lanes
    )
    if request.weights == "int8":
        # Sums start without what is left out. The contract's check of weights bounds sums over the whole window alone.
        is_neutral = conv.macs // prod(conv.output_shape) <= _MOST_PRODUCTS
    else:
        # Products with padding are zeros. They may still turn a sum of −0 into +0, which this clamp makes the same.
        is_neutral = request.finite_weights and conv.epilogue.lower >= 0
    writes_once = request.overwritten is not None
    geometry = AnchorGeometry(
        conv, dot, planes, request.weight_points, tile, packs_codes, is_neutral, patches, writes_once, processor
    )
    if not any(request.sources[:1]):
        return geometry
    in_place = replace(geometry, source=input_place(request, 0))
    return replace(geometry, copies=True) if in_place.needs_copy(STORAGE_DTYPE[request.inputs[0]]) else in_place


def conv2d_kernel(
    request: KernelRequest,
    dot: DotProduct,
    family: str,
    tile: Tile | None = None,
    vectors: CodeVectors | None = None,
    processor: Processor = ASSUMED_PROCESSOR,
) -> Kernel:
    """The kernel of a convolution or dense layer with a dot product.

    ``vectors`` pack codes where the processor has them.

    Raises:
        KernelError: ``tile`` is not a candidate for this layer.
    """
    geometry = conv2d_geometry(request, dot, tile, vectors, processor)
    is_integer = request.weights == "int8"
    packing, count = AnchorPacking(geometry), geometry.weight_elements * geometry.points
    if is_integer:
        types = integer_array_types(
            count,
            dot.weight_dtype,
            geometry.packed_lanes,
            geometry.passes,
            geometry.planes,
            dot.accumulator_dtype,
            len(geometry.window_parts),
        )
        if geometry.groups_steps:
            types.append(((geometry.groups * geometry.blocks * (2 + geometry.all_steps),), "int32"))
    else:
        types = float_array_types(count, dot.weight_dtype, geometry.packed_lanes)
        types.extend((table.shape, "int32") for table in geometry.sweep_tables)

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        if is_integer:
            arrays = pack_integer(constants, packing, dot.operand_offset, dot.accumulator_dtype, geometry.window_parts)
            if not geometry.groups_steps:
                return arrays
            weights, steps = packing.group_steps(arrays[0])
            return (weights, *arrays[1:], steps)
        return (*pack_float(constants, packing), *geometry.sweep_tables)

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        with imported_functions(dot.llvm_functions):
            _Emitter(request, geometry, inputs, arrays, output, is_integer, vectors).emit()

    chain = f" chain {geometry.chain}" if geometry.chain > 1 else ""
    if geometry.groups_steps:
        chain = " pairs" if geometry.group == 2 else f" groups of {geometry.group}"
    chain = chain if geometry.sweeps is None else " sweeps"
    shuffled = "" if not request.shuffled else " shuffled" if dot.groups > 1 else " shuffled last"
    name = f"{family}.conv2d[{dot.name} {geometry.tile}{chain}{shuffled}]"
    return Kernel(request, name, kernel_function(request, types, emit), pack)


class _Emitter:
    def __init__(
        self,
        request: KernelRequest,
        geometry: AnchorGeometry,
        inputs: Sequence[Buffer],
        arrays: Sequence[Buffer],
        output: Buffer,
        is_integer: bool,
        vectors: CodeVectors | None,
    ) -> None:
        self.request = request
        self.geometry = geometry
        needs_copy = geometry.needs_copy(STORAGE_DTYPE[request.inputs[0]])
        self.bands = MapBands(geometry) if needs_copy else None
        self.work = work(request, geometry.cost)
        processor = geometry.processor
        self.order = TileOrder(geometry, self.bands, processor.cores if processor.shares(self.work) else 1)
        self.dot = geometry.dot
        self.is_integer = is_integer
        self.inputs = [flat(b) for b in inputs]
        self.weights = arrays[0]
        if is_integer:
            _, self.starts, self.multipliers, self.offsets, limits, self.zero_points, *tables = arrays
        else:
            _, self.starts, limits, *tables = arrays
            self.zero_points = None
        self.table = tables[0] if tables else None  # Of the order of steps, or of sweeps.
        self.is_shuffled_last = request.shuffled > 0 and self.dot.groups == 1
        self.output = self.shuffled = flat(output)
        if self.is_shuffled_last:
            self.output = T.alloc_buffer((prod(request.output_shape),), output.dtype)
        has_residual = geometry.conv.epilogue.has_residual
        turns = Turns(self.inputs[-1], request.interleaved.position) if request.interleaved is not None else None
        self.epilogue = Epilogue(
            request,
            self.dot.lanes,
            min(self.dot.lanes, geometry.group_outputs),
            self.inputs[1] if has_residual else None,
            limits,
            self.zero_points,
            self.output,
            turns,
        )
        self.packed_epilogue: PackedEpilogue | None = None
        if geometry.packs_codes:
            assert vectors is not None
            assert self.zero_points is not None
            residual = self.inputs[1] if has_residual else None
            self.packed_epilogue = PackedEpilogue(
                vectors, residual, limits, self.zero_points, self.output, request.ending, turns
            )
        self.origin: Expression = 0
        """The first pixel that is in memory in the form of operands."""

    def emit(self) -> None:
        """Writes all loops; the last one shuffles what the others could not store shuffled."""
        self._convolution()
        if self.is_shuffled_last:
            groups, channels = self.request.shuffled, self.request.operator.output_shape[-1]
            interleave_groups(
                self.output, self.shuffled, groups, channels // groups, self.work, self.geometry.processor
            )

    def _convolution(self) -> None:
        geometry = self.geometry
        if self.bands is not None:
            self._in_bands(self.bands)
            return
        if geometry.sweeps is not None:
            self._in_sweeps(geometry.sweeps, self.inputs[0])
            return
        self.steps = StepEmitter(geometry, self.weights, self.inputs[0])
        with self._loop(self.order.items, is_shared=True) as item, self.order.tile_loop(item) as place:
            self._tile_of_row(place, geometry.row_tiles)

    def _in_sweeps(self, sweeps: PositionSweeps, source: Buffer) -> None:
        """Takes one position of the kernel after the other, each for all of the map."""
        assert self.table is not None
        constants = self.weights, self.starts, self.table
        SweepEmitter(self.request, self.geometry, sweeps, source, *constants, self.epilogue).emit()

    def _in_bands(self, bands: MapBands) -> None:
        """Copies a band of activations, computes all tiles that read it, and goes on to the next one."""
        geometry, order = self.geometry, self.order
        steps, weights = geometry, self.weights
        if widens_weights(geometry):
            steps = replace(geometry, dot=self.dot.with_wide_weights or self.dot, chosen_tile=geometry.tile)
            weights = wide_weights(geometry, self.weights)
        with self._loop(bands.count, bands.shares_bands) as band:
            source = T.alloc_buffer((bands.elements,), self.dot.operand_dtype)
            own = input_place(self.request, 0)
            copy = OperandCopy(geometry, bands, self.request.inputs[0], self.inputs[0], source, own, self.zero_points)
            self.origin = copy.emit(band)
            if geometry.sweeps is not None:
                self._in_sweeps(geometry.sweeps, source)
                return
            self.steps = StepEmitter(steps, weights, source)
            with self._loop(order.items, not bands.shares_bands) as item, order.tile_loop(item, band) as place:
                self._tile_of_row(place, geometry.row_tiles)

    def _loop(self, count: int, is_shared: bool) -> Any:
        """A loop that threads share, if they are to, where there is work enough."""
        is_parallel = is_shared and count > 1 and self.geometry.processor.shares(self.work)
        return T.parallel(count) if is_parallel else T.serial(count)

    def _tile_of_row(self, place: TilePlace, runs: Sequence[TileRun]) -> None:
        """The tile at that place, which belongs to one of ``runs``."""
        run, *others = runs
        if not others:
            self._tile(place, run)
            return
        with T.If(place.tile < run.first + run.count):
            with T.Then():
                self._tile(place, run)
            with T.Else():
                self._tile_of_row(place, others)

    def _tile(self, place: TilePlace, run: TileRun) -> None:
        """One tile: all passes and the epilogue."""
        geometry, dot, channel_block = self.geometry, self.dot, place.channel_block
        pixels, vectors = run.pixels, geometry.tile.vectors
        _, width = geometry.output_size
        x = (place.tile - run.first) * pixels + run.start if run.count > 1 else T.int32(run.start)
        x = T.bind(x if run.start + run.count * pixels <= width else T.min(x, width - pixels))
        group = T.bind(channel_block // geometry.blocks)
        start = channel_block % geometry.blocks * geometry.block
        if geometry.blocks > 1 and geometry.group_outputs % geometry.block:
            start = T.min(start, geometry.group_outputs - geometry.block)
        channel = T.bind(group * geometry.group_outputs + start)
        constants = T.bind(channel_block * geometry.block)
        # An accumulator is named by its first pixel; of its pixels, those beyond the tile are left out in the end.
        accumulators = {
            (i, j): register(dot.accumulator_dtype, dot.accumulator_elements)
            for i in range(0, pixels, dot.pixels)
            for j in range(vectors)
        }

        def sums(i: int, j: int, start_at: StartPlaces) -> Expression:
            first = i - i % dot.pixels
            total = dot.rows(load(accumulators[first, j], 0, dot.accumulator_elements))[i - first]
            return total + load(self.starts, start_at(i, j), dot.lanes) if dot.starts_late else total

        outputs = OutputPlaces(self.request, place.row * width + x, channel)

        def prefetch_pixel(i: Expression) -> None:
            """What the epilogue reads and writes for a pixel; it comes to the cache while the sums are computed."""
            outputs.prefetch(i, geometry.block_channels, self.epilogue)

        between = prefetch_pixel if self.steps.take_one_run else None
        if between is None and dot.prefetches_outputs:
            for i in range(pixels):
                prefetch_pixel(i)
        if geometry.passes == 1:
            start_at = self._start_places(run, place, None)
            self._accumulate(accumulators, start_at, run, place, x, group, None, between)

            def scaled(i: int, j: int) -> Expression:
                value = sums(i, j, start_at)
                if not self.is_integer:
                    return value
                at = constants + j * dot.lanes
                multiplier, offset = load(self.multipliers, at, dot.lanes), load(self.offsets, at, dot.lanes)
                return scale_accumulator(value, multiplier, offset)

            self._finish(pixels, scaled, outputs)
            return
        values = {(i, j): register("float32", dot.lanes) for i in range(pixels) for j in range(vectors)}
        for i, j in values:
            store(values[i, j], 0, load(self.offsets, constants + j * dot.lanes, dot.lanes), dot.lanes)
        with T.serial(geometry.passes) as number:
            start_at = self._start_places(run, place, number)
            self._accumulate(accumulators, start_at, run, place, x, group, number)
            base = number * geometry.packed_lanes + constants
            for j in range(vectors):
                multiplier = load(self.multipliers, base + j * dot.lanes, dot.lanes)
                for i in range(pixels):
                    value = load(values[i, j], 0, dot.lanes)
                    store(values[i, j], 0, scale_accumulator(sums(i, j, start_at), multiplier, value), dot.lanes)
        self._finish(pixels, lambda i, j: load(values[i, j], 0, dot.lanes), outputs)

    def _finish(
        self,
        pixels: int,
        value: Callable[[int, int], Expression],
        outputs: OutputPlaces,
    ) -> None:
        """The epilogue of all vectors of the pixels, given the float32 value of each."""
        geometry, has_turns = self.geometry, self.epilogue.turns is not None
        if self.packed_epilogue is None:
            for i in range(pixels):
                for j in range(geometry.tile.vectors):
                    channel = geometry.vector_channel(j)
                    other = outputs.other(i, channel) if has_turns else None
                    self.epilogue.finish(value(i, j), outputs.own(i, channel), outputs.residual(i, channel), other)
            return
        for first, size in geometry.vector_groups:
            channel = geometry.vector_channel(first, size)
            for start in range(0, pixels, GROUPS // size):
                packed = range(start, min(start + GROUPS // size, pixels))
                values = [[value(i, first + j) for j in range(size)] for i in packed]
                places = [outputs.own(i, channel) for i in packed]
                residuals = [at for i in packed if (at := outputs.residual(i, channel)) is not None]
                others = [outputs.other(i, channel) for i in packed] if has_turns else []
                self.packed_epilogue.finish(values, places, residuals, others)

    def _start_places(self, run: TileRun, place: TilePlace, number: Expression | None) -> StartPlaces:
        """Where to find what the sums of a pass start at, by pixel and vector of channels of a tile."""
        geometry = self.geometry
        part_lanes = geometry.passes * geometry.packed_lanes
        base = place.channel_block * geometry.block
        if number is not None:
            base = base + number * geometry.packed_lanes
        sections = (0,) * run.pixels
        if self.is_integer and geometry.skips_padding:
            rows, columns = geometry.axes
            base = base + rows.section(place.row % geometry.output_size[0]) * (len(columns.sections) * part_lanes)
            sections = columns.sections_from(run.start, run.pixels)
        base = T.bind(base)
        return lambda i, j: base + (sections[i] * part_lanes + j * self.dot.lanes)

    def _accumulate(
        self,
        accumulators: Mapping[tuple[int, int], Buffer],
        start_at: StartPlaces,
        run: TileRun,
        place: TilePlace,
        x: Expression,
        group: Expression,
        number: Expression | None,
        between: Callable[[Expression], None] | None = None,
    ) -> None:
        """Sums of one pass, from its start values.

        What ``between`` writes for the number of a pixel is spread over the steps, where a tile has one run.
        """
        geometry, dot, window = self.geometry, self.dot, self.geometry.conv.window
        row, channel_block = place.row, place.channel_block
        kh, (sh, sw), (dh, dw) = window.kernel[0], window.strides, window.dilation
        height, _ = geometry.output_size
        padded_height, padded_width = geometry.padded_size
        pixel = geometry.pixel_elements
        point = number // geometry.planes if number is not None and geometry.points > 1 else 0
        plane = number % geometry.planes if number is not None and geometry.planes > 1 else 0
        image, y = row // height, row % height
        for (i, j), accumulator in accumulators.items():
            zeros = broadcast(T.Cast(dot.accumulator_dtype, T.int32(0)), dot.lanes)
            values = zeros if dot.starts_late else load(self.starts, start_at(i, j), dot.lanes)
            store(accumulator, 0, dot.start(values), dot.accumulator_elements)
        top, left = (a - b for a, b in zip(window.padding[:2], geometry.copied_padding[:2], strict=True))
        first = (image * padded_height + (y * sh - top)) * padded_width + (x * sw - left)
        if self.bands is not None and self.bands.count > 1:
            # The limits change nothing. They tell LLVM that no index overflows, or it extends them to 64 bits in every step.
            first = T.max(-(top * padded_width + left), T.min(first - self.origin, self.bands.pixels))
        plane_elements = self.bands.plane_elements if self.bands is not None else 0
        within = group * (dot.groups * geometry.padded_inputs) + geometry.first_channel
        corner = T.bind(first * pixel + within + plane * plane_elements)
        step_weights, row_steps = geometry.step_weights, geometry.runs * geometry.steps
        weight_base = T.bind(channel_block * geometry.tile_weights + point * geometry.weight_elements)
        if self.table is not None:
            self.steps.in_table_order(self.table, accumulators, corner, weight_base, channel_block)
            return
        upcoming = self.order.upcoming(place, run, (self.weights, weight_base), (self.steps.source, corner))
        with ExitStack() as loops:
            first_row, end_row = geometry.axes[0].steps(y) if geometry.skips_padding else (0, kh)
            ky = loops.enter_context(T.serial(first_row, end_row)) if kh > 1 or geometry.skips_padding else 0
            row_at, weight_row = (
                corner + ky * (dh * padded_width * pixel),
                weight_base + ky * (row_steps * step_weights),
            )
            if run.columns is None:
                kx = loops.enter_context(T.serial(geometry.runs)) if geometry.runs > 1 else 0
                at, weight_at = row_at + kx * (dw * pixel), weight_row + kx * (geometry.steps * step_weights)
                at, weight_at = T.bind(at), T.bind(weight_at)
                done = T.bind(ky * row_steps + kx * geometry.steps)
                self.steps.run(run.pixels, accumulators, at, weight_at, geometry.steps, upcoming, done, between)
                return
            row_at, weight_row = T.bind(row_at), T.bind(weight_row)
            steps = geometry.padded_inputs // dot.products
            for column, (begin, end) in enumerate(run.columns):
                reached = {(i, j): sums for (i, j), sums in accumulators.items() if begin <= i < end}
                if reached:
                    at, weight_at = row_at + column * (dw * pixel), weight_row + column * (steps * step_weights)
                    done = T.bind(ky * row_steps + column * steps)
                    self.steps.run(run.pixels, reached, at, weight_at, steps, upcoming, done)
