"""Layer, group and instance normalization.

Channels of a group that lie together make rows, along which vectors go: a row of layer normalization is whole, and several
of them are summed side by side, as the additions of one wait for each other. Where groups are narrow and there are many
positions, vectors hold the channels of several groups instead, each channel with its own sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import Kernel, KernelRequest, NormalizationConstants
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, kernel_function
from tvm_hquant.kernels.primitives import (
    STACK,
    Expression,
    LlvmPrimitives,
    Primitives,
    broadcast,
    float_like,
    lanes_of,
    vector_type,
    widen,
)
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, CACHE_LINE, Processor
from tvm_hquant.kernels.vector_loops import fitting_lanes, flat, load, row_loop, store, vector_loop, vectors
from tvm_hquant.kernels.weightless.elementwise import Pack, float_ending, is_code, pack_only, stored_float
from tvm_hquant.kernels.work import work
from tvm_hquant.numerics.group_normalization import PARTIAL_SUMS
from tvm_hquant.operators import GroupNormalization

_LINES = 4
"""Rows that are summed side by side, at most: each has 16 sums, half of the registers of AVX2 in all."""
_BLOCK, _SHARED_BLOCK = 64, CACHE_LINE // 4
"""Channels, at least, that are taken through all positions together, by the only thread or by one of several."""
_INSTRUCTIONS = 20
"""Of a vector of float32, which is read three times."""

Value = Callable[[int, Expression, int], Expression]
"""The float32 of a line of a group, from a channel on, as many lanes as given."""


def group_normalization_kernel(
    request: KernelRequest, lanes: int, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel | None:
    """Normalization of floats over groups of channels, into floats or codes; None for everything else."""
    operator = request.operator
    if not isinstance(operator, GroupNormalization) or is_code(request.inputs[0]):
        return None
    lanes = min(lanes, PARTIAL_SUMS)
    if operator.positions > 1 and operator.group_channels < PARTIAL_SUMS:
        return _of_narrow_groups(request, operator, fitting_lanes(operator.channels, lanes), processor)
    return _of_rows(request, operator, fitting_lanes(operator.group_channels, lanes), processor)


def normalization_types(request: KernelRequest, operator: GroupNormalization) -> tuple[ArrayType, ...]:
    """Types of the constants: gamma, beta, and those of a quantize where codes are stored."""
    vector: ArrayType = ((operator.channels,), "float32")
    return (vector, vector, *float_ending(request))


def pack_normalization(request: KernelRequest) -> Pack:
    """Packs gamma and beta, and what quantizes the result."""
    return pack_only(request, NormalizationConstants)


def mean_of(p: Primitives, total: Expression, operator: GroupNormalization) -> Expression:
    """A sum over a group by the number of its elements."""
    count = float(np.float32(operator.positions * operator.group_channels))
    return p.divide(total, float_like(count, total))


def reciprocal_deviation(p: Primitives, variance: Expression, operator: GroupNormalization) -> Expression:
    """1 / √(variance + epsilon)."""
    base = p.add(variance, float_like(float(np.float32(operator.epsilon)), variance))
    return p.divide(float_like(1.0, base), p.square_root(base))


def sum_of_partial_sums(p: Primitives, partial: Sequence[Expression]) -> Expression:
    """Scalars added in the contract's order: with half of their number between two, then a quarter, down to neighbours.

    There may be fewer than 16: those that are missing are +0, which changes no sum.
    """
    half, sums = PARTIAL_SUMS // 2, list(partial)
    while half:
        sums = [p.add(s, sums[k + half]) if k + half < len(sums) else s for k, s in enumerate(sums[:half])]
        half //= 2
    return sums[0]


def _sum_of_lanes(p: Primitives, accumulators: Sequence[Expression]) -> Expression:
    """The same of vectors that hold the partial sums, those in front in the first."""
    sums = list(accumulators)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [p.add(a, b) for a, b in zip(sums[:half], sums[half:], strict=True)]
    total = p.bind(sums[0])
    while (width := lanes_of(total) // 2) >= 2:
        halves = vector_type("float32", width)
        total = p.bind(p.add(T.vectorlow(halves, total), T.vectorhigh(halves, total)))
    if lanes_of(total) == 1:
        return total
    pair = T.alloc_buffer((2,), "float32", scope=STACK)
    store(pair, 0, total, 2)
    return p.bind(p.add(pair[0], pair[1]))


class _Cell:
    """A vector that lives in registers through a loop."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.buffer = T.alloc_buffer((width,), "float32", scope=STACK)
        self.set(broadcast(T.float32(0), width))

    def get(self) -> Expression:
        return load(self.buffer, 0, self.width)

    def set(self, value: Expression) -> None:
        store(self.buffer, 0, value, self.width)


class _RowSums:
    """Sums over rows of a length, side by side, in vectors of a width."""

    def __init__(self, p: Primitives, lines: int, length: int, width: int) -> None:
        self.p, self.lines, self.length, self.width = p, lines, length, width
        self.cells = [[_Cell(width) for _ in range(PARTIAL_SUMS // width)] for _ in range(lines)]

    def add(self, value: Value, square: bool) -> None:
        """Adds values, or their squares, of one position."""
        count = PARTIAL_SUMS // self.width
        blocks, tail = self.length // PARTIAL_SUMS, self.length % self.width
        if blocks:
            with T.serial(blocks) as block:
                for k in range(count):
                    self._step(k, value, block * PARTIAL_SUMS + k * self.width, square)
        for k in range(self.length % PARTIAL_SUMS // self.width):
            self._step(k, value, T.int32(blocks * PARTIAL_SUMS + k * self.width), square)
        if tail:
            first = self.length - tail
            for line in range(self.lines):
                rest = _Cell(self.width)
                with T.serial(tail) as k:
                    store(rest.buffer, k, value(line, first + k, 1), 1)
                self._accumulate(line, first % PARTIAL_SUMS // self.width, rest.get(), square)

    def totals(self) -> list[Expression]:
        return [_sum_of_lanes(self.p, [cell.get() for cell in cells]) for cells in self.cells]

    def _step(self, k: int, value: Value, start: Expression, square: bool) -> None:
        for line in range(self.lines):
            self._accumulate(line, k, value(line, start, self.width), square)

    def _accumulate(self, line: int, k: int, x: Expression, square: bool) -> None:
        cell = self.cells[line][k]
        if square:
            x = self.p.bind(x)
            cell.set(self.p.fma(x, x, cell.get()))
        else:
            cell.set(self.p.add(cell.get(), x))


def _of_rows(request: KernelRequest, operator: GroupNormalization, width: int, processor: Processor) -> Kernel:
    p, storage = LlvmPrimitives(), request.inputs[0]
    length, channels, positions, groups = (
        operator.group_channels,
        operator.channels,
        operator.positions,
        operator.groups,
    )
    rows = operator.outer * groups
    lines = fitting_lanes(rows, _LINES) if positions == 1 else 1

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        gamma, beta, *ending = constants
        instructions = rows * positions * vectors(length, width) * _INSTRUCTIONS
        with row_loop(vectors(rows, lines), work(request, instructions), processor) as number:
            first = T.bind(number * lines if rows % lines == 0 else T.min(number * lines, rows - lines))
            starts, factors = [], []
            for line in range(lines):
                group = T.int32(0) if groups == 1 else T.floormod(first + line, groups)
                outer = first + line if groups == 1 else T.floordiv(first + line, groups)
                factors.append(T.bind(group * length))
                starts.append(T.bind(outer * (positions * channels) + group * length))

            def value(position: Expression) -> Value:
                def x(line: int, start: Expression, lanes: int) -> Expression:
                    return widen(load(source, starts[line] + position * channels + start, lanes), storage)

                return x

            sums = _RowSums(p, lines, length, width)
            with T.serial(positions) as position:
                sums.add(value(position), square=False)
            means = [p.bind(mean_of(p, total, operator)) for total in sums.totals()]

            def deviation(position: Expression) -> Value:
                x = value(position)
                return lambda line, start, lanes: p.subtract(x(line, start, lanes), broadcast(means[line], lanes))

            squares = _RowSums(p, lines, length, width)
            with T.serial(positions) as position:
                squares.add(deviation(position), square=True)
            factor = [
                p.bind(reciprocal_deviation(p, mean_of(p, total, operator), operator)) for total in squares.totals()
            ]
            with T.serial(positions) as position, vector_loop(length, width) as start:
                for line in range(lines):
                    scaled = p.multiply(deviation(position)(line, start, width), broadcast(factor[line], width))
                    result = p.fma(
                        scaled,
                        load(gamma, factors[line] + start, width),
                        load(beta, factors[line] + start, width),
                    )
                    place = starts[line] + position * channels + start
                    store(target, place, stored_float(p, result, request, ending), width)

    function = kernel_function(request, normalization_types(request, operator), emit)
    return Kernel(request, f"common.group_normalization[{width}]", function, pack_normalization(request))


def _groups_together(operator: GroupNormalization, wanted: int) -> int:
    """Groups whose channels are taken through all positions together: as few as have so many channels."""
    fitting = [
        count
        for count in range(1, operator.groups)
        if operator.groups % count == 0 and count * operator.group_channels >= wanted
    ]
    return min(fitting, default=operator.groups)


def _of_narrow_groups(request: KernelRequest, operator: GroupNormalization, width: int, processor: Processor) -> Kernel:
    """Groups of fewer than 16 channels: a sum for each channel."""
    p, storage = LlvmPrimitives(), request.inputs[0]
    channels, positions, per_group = operator.channels, operator.positions, operator.group_channels
    in_all = work(request, operator.outer * positions * vectors(channels, width) * _INSTRUCTIONS)
    together = _groups_together(operator, _SHARED_BLOCK if processor.shares(in_all) else _BLOCK)
    block = together * per_group
    blocks = channels // block

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        gamma, beta, *ending = constants
        with row_loop(operator.outer * blocks, in_all, processor) as number:
            outer, first = T.floordiv(number, blocks), T.bind(T.floormod(number, blocks) * block)
            start = T.bind(outer * (positions * channels) + first)
            sums = T.alloc_buffer((block,), "float32")
            means, factors = T.alloc_buffer((block,), "float32"), T.alloc_buffer((block,), "float32")

            def value(position: Expression, channel: Expression) -> Expression:
                return widen(load(source, start + position * channels + channel, width), storage)

            def add_up(step: Callable[[Expression, Expression, Expression], Expression]) -> None:
                """sums[c] = step(sum, x, c) for all positions, ascending."""
                with vector_loop(block, width) as channel:
                    total = _Cell(width)
                    with T.serial(positions) as position:
                        total.set(step(total.get(), value(position, channel), channel))
                    store(sums, channel, total.get(), width)

            def of_groups(result: Buffer, finish: Callable[[Expression], Expression]) -> None:
                """result[c] = finish(sum over the group of channel c)."""
                with T.serial(together) as group:
                    own = [sums[group * per_group + k] for k in range(per_group)]
                    finished = p.bind(finish(mean_of(p, sum_of_partial_sums(p, own), operator)))
                    with T.serial(per_group) as k:
                        store(result, group * per_group + k, finished, 1)

            def square(total: Expression, x: Expression, channel: Expression) -> Expression:
                d = p.bind(p.subtract(x, load(means, channel, width)))
                return p.fma(d, d, total)

            add_up(lambda total, x, _: p.add(total, x))
            of_groups(means, lambda mean: mean)
            add_up(square)
            of_groups(factors, lambda variance: reciprocal_deviation(p, variance, operator))
            with T.serial(positions) as position, vector_loop(block, width) as channel:
                d = p.subtract(value(position, channel), load(means, channel, width))
                scaled = p.multiply(d, load(factors, channel, width))
                place = first + channel
                result = p.fma(scaled, load(gamma, place, width), load(beta, place, width))
                stored = stored_float(p, result, request, ending)
                store(target, start + position * channels + channel, stored, width)

    function = kernel_function(request, normalization_types(request, operator), emit)
    return Kernel(request, f"common.group_normalization[{width}]", function, pack_normalization(request))
