"""Products of matrices that are activations both, by the dot products of convolutions.

The second matrices are packed first, as weights are at compile time (:mod:`.packed_matrix`). Sums of codes
start at minus the sum for a row of zero points, which the same steps compute. Tiles of rows and vectors of columns then
run as in a dense layer; the last tile and the last vector are moved back to end with the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.convolution.activation_copy import COPY_LANES
from tvm_hquant.kernels.convolution.geometry import AnchorGeometry, as_conv2d
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.interface import (
    Array,
    IntegerElementwiseConstants,
    Kernel,
    KernelRequest,
    LayerConstants,
    NoConstants,
)
from tvm_hquant.kernels.kernel_function import ArrayType, Buffer, imported_functions, kernel_function
from tvm_hquant.kernels.matmul.matrix_views import MatrixView, dense_numbers, distinct, input_view, output_view
from tvm_hquant.kernels.matmul.packed_matrix import PackedMatrix
from tvm_hquant.kernels.primitives import (
    STACK,
    Expression,
    LlvmPrimitives,
    broadcast,
    convert,
    float_like,
    lanes_of,
    narrow,
    requantize,
    vector_type,
    widen,
)
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import fitting_lanes, flat, load, store, vector_loop
from tvm_hquant.kernels.weightless.elementwise import is_code, pack_only
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import BatchMatmul, Dense
from tvm_hquant.tensor_format import STORAGE_DTYPE

INTEGER_TYPES: tuple[ArrayType, ...] = (((1,), "float32"), ((2,), "float32"), ((3,), "int32"))
"""Multiplier, limits, zero points [first input, second input, output]."""

SECOND_ZERO_POINT = 128
"""Of the stored codes of the second matrix: symmetric int8."""


def as_dense_request(request: KernelRequest) -> KernelRequest | None:
    """The dense layer that computes one product, with the second matrix as weights of which nothing is known; None for 16-bit
    codes, and for codes times floats."""
    operator = request.operator
    assert isinstance(operator, BatchMatmul)
    first, second = request.inputs
    if "uint16" in (first, second) or is_code(first) != is_code(second) or (is_code(request.output) > is_code(first)):
        return None
    dense = Dense(operator.rows, operator.depth, operator.columns)
    weights = "int8" if is_code(second) else second
    # Codes of −128 times −128: no two such products fit int16.
    return replace(request, operator=dense, inputs=(first,), weights=weights, centred_products=1)


def batch_matmul_kernel(
    request: KernelRequest, dot: DotProduct, family: str, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel:
    """The kernel of a batch matmul with a dot product."""
    operator = request.operator
    assert isinstance(operator, BatchMatmul)
    dense = as_conv2d(Dense(operator.rows, operator.depth, operator.columns))
    geometry = AnchorGeometry(dense, dot, 1, 1, processor=processor)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        with imported_functions(dot.llvm_functions):
            _Emitter(request, geometry, inputs, constants, output).emit()

    name = f"{family}.batch_matmul[{dot.name} {geometry.tile}]"
    if not is_code(request.inputs[0]):
        return Kernel(request, name, kernel_function(request, (), emit), pack_only(request, NoConstants))
    check = pack_only(request, IntegerElementwiseConstants)

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        arrays = check(constants)
        if int(arrays[2][1]) != SECOND_ZERO_POINT:
            raise KernelError(
                f"{name} takes second matrices in symmetric int8 codes, stored with zero point {SECOND_ZERO_POINT}, not "
                f"{int(arrays[2][1])}"
            )
        return arrays

    return Kernel(request, name, kernel_function(request, INTEGER_TYPES, emit), pack)


class _Emitter:
    def __init__(
        self,
        request: KernelRequest,
        geometry: AnchorGeometry,
        inputs: Sequence[Buffer],
        constants: Sequence[Buffer],
        output: Buffer,
    ) -> None:
        assert isinstance(request.operator, BatchMatmul)
        self.request = request
        self.operator: BatchMatmul = request.operator
        self.geometry = geometry
        self.dot = geometry.dot
        self.is_integer = is_code(request.inputs[0])
        self.constants = constants
        self.output = flat(output)
        self.output_view = output_view(self.operator)
        self.left, self.left_view = flat(inputs[0]), input_view(self.operator, 0)
        self.right, self.right_view = flat(inputs[1]), input_view(self.operator, 1)
        self.batch = math.prod(self.operator.batch_shape)
        self.vectors = -(-self.operator.columns // self.dot.lanes)
        self.is_parallel = geometry.processor.shares(work(request, self.batch * geometry.cost))

    def emit(self) -> None:
        """Writes the loops: the copy of the first matrices where steps cannot read them, the packing, the tiles."""
        geometry, dot = self.geometry, self.dot
        own = distinct(self.right_view)
        matrices = math.prod(own.leading)
        size = self.vectors * geometry.steps * dot.lanes * dot.products
        packed = T.alloc_buffer((matrices * size,), dot.weight_dtype)
        starts = T.alloc_buffer((matrices * self.vectors * dot.lanes,), "int32") if self.is_integer else None
        if self.left_view.column_stride != 1 or geometry.needs_copy(str(self.left.dtype)):
            self._copy_left()
        packing = PackedMatrix(geometry, own, self.right, packed)
        zero_points = self._row_of_zero_points() if starts is not None else None
        with self._loop(matrices * self.vectors) as item:
            matrix, vector = item // self.vectors, item % self.vectors
            first = T.bind(own.start(matrix) + self._column(vector) * own.column_stride)
            place = T.bind(item * packing.vector_elements)
            packing.emit(first, place)
            if zero_points is not None:
                self._start(zero_points, packed, place, starts, item * dot.lanes)
        self._tiles(packed, starts)

    def _loop(self, items: int) -> Any:
        return T.parallel(items) if self.is_parallel and items > 1 else T.serial(items)

    def _column(self, vector: Expression) -> Expression:
        """The first column of a vector."""
        columns, lanes = self.operator.columns, self.dot.lanes
        if columns < lanes:
            return T.int32(0)
        return vector * lanes if columns % lanes == 0 else T.min(vector * lanes, columns - lanes)

    def _copy_left(self) -> None:
        """The first matrices, row by row, in the dtype of operands and filled up to whole steps."""
        rows, depth, pitch = self.operator.rows, self.operator.depth, self.geometry.padded_inputs
        own = distinct(self.left_view)
        matrices = math.prod(own.leading)
        copy = T.alloc_buffer((matrices * rows * pitch,), self.dot.operand_dtype)
        lanes = fitting_lanes(depth, COPY_LANES) if own.column_stride == 1 else 1
        with self._loop(matrices * rows) as item:
            source = T.bind(own.start(item // rows) + item % rows * own.row_stride)
            target = T.bind(item * pitch)
            with vector_loop(depth, lanes) as column:
                value = load(self.left, source + column * own.column_stride, lanes)
                store(copy, target + column, self._operand(value), lanes)
            if pitch > depth:
                zero = T.Cast(self.dot.operand_dtype, T.int32(0))
                with T.serial(pitch - depth) as missing:
                    T.buffer_store(copy, zero, [target + depth + missing])
        numbers = dense_numbers(self.left_view, rows * pitch)
        self.left, self.left_view = copy, MatrixView(numbers.leading, numbers.leading_strides, pitch, 1)

    def _operand(self, value: Expression) -> Expression:
        if not self.is_integer:
            is_widened = self.dot.operand_dtype == "float32"
            return widen(value, self.request.inputs[0]) if is_widened else value
        code = convert(value, self.dot.operand_dtype) if self.dot.operand_dtype != "uint8" else value
        offset = self.geometry.copy_offset
        return code ^ broadcast(T.int8(offset), lanes_of(code)) if offset else code

    def _row_of_zero_points(self) -> Buffer:
        count, dtype = self.geometry.padded_inputs, self.dot.operand_dtype
        row = T.alloc_buffer((count,), dtype)
        with T.serial(count) as element:
            T.buffer_store(row, T.Cast(dtype, self.constants[2][0] + self.geometry.copy_offset), [element])
        return row

    def _start(self, zero_points: Buffer, packed: Buffer, place: Expression, starts: Buffer, at: Expression) -> None:
        """Where the sums of a vector of columns start."""
        sums = self._sums(1, 1)
        self._accumulate(sums, zero_points, T.int32(0), 0, packed, [place])
        total = self.dot.rows(load(sums[0, 0], 0, self.dot.accumulator_elements))[0]
        zero = broadcast(T.int32(0), self.dot.lanes)
        store(starts, at, zero - total, self.dot.lanes)

    def _sums(self, rows: int, vectors: int) -> Mapping[tuple[int, int], Buffer]:
        """Accumulators that hold zero, for rows (by the first of those that share one) and vectors."""
        dot, size = self.dot, self.dot.accumulator_elements
        sums = {}
        for i in range(0, rows, dot.pixels):
            for j in range(vectors):
                sums[i, j] = T.alloc_buffer((size,), dot.accumulator_dtype, scope=STACK)
                zero = T.Cast(dot.accumulator_dtype, T.int32(0))
                store(sums[i, j], 0, broadcast(zero, size), size)
        return sums

    def _tiles(self, packed: Buffer, starts: Buffer | None) -> None:
        tile, rows = self.geometry.tile, self.operator.rows
        count, groups = -(-rows // tile.pixels), -(-self.vectors // tile.vectors)
        per_item = max(1, min(count, -(-self.batch * count // self.geometry.processor.fewest_items)))
        items = -(-count // per_item)
        per_item = -(-count // items)
        size = self.vectors * self.geometry.steps * self.dot.lanes * self.dot.products
        packed_start = dense_numbers(self.right_view, size)
        starts_start = dense_numbers(self.right_view, self.vectors * self.dot.lanes)
        with self._loop(self.batch * items) as item:
            number = T.bind(item // items)
            left, output = T.bind(self.left_view.start(number)), T.bind(self.output_view.start(number))
            matrix, start = T.bind(packed_start.start(number)), T.bind(starts_start.start(number))
            with T.serial(groups) as group, T.serial(per_item) as within:
                vector = T.bind(T.min(group * tile.vectors, self.vectors - tile.vectors))
                row = T.bind(T.min((item % items * per_item + within) * tile.pixels, rows - tile.pixels))
                self._tile(row, vector, (left, output, matrix, start), packed, starts)

    def _tile(
        self,
        row: Expression,
        vector: Expression,
        bases: tuple[Expression, Expression, Expression, Expression],
        packed: Buffer,
        starts: Buffer | None,
    ) -> None:
        left, output, matrix, start = bases
        tile, dot, view = self.geometry.tile, self.dot, self.output_view
        sums = self._sums(tile.pixels, tile.vectors)
        if starts is not None:
            for (_, j), accumulator in sums.items():
                at = start + (vector + j) * dot.lanes
                store(accumulator, 0, dot.start(load(starts, at, dot.lanes)), dot.accumulator_elements)
        elements = self.geometry.steps * dot.lanes * dot.products
        weights = [T.bind(matrix + (vector + j) * elements) for j in range(tile.vectors)]
        first = T.bind(left + row * self.left_view.row_stride)
        self._accumulate(sums, self.left, first, self.left_view.row_stride, packed, weights, tile.pixels)
        for (i, j), accumulator in sums.items():
            column = self._column(vector + j)
            for k, total in enumerate(dot.rows(load(accumulator, 0, dot.accumulator_elements))):
                if i + k < tile.pixels:
                    place = output + (row + i + k) * view.row_stride + column * view.column_stride
                    self._finish(total, place)

    def _accumulate(
        self,
        sums: Mapping[tuple[int, int], Buffer],
        source: Buffer,
        first: Expression,
        row_stride: int,
        packed: Buffer,
        weights: Sequence[Expression],
        rows: int = 1,
    ) -> None:
        """All steps of a tile whose first row begins at ``first``, and whose vectors of columns at ``weights``."""
        geometry, dot = self.geometry, self.dot
        step = dot.lanes * dot.products

        def part(begin: Expression, count: int) -> None:
            """``count`` steps, of which the first is ``begin``."""
            self._steps(
                sums, source, first + begin * dot.products, row_stride, packed, begin * step, weights, count, rows
            )

        whole, rest = geometry.parts(geometry.full_steps)
        if whole > 1:
            with T.serial(whole) as number:
                part(number * dot.operand_steps, dot.operand_steps)
        elif whole:
            part(T.int32(0), dot.operand_steps)
        done = whole * dot.operand_steps
        for count in rest:
            part(T.int32(done), count)
            done += count
        if done < geometry.steps:
            last = first + (geometry.run_inputs - dot.products)
            self._steps(sums, source, last, row_stride, packed, T.int32(done * step), weights, 1, rows)

    def _steps(
        self,
        sums: Mapping[tuple[int, int], Buffer],
        source: Buffer,
        first: Expression,
        row_stride: int,
        packed: Buffer,
        offset: Expression,
        weights: Sequence[Expression],
        steps: int,
        rows: int,
    ) -> None:
        dot, size = self.dot, self.dot.accumulator_elements
        vector_weights = dot.lanes * dot.products
        weight_type = vector_type(dot.weight_dtype, vector_weights)
        first, offset = T.bind(first), T.bind(offset)
        operands: dict[int, Sequence[Expression]] = {}
        for step in range(steps):
            loaded = [T.bind(packed.vload([start + offset + step * vector_weights], weight_type)) for start in weights]
            for (i, j), accumulator in sums.items():
                if i not in operands:
                    indices = [first + min(i + k, rows - 1) * row_stride for k in range(dot.pixels)]
                    operands[i] = [T.bind(operand) for operand in dot.operands(source, indices, steps)]
                value = dot.accumulate(load(accumulator, 0, size), [operands[i][step]], [loaded[j]])
                store(accumulator, 0, value, size)

    def _finish(self, total: Expression, place: Expression) -> None:
        """Scales, rounds and stores the sums of a vector of columns."""
        p, lanes, scale = LlvmPrimitives(), self.dot.lanes, self.operator.scale
        if self.is_integer:
            multiplier, limits, zero_points = self.constants
            value = p.fma(convert(total, "float32"), broadcast(multiplier[0], lanes), float_like(0.0, total))
            result = requantize(p, value, limits[0], limits[1], zero_points[2], self.request.output)
        else:
            value = total if scale == 1 else p.multiply(total, float_like(float(np.float32(scale)), total))
            result = narrow(p, value, self.request.output)
        valid, stride = min(lanes, self.operator.columns), self.output_view.column_stride
        if valid == lanes and stride == 1:
            store(self.output, place, result, lanes)
            return
        part = T.alloc_buffer((lanes,), STORAGE_DTYPE[self.request.output], scope=STACK)
        store(part, 0, result, lanes)
        with T.serial(valid) as lane:
            T.buffer_store(self.output, part[lane], [place + lane * stride])
