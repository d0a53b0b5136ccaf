"""The second matrices of a batch matmul, packed at run time as a dot product's steps read weights.

For every vector of columns and every step the lanes lie side by side, each with the products of the step: what
``AnchorPacking.pack_weights`` makes of constant weights, for tiles of one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.matmul.matrix_views import MatrixView
from tvm_hquant.kernels.primitives import Expression, broadcast, convert, lanes_of, reinterpret
from tvm_hquant.kernels.vector_loops import load, store

_UNROLLED = 8
"""Steps of a column that are written out."""


@dataclass(frozen=True)
class PackedMatrix:
    """Packs matrices [depth, columns].

    Attributes:
        geometry: of the dense layer that computes one product.
        view: the matrices in ``source``.
        source: flat; codes are stored with zero point 128.
        target: flat, in the weight dtype of the dot product.
    """

    geometry: AnchorGeometry
    view: MatrixView
    source: Buffer
    target: Buffer

    @property
    def step_elements(self) -> int:
        return self.geometry.dot.lanes * self.geometry.dot.products

    @property
    def vector_elements(self) -> int:
        """Elements of all steps of a vector of columns."""
        return self.geometry.steps * self.step_elements

    def emit(self, start: Expression, place: Expression) -> None:
        """Packs the vector of columns whose first element is at ``start`` of the source, to ``place`` of the target."""
        geometry, products = self.geometry, self.geometry.dot.products
        depth = geometry.conv.in_channels
        full = depth // products
        if self._reads_columns:
            with T.serial(self._columns) as lane:
                column = T.bind(start + lane * self.view.column_stride)
                self._column(column, T.bind(place + lane * products), full)
        elif full:
            with T.serial(full) as step:
                first = T.bind(start + step * (products * self.view.row_stride))
                self._step(first, T.bind(place + step * self.step_elements))
        if full < geometry.steps:
            # Elements that do not exist, or that the step before has taken, count as zero.
            taken = depth - full * products
            skipped = products - taken if geometry.padded_inputs == depth else 0
            at = place + full * self.step_elements
            zero = T.Cast(geometry.dot.weight_dtype, T.int32(0))
            store(self.target, at, broadcast(zero, self.step_elements), self.step_elements)
            for product in range(taken):
                row = start + (full * products + product) * self.view.row_stride
                self._column_by_column(row, at, self._position(skipped + product))

    @property
    def _reads_columns(self) -> bool:
        """Whether columns lie together in memory, and not rows."""
        return self.view.row_stride == 1 and self.view.column_stride != 1

    def _column(self, column: Expression, at: Expression, steps: int) -> None:
        """Whole steps of a column, some written out one after the other: of a plain loop LLVM would make scatters."""

        def part(first: Expression, count: int) -> None:
            for step in range(count):
                source = column + (first + step) * self.geometry.dot.products
                self._word(source, at + (first + step) * self.step_elements)

        whole, rest = divmod(steps, _UNROLLED)
        if whole:
            with T.serial(whole) as number:
                part(T.bind(number * _UNROLLED), _UNROLLED)
        part(whole * _UNROLLED, rest)

    def _word(self, source: Expression, at: Expression) -> None:
        """The neighbouring products of a step and lane."""
        products = self.geometry.dot.products
        value = self._converted(load(self.source, source, products))
        if self.geometry.dot.reverses_products:
            value = T.Shuffle([T.bind(value)], list(reversed(range(products))))
        store(self.target, at, value, products)

    def _position(self, product: int) -> int:
        products = self.geometry.dot.products
        return products - 1 - product if self.geometry.dot.reverses_products else product

    def _step(self, first: Expression, at: Expression) -> None:
        dot, view = self.geometry.dot, self.view
        lanes, products = dot.lanes, dot.products
        if view.column_stride == 1 and self.geometry.conv.out_channels >= lanes:
            rows = [self._converted(load(self.source, first + p * view.row_stride, lanes)) for p in range(products)]
            rows = [T.bind(rows[self._position(p)]) for p in range(products)]
            store(self.target, at, _interleaved(rows, lanes), self.step_elements)
        else:
            for product in range(products):
                self._column_by_column(first + product * view.row_stride, at, self._position(product))

    @property
    def _columns(self) -> int:
        return min(self.geometry.dot.lanes, self.geometry.conv.out_channels)

    def _column_by_column(self, row: Expression, at: Expression, position: int) -> None:
        with T.serial(self._columns) as lane:
            value = self._converted(self.source[row + lane * self.view.column_stride])
            T.buffer_store(self.target, value, [at + lane * self.geometry.dot.products + position])

    def _converted(self, value: Expression) -> Expression:
        dtype = self.geometry.dot.weight_dtype
        if dtype == "int8":
            return reinterpret(value ^ broadcast(T.uint8(128), lanes_of(value)), dtype)
        if dtype == "int16":
            return convert(value, dtype) - broadcast(T.int16(128), lanes_of(value))
        return value


def _interleaved(rows: Sequence[Expression], lanes: int) -> Expression:
    """Element i of every row, then element i + 1 of every row…"""
    if len(rows) == 1:
        return rows[0]
    return T.Shuffle(list(rows), [row * lanes + lane for lane in range(lanes) for row in range(len(rows))])
