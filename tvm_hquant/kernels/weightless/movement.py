"""Operators that move stored values without changing them: Concat and Movement, for any storage.

Runs of neighbours are copied in vectors. Everything is told by element counts, so one storage differs from another only
in the lanes of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.constant_arrays import to_arrays
from tvm_hquant.kernels.convolution.group_interleaving import MOST_GROUPS, interleave_groups
from tvm_hquant.kernels.interface import Array, FillConstants, Kernel, KernelRequest, LayerConstants, NoConstants
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, Emit, input_place, kernel_function
from tvm_hquant.kernels.primitives import Expression, LlvmPrimitives, Primitives, broadcast, convert, narrow
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import (
    MOVE,
    elements,
    fitting_lanes,
    flat,
    flat_loop,
    load,
    row_loop,
    store,
    vector_loop,
    vectors,
)
from tvm_hquant.kernels.weightless.elementwise import Pack, is_code, pack_only, wrong_constants
from tvm_hquant.kernels.work import work
from tvm_hquant.numerics.movement import unknown_movement
from tvm_hquant.operators import Concat, Movement, Shape
from tvm_hquant.tensor_format import STORAGE_DTYPE


def movement_kernel(
    request: KernelRequest, vector_bytes: int, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel | None:
    """Concat and Movement; None for other operators and where storages differ.

    Raises:
        KernelError: the operator is a movement of no known kind.
    """
    operator = request.operator
    if not isinstance(operator, Concat | Movement) or {*request.inputs} != {request.output}:
        return None
    copies = _Copies(request, vector_bytes // np.dtype(STORAGE_DTYPE[request.output]).itemsize, processor)
    constants: tuple[ArrayType, ...] = ()
    pack = pack_only(request, NoConstants)
    if isinstance(operator, Concat):
        name, emit = "concat", _concat(request, operator, copies)
    else:
        name = operator.function
        match name:
            case "reshape":
                emit = _reshape(operator, copies)
            case "permute_dims":
                emit = _permute(operator, copies)
            case "strided_slice":
                emit = _slice(operator, copies)
            case "take":
                emit, constants, pack = (
                    _take(request, operator, copies),
                    take_types(operator),
                    take_pack(request, operator),
                )
            case "depth_to_space":
                emit = _depth_to_space(request, operator, copies)
            case "pad":
                emit, constants, pack = _pad(request, operator, copies), FILL_TYPES, fill_pack(request, operator)
            case _:
                raise unknown_movement(name)
    return Kernel(request, f"common.{name}[{copies.lanes}]", kernel_function(request, constants, emit), pack)


FILL_TYPES: tuple[ArrayType, ...] = (((1,), "float32"),)
"""A padding kernel is given the fill as one float32."""


def fill_pack(request: KernelRequest, operator: Movement) -> Pack:
    """Takes FillConstants, or the operator's own fill."""

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        if isinstance(constants, NoConstants):
            return to_arrays(FillConstants(operator.fill))
        if not isinstance(constants, FillConstants):
            raise wrong_constants(request, constants, "FillConstants")
        return to_arrays(constants)

    return pack


def stored_fill(p: Primitives, fill: Expression, storage: str) -> Expression:
    """The stored form of a fill given as float32: a code, or a float rounded to the storage."""
    return convert(convert(fill, "int32"), storage) if is_code(storage) else narrow(p, fill, storage)


def take_types(operator: Movement) -> tuple[ArrayType, ...]:
    """A take is given its indices as an int32 array."""
    return (((len(operator.parameters) - 1,), "int32"),)


def take_pack(request: KernelRequest, operator: Movement) -> Pack:
    """The indices, which are the operator's own."""
    check = pack_only(request, NoConstants)

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        return *check(constants), np.array(operator.parameters[1:], np.int32)

    return pack


def slice_starts(operator: Movement) -> list[tuple[int, int]]:
    """Begin and stride of a slice along every axis."""
    ranges = [(0, 1)] * len(operator.input_shape)
    p = operator.parameters
    for axis, begin, stride in zip(p[::3], p[1::3], p[2::3], strict=True):
        ranges[axis] = begin, stride
    return ranges


def strides_of(shape: Shape) -> tuple[int, ...]:
    """Elements between neighbours along every axis of a dense array."""
    return tuple(elements(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class _Copies:
    """Copies of runs of neighbours, in vectors of ``lanes``."""

    request: KernelRequest
    lanes: int
    processor: Processor

    def instructions(self, runs: int, length: int) -> int:
        """Those of so many runs."""
        return runs * vectors(length, fitting_lanes(length, self.lanes)) * MOVE

    @contextmanager
    def flat(self, length: int) -> Iterator[tuple[Expression, int]]:
        """A loop over the vectors of a long run: where they begin, and their lanes."""
        lanes = fitting_lanes(length, self.lanes)
        with flat_loop(length, lanes, work(self.request, self.instructions(1, length)), self.processor) as start:
            yield start, lanes

    def rows(self, count: int, instructions: int) -> Any:
        """A loop over rows that take so many instructions in all."""
        return row_loop(count, work(self.request, instructions), self.processor)

    @contextmanager
    def nest(self, shape: Shape, length: int) -> Iterator[list[Expression]]:
        """Nested loops over the places of runs of ``length`` elements; the outermost that repeats is shared out to threads
        if there is much to do."""
        with ExitStack() as stack:
            variables: list[Expression] = []
            pending = True
            for size in shape:
                if size == 1:
                    variables.append(T.int32(0))
                    continue
                loop = self.rows(size, self.instructions(elements(shape), length)) if pending else T.serial(size)
                variables.append(stack.enter_context(loop))
                pending = False
            yield variables


def _dot(indices: Sequence[Expression], factors: Sequence[int]) -> Expression:
    total: Expression = T.int32(0)
    for index, factor in zip(indices, factors, strict=True):
        total = total + index * factor
    return total


def _copy(source: Buffer, source_start: Expression, target: Buffer, start: Expression, length: int, lanes: int) -> None:
    """Copies a run of ``length`` neighbours."""
    lanes = fitting_lanes(length, lanes)
    with vector_loop(length, lanes) as offset:
        store(target, start + offset, load(source, source_start + offset, lanes), lanes)


def _fill(target: Buffer, start: Expression, value: Expression, length: int, lanes: int) -> None:
    if length:
        lanes = fitting_lanes(length, lanes)
        with vector_loop(length, lanes) as offset:
            store(target, start + offset, broadcast(value, lanes), lanes)


def _concat(request: KernelRequest, operator: Concat, copies: _Copies) -> Emit:
    shape, axis = request.output_shape, operator.axis
    if request.placement is not None and axis != len(shape) - 1:
        raise KernelError(f"{operator} joins another axis than the last: only channels are placed in a wider buffer")
    outer, step = elements(shape[:axis]), elements(shape[axis:])
    runs = [elements(part[axis:]) for part in operator.input_shapes]
    starts = [request.output_offset + offset for offset in _offsets(runs)]
    places = [input_place(request, number) for number in range(len(runs))]

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        sources, target = [flat(buffer) for buffer in inputs], flat(output)
        if outer == 1:
            for source, run, first, place in zip(sources, runs, starts, places, strict=True):
                with copies.flat(run) as (offset, width):
                    store(target, offset + first, load(source, offset + place.offset, width), width)
            return
        with copies.rows(outer, sum(copies.instructions(outer, run) for run in runs)) as row:
            for source, run, first, place in zip(sources, runs, starts, places, strict=True):
                own = row * (place.channels if axis == len(shape) - 1 else run) + place.offset
                _copy(source, own, target, row * step + first, run, copies.lanes)

    return emit


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _reshape(operator: Movement, copies: _Copies) -> Emit:
    length = elements(operator.output_shape)

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        with copies.flat(length) as (offset, width):
            store(target, offset, load(source, offset, width), width)

    return emit


def _strided(shape: Shape, steps: Sequence[int], base: int, copies: _Copies) -> Emit:
    """output[i₀, i₁, …] = flat input[base + Σ iₖ · stepₖ]; neighbours along the last axis move together if they are."""
    output_shape, strides = _merged(shape, steps)
    target_strides = strides_of(output_shape)
    run = output_shape[-1] if strides[-1] == 1 else 1
    loops = output_shape if run == 1 else output_shape[:-1]

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        with copies.nest(loops, run) as indices:
            start = base + _dot(indices, strides[: len(loops)])
            _copy(source, start, target, _dot(indices, target_strides[: len(loops)]), run, copies.lanes)

    return emit


def _merged(shape: Shape, steps: Sequence[int]) -> tuple[Shape, tuple[int, ...]]:
    """Axes that are one run of equal steps become one, axes of one element vanish."""
    sizes: list[int] = []
    kept: list[int] = []
    for size, step in zip(shape, steps, strict=True):
        if size == 1:
            continue
        if sizes and kept[-1] == step * size:
            sizes[-1] *= size
            kept[-1] = step
        else:
            sizes.append(size)
            kept.append(step)
    return tuple(sizes) or (1,), tuple(kept) or (1,)


def _permute(operator: Movement, copies: _Copies) -> Emit:
    axes, strides = operator.parameters, strides_of(operator.input_shape)
    return _strided(tuple(operator.input_shape[axis] for axis in axes), [strides[axis] for axis in axes], 0, copies)


def _slice(operator: Movement, copies: _Copies) -> Emit:
    ranges, strides = slice_starts(operator), strides_of(operator.input_shape)
    base = sum(begin * stride for (begin, _), stride in zip(ranges, strides, strict=True))
    steps = [step * stride for (_, step), stride in zip(ranges, strides, strict=True)]
    return _strided(operator.output_shape, steps, base, copies)


def interleaved_groups(indices: Sequence[int]) -> int:
    """The groups of a channel shuffle, whose indices are 0, m, 2m, …, 1, m + 1, …; 0 if they are another order."""
    count = len(indices)
    for groups in range(2, count // 2 + 1):
        if count % groups == 0 and indices[1] == count // groups:
            length = count // groups
            expected = [group * length + position for position in range(length) for group in range(groups)]
            return groups if expected == list(indices) else 0
    return 0


def _take(request: KernelRequest, operator: Movement, copies: _Copies) -> Emit:
    axis, indices = operator.parameters[0], operator.parameters[1:]
    shape = operator.input_shape
    outer, inner = elements(shape[:axis]), elements(shape[axis + 1 :])
    groups = interleaved_groups(indices) if len(indices) == shape[axis] else 0
    if groups and groups <= MOST_GROUPS and inner == 1:

        def interleave(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
            interleave_groups(
                flat(inputs[0]), flat(output), groups, shape[axis] // groups, work(request, 0), copies.processor
            )

        return interleave
    if groups:
        # A shuffle is a transposition, whose addresses need no table.
        length = shape[axis] // groups
        split = (outer, groups, length, inner)
        return _permute(Movement("permute_dims", split, (outer, length, groups, inner), (0, 2, 1, 3)), copies)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        with copies.nest((outer, len(indices)), inner) as (row, position):
            source_start = (row * shape[axis] + constants[0][position]) * inner
            _copy(source, source_start, target, (row * len(indices) + position) * inner, inner, copies.lanes)

    return emit


def _depth_to_space(request: KernelRequest, operator: Movement, copies: _Copies) -> Emit:
    groups, block_rows, block_columns, top, left = operator.parameters
    _, height, width, channels = operator.input_shape
    batch, out_height, out_width, out_channels = operator.output_shape
    depth, stored_channels = out_channels // groups, request.output_shape[-1]
    # Where columns of a block lie side by side in the output, too, they move as one run.
    is_run = groups == 1 and left == 0 and out_width == width * block_columns and stored_channels == out_channels
    parts, run, columns = (width, block_columns * depth, 1) if is_run else (out_width, depth, block_columns)
    rows = batch * out_height

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        with copies.rows(rows, copies.instructions(rows * parts * groups, run)) as row:
            y = T.floormod(row, out_height) + top
            line = T.floordiv(row, out_height) * height + T.floordiv(y, block_rows)
            first = line * (width * channels) + T.floormod(y, block_rows) * (block_columns * depth)
            start = row * (out_width * stored_channels) + request.output_offset
            with T.serial(parts) as part:
                x = part + left
                pixel = first + T.floordiv(x, columns) * channels + T.floormod(x, columns) * depth
                pixel_start = start + part * (run if is_run else stored_channels)
                with ExitStack() as stack:
                    group = stack.enter_context(T.serial(groups)) if groups > 1 else T.int32(0)
                    group_start = pixel + group * (block_rows * block_columns * depth)
                    _copy(source, group_start, target, pixel_start + group * depth, run, copies.lanes)

    return emit


def _pad(request: KernelRequest, operator: Movement, copies: _Copies) -> Emit:
    shape, output_shape, lanes = operator.input_shape, operator.output_shape, copies.lanes
    before, after = operator.parameters[::2], operator.parameters[1::2]
    # Trailing axes without padding move as one run.
    last = max((axis for axis in range(len(shape)) if before[axis] or after[axis]), default=0)
    inner = elements(shape[last + 1 :])
    run, left, right = shape[last] * inner, before[last] * inner, after[last] * inner
    strides, target_strides = strides_of(shape), strides_of(output_shape)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        with copies.nest(output_shape[:last], left + run + right) as indices:
            fill = LlvmPrimitives().bind(stored_fill(LlvmPrimitives(), constants[0][0], request.output))
            start = _dot(indices, target_strides[:last])
            positions = [index - offset for index, offset in zip(indices, before, strict=False)]
            inside = [
                T.And(position >= 0, position < size)
                for position, size, low, high in zip(positions, shape, before, after, strict=False)
                if low or high
            ]

            def copy_row() -> None:
                _fill(target, start, fill, left, lanes)
                _copy(source, _dot(positions, strides[:last]), target, start + left, run, lanes)
                _fill(target, start + left + run, fill, right, lanes)

            if not inside:
                copy_row()
                return
            condition = inside[0]
            for other in inside[1:]:
                condition = T.And(condition, other)
            with T.If(condition):
                with T.Then():
                    copy_row()
                with T.Else():
                    _fill(target, start, fill, left + run + right, lanes)

    return emit
