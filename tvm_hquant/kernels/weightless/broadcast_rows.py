"""Operands that are repeated along axes where they have size 1, in rows that vectors go along."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import Placement
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, broadcast
from tvm_hquant.kernels.processor import Processor, Work
from tvm_hquant.kernels.vector_loops import flat_loop, load, row_loop, vector_loop
from tvm_hquant.operators import Shape


@dataclass(frozen=True)
class BroadcastRows:
    """The output as rows of neighbours, along which every input is either whole or one value.

    ``places`` are those of the inputs' channels in their buffers, if any of these is wider.
    """

    output_shape: Shape
    input_shapes: tuple[Shape, ...]
    places: tuple[Placement, ...] = ()

    @property
    def padded(self) -> tuple[Shape, ...]:
        """Input shapes with the rank of the output."""
        rank = len(self.output_shape)
        return tuple((1,) * (rank - len(shape)) + shape for shape in self.input_shapes)

    @property
    def split(self) -> int:
        """The first axis of a row."""
        return max(self._first_even_axis, len(self.output_shape) - 1) if self.places else self._first_even_axis

    @property
    def reaches_places(self) -> bool:
        """Whether rows are read where they lie: inputs have all channels of a row, or buffers of their own."""
        last = len(self.output_shape) - 1
        return not self.places or (self.split == last and all(self.is_full(k) for k in range(len(self.places))))

    @property
    def _first_even_axis(self) -> int:
        """The first axis from which on every input is whole, or repeated."""
        shape = self.output_shape
        repeats: dict[int, bool] = {}
        for axis in reversed(range(len(shape))):
            if shape[axis] == 1:
                continue
            for k, own in enumerate(self.padded):
                if repeats.setdefault(k, own[axis] == 1) != (own[axis] == 1):
                    return axis + 1
        return 0

    @property
    def rows(self) -> int:
        return math.prod(self.output_shape[: self.split])

    @property
    def run(self) -> int:
        """Elements of a row."""
        return math.prod(self.output_shape[self.split :])

    def is_full(self, k: int) -> bool:
        """Whether input ``k`` has a value for every element of a row."""
        return math.prod(self.padded[k][self.split :]) == self.run

    def start(self, k: int, row: Expression) -> Expression:
        """Where the values of input ``k`` for a row begin."""
        own, position, step = self.padded[k], T.int32(0), math.prod(self.padded[k][self.split :])
        if self.places:
            position, step = T.int32(self.places[k].offset), self.places[k].channels
        for axis in reversed(range(self.split)):
            size = self.output_shape[axis]
            if own[axis] > 1:
                position = position + T.floormod(row, size) * step
                step *= size
            row = T.floordiv(row, size)
        return position

    def load(self, source: Buffer, k: int, row: Expression, start: Expression, width: int) -> Expression:
        """Stored neighbours of input ``k``, or its one value for all of them, from an element of a row on."""
        place = self.start(k, row)
        return load(source, place + start, width) if self.is_full(k) else broadcast(source[place], width)

    def each_vector(
        self, width: int, work: Work, processor: Processor, finish: Callable[[Expression, Expression], None]
    ) -> None:
        """Loops over vectors of an output: ``finish`` gets their row, and their first element in it."""
        if self.rows == 1:
            with flat_loop(self.run, width, work, processor) as start:
                finish(T.int32(0), start)
            return
        with row_loop(self.rows, work, processor) as row, vector_loop(self.run, width) as start:
            finish(row, start)
