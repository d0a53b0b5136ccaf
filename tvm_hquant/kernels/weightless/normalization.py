"""Float operators that look along an axis: Softmax and LocalResponseNormalization."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.float_math import exp, power, power_of_bounded
from tvm_hquant.kernels.interface import Kernel, KernelRequest, NoConstants
from tvm_hquant.kernels.kernel_function import Buffer, kernel_function
from tvm_hquant.kernels.primitives import (
    STACK,
    Expression,
    LlvmPrimitives,
    Primitives,
    broadcast,
    float_like,
    narrow,
    select,
    widen,
)
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import (
    elements,
    fitting_lanes,
    flat,
    load,
    row_loop,
    store,
    vector_loop,
    vector_start,
    vectors,
)
from tvm_hquant.kernels.weightless.elementwise import float_ending, is_code, pack_ending, pack_only, stored_float
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import LocalResponseNormalization, Softmax

_LINES = 8
"""Pixels whose channels local response normalization takes at once, and rows whose sums softmax makes at once, at most."""
_SIDE_BY_SIDE = 4
"""Vectors whose powers are computed side by side: the steps of one polynomial wait for each other."""
_EXPONENTIAL, _POWER = 40, 80
"""Instructions of softmax and of local response normalization for a vector of float32."""


def normalization_kernel(request: KernelRequest, lanes: int, processor: Processor = ASSUMED_PROCESSOR) -> Kernel | None:
    """Softmax of floats, into floats or codes, and local response normalization between floats; None for everything else."""
    operator = request.operator
    if is_code(request.inputs[0]):
        return None
    if isinstance(operator, Softmax):
        return _softmax(request, operator, lanes, processor)
    if isinstance(operator, LocalResponseNormalization) and not is_code(request.output):
        return _local_response_normalization(request, operator, _SIDE_BY_SIDE * lanes, processor)
    return None


def _fitting_lines(rows: int, line_elements: int, cache_bytes: int) -> int:
    """Lines of float32 that are worked on at once: a power of two, as many as half of a cache holds."""
    return fitting_lanes(min(rows, max(1, cache_bytes // (2 * 4 * line_elements))), _LINES)


def _softmax(request: KernelRequest, operator: Softmax, lanes: int, processor: Processor) -> Kernel:
    """Where the axis is the last, :func:`_softmax_of_rows`; elsewhere neighbouring sums share a vector."""
    p, source_storage = LlvmPrimitives(), request.inputs[0]
    shape, axis = operator.shape, operator.axis
    outer, length, inner = elements(shape[:axis]), shape[axis], elements(shape[axis + 1 :])
    if inner == 1:
        return _softmax_of_rows(request, operator, outer, fitting_lanes(length, lanes), processor)
    width = fitting_lanes(inner, lanes)

    def emit(inputs: Sequence[Buffer], ending: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        instructions = outer * vectors(inner, width) * length * _EXPONENTIAL
        with row_loop(outer, work(request, instructions), processor) as row:
            scratch = T.alloc_buffer((length * width,), "float32")
            with vector_loop(inner, width) as column:
                base = row * (length * inner) + column
                cell = T.alloc_buffer((width,), "float32", scope=STACK)
                store(cell, 0, broadcast(T.float32(float("-inf")), width), width)
                with T.serial(length) as k:
                    x = p.bind(widen(load(source, base + k * inner, width), source_storage))
                    largest = load(cell, 0, width)
                    store(cell, 0, select(x > largest, x, largest), width)
                largest = load(cell, 0, width)
                with T.serial(length) as k:
                    x = widen(load(source, base + k * inner, width), source_storage)
                    store(scratch, k * width, exp(p, p.subtract(x, largest)), width)
                store(cell, 0, broadcast(T.float32(0), width), width)
                with T.serial(length) as k:
                    store(cell, 0, p.add(load(cell, 0, width), load(scratch, k * width, width)), width)
                total = load(cell, 0, width)
                with T.serial(length) as k:
                    value = p.divide(load(scratch, k * width, width), total)
                    store(target, base + k * inner, stored_float(p, value, request, ending), width)

    function = kernel_function(request, float_ending(request), emit)
    return Kernel(request, f"common.softmax[{width}]", function, pack_ending(request))


def _softmax_of_rows(request: KernelRequest, operator: Softmax, rows: int, width: int, processor: Processor) -> Kernel:
    """Everything but the sum goes in vectors along a row. The sum's order is fixed, so several rows are summed side by side:
    the additions of one wait for each other longer than for the second-level cache."""
    p, source_storage = LlvmPrimitives(), request.inputs[0]
    length = operator.shape[operator.axis]
    lines = _fitting_lines(rows, length, processor.l2_bytes)

    def largest_of(source: Buffer, base: Expression) -> Expression:
        """The largest value of a row, NaN left out. The order does not matter: exp(x − m) is the same for 0 and −0."""
        cell = T.alloc_buffer((width,), "float32", scope=STACK)
        store(cell, 0, broadcast(T.float32(float("-inf")), width), width)
        with vector_loop(length, width) as k:
            x = p.bind(widen(load(source, base + k, width), source_storage))
            largest = load(cell, 0, width)
            store(cell, 0, select(x > largest, x, largest), width)
        best = T.alloc_buffer((1,), "float32", scope=STACK)
        store(best, 0, cell[0], 1)
        with T.serial(width - 1) as lane:
            T.buffer_store(best, select(cell[lane + 1] > best[0], cell[lane + 1], best[0]), [0])
        return best[0]

    def emit(inputs: Sequence[Buffer], ending: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        instructions = rows * vectors(length, width) * _EXPONENTIAL
        with row_loop(vectors(rows, lines), work(request, instructions), processor) as group:
            first = T.bind(vector_start(group, rows, lines))
            powers = T.alloc_buffer((lines * length,), "float32")
            with T.serial(lines) as line:
                base = T.bind((first + line) * length)
                largest = largest_of(source, base)
                with vector_loop(length, width) as k:
                    x = widen(load(source, base + k, width), source_storage)
                    store(powers, line * length + k, exp(p, p.subtract(x, broadcast(largest, width))), width)
            sums = [T.alloc_buffer((1,), "float32", scope=STACK) for _ in range(lines)]
            for total in sums:
                store(total, 0, T.float32(0), 1)
            with T.serial(length) as k:
                for line, total in enumerate(sums):
                    store(total, 0, p.add(total[0], powers[line * length + k]), 1)
            for line, total in enumerate(sums):
                with vector_loop(length, width) as k:
                    value = p.divide(load(powers, line * length + k, width), broadcast(total[0], width))
                    store(target, (first + line) * length + k, stored_float(p, value, request, ending), width)

    function = kernel_function(request, float_ending(request), emit)
    return Kernel(request, f"common.softmax[{width}]", function, pack_ending(request))


def normalized(p: Primitives, operator: LocalResponseNormalization, x: Expression, squares: Expression) -> Expression:
    """x · power(fma(s, float32(alpha / size), bias), −beta) for the sum s of squares."""
    scale, bias = float(np.float32(operator.alpha / operator.size)), float(np.float32(operator.bias))
    base = p.fma(squares, float_like(scale, x), float_like(bias, x))
    exponent = float(np.float32(-operator.beta))
    # A sum of squares is not negative, nor is its product with the scale.
    return p.multiply(x, power_of_bounded(p, base, exponent, bias) if scale >= 0 else power(p, base, exponent))


def _local_response_normalization(
    request: KernelRequest, operator: LocalResponseNormalization, lanes: int, processor: Processor
) -> Kernel:
    """Pixels are widened into lines with zeros at both ends: a square of 0 changes no sum.

    Several lines are written before the first is read, since reading across what was just stored in parts stalls.
    """
    p, source_storage = LlvmPrimitives(), request.inputs[0]
    channels, rows = operator.shape[-1], elements(operator.shape[:-1])
    before, width = (operator.size - 1) // 2, fitting_lanes(channels, lanes)
    padded = channels + operator.size - 1
    lines = _fitting_lines(rows, padded, processor.l1_bytes)

    def fill_line(source: Buffer, line: Buffer, first: Expression, row: Expression) -> None:
        for begin, count in ((0, before), (before + channels, operator.size - 1 - before)):
            with T.serial(count) as k:
                store(line, first + begin + k, T.float32(0), 1)
        with vector_loop(channels, width) as channel:
            x = widen(load(source, row * channels + channel, width), source_storage)
            store(line, first + before + channel, x, width)

    def normalize_line(line: Buffer, first: Expression, target: Buffer, row: Expression) -> None:
        with vector_loop(channels, width) as channel:
            squares = float_like(0.0, load(line, 0, width))
            for k in range(operator.size):
                neighbour = p.bind(load(line, first + channel + k, width))
                squares = p.bind(p.fma(neighbour, neighbour, squares))
            x = p.bind(load(line, first + before + channel, width))
            value = normalized(p, operator, x, squares)
            store(target, row * channels + channel, narrow(p, value, request.output), width)

    def emit(inputs: Sequence[Buffer], _: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        instructions = rows * vectors(channels, width) * _SIDE_BY_SIDE * _POWER
        with row_loop(vectors(rows, lines), work(request, instructions), processor) as group:
            first_row = T.bind(vector_start(group, rows, lines))
            line = T.alloc_buffer((lines * padded,), "float32")
            with T.serial(lines) as k:
                fill_line(source, line, k * padded, first_row + k)
            with T.serial(lines) as k:
                normalize_line(line, k * padded, target, first_row + k)

    function = kernel_function(request, (), emit)
    name = f"common.local_response_normalization[{width}]"
    return Kernel(request, name, function, pack_only(request, NoConstants))
