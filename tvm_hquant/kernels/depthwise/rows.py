"""Prepares the input rows of a depthwise kernel: padding filled in, several rows put together into words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.depthwise.geometry import DepthwiseGeometry
from tvm_hquant.kernels.interface import Placement
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, broadcast, convert, int_like
from tvm_hquant.kernels.vector_loops import load, store


@dataclass(frozen=True)
class DepthwiseRows:
    """Writes int32 words: codes of ``dot.products`` input rows side by side.

    Attributes:
        geometry: of the kernel.
        source: flat activations.
        place: of the channels in the source.
        target: flat words, ordered plane, prepared row, column, lane.
        zero_points: int32 of the planes.
    """

    geometry: DepthwiseGeometry
    source: Buffer
    place: Placement
    target: Buffer
    zero_points: tuple[Expression, ...]

    @property
    def _part_bits(self) -> int:
        return 32 // self.geometry.dot.products

    def emit(self, image: Expression, first_row: Expression, channel: Expression) -> None:
        """The rows of a group whose first input row, counted without padding, is ``first_row`` (may be negative)."""
        prepared_rows = self.geometry.prepared_rows
        if prepared_rows == 1:
            self._row(image, first_row, 0, channel)
            return
        with T.serial(prepared_rows) as prepared:
            self._row(image, first_row, prepared, channel)

    def _row(self, image: Expression, first_row: Expression, prepared: Expression, channel: Expression) -> None:
        geometry, lanes = self.geometry, self.geometry.lanes
        _, height, width, _ = geometry.conv.input_shape
        channels, channel = self.place.channels, channel + self.place.offset
        top, left, bottom, right = geometry.conv.window.padding
        parts = range(geometry.dot.products)
        rows = [T.bind(first_row + geometry.input_row(prepared, part)) for part in parts]
        # Rows beyond the input are read somewhere inside it; the mask keeps nothing of them.
        clamped = [T.bind(T.max(0, T.min(row, height - 1))) for row in rows]
        starts = [T.bind((image * height + row) * (width * channels) + channel) for row in clamped]
        base = T.bind(prepared * (geometry.padded_width * lanes))
        needs_mask = top > 0 or self._may_pass(height, bottom)
        exists = [T.And(row >= 0, row < height) for row in rows]
        mask = self._mask(exists) if needs_mask else None
        for plane in range(geometry.planes):
            place = T.bind(base + plane * geometry.plane_elements)
            zero_point = self.zero_points[plane]
            padding = T.bind(self._flip(self._word([zero_point for _ in parts])))
            self._fill(place, left, padding)
            with T.serial(width) as x:
                word = self._word([self._value(start + x * channels, plane) for start in starts])
                if mask is not None:
                    missing = self._word([T.Select(e, T.int32(0), zero_point) for e in exists])
                    word = (word & broadcast(mask, lanes)) | broadcast(missing, lanes)
                store(self.target, place + (left + x) * lanes, self._flip(word), lanes)
            self._fill(place + (left + width) * lanes, right, padding)

    def _may_pass(self, height: int, bottom: int) -> bool:
        """Whether a prepared row may end below the input: by padding, or by parts that no output uses."""
        geometry = self.geometry
        out_height = geometry.output_size[0]
        last_start = (out_height - geometry.group_rows) * geometry.conv.window.strides[0]
        last = geometry.input_row(geometry.prepared_rows - 1, geometry.dot.products - 1)
        return bottom > 0 or bool(last_start + last - geometry.conv.window.padding[0] >= height)

    def _mask(self, exists: list[Expression]) -> Expression:
        """All bits of the parts that exist. They are not shifted here: TVM takes a constant that it shifts into bit 31 for too
        large."""
        ones = np.uint32(2**self._part_bits - 1)
        mask: Expression = T.int32(0)
        for number, e in enumerate(exists):
            bits = int(np.left_shift(ones, np.uint32(number * self._part_bits)).view(np.int32))
            mask = mask | T.Select(e, T.int32(bits), T.int32(0))
        return mask

    def _value(self, index: Expression, plane: int) -> Expression:
        """A part of a word from ``lanes`` neighbouring activations, as int32."""
        stored = load(self.source, index, self.geometry.lanes)
        code = convert(stored, "int32")
        if self.geometry.planes == 1:
            return code
        return code >> int_like(8, code) if plane else code & int_like(255, code)

    def _word(self, parts: list[Expression]) -> Expression:
        word = parts[0]
        for number, part in enumerate(parts[1:], 1):
            word = word | (part << int_like(number * self._part_bits, part))
        return word

    def _flip(self, word: Expression) -> Expression:
        """Codes as the dot product wants them: those less 128 have the top bit of every byte inverted."""
        if self.geometry.dot.operand_offset != -128:
            return word
        return word ^ int_like(0x80808080 - 2**32, word)

    def _fill(self, start: Expression, columns: int, word: Expression) -> None:
        lanes = self.geometry.lanes
        for column in range(columns):
            store(self.target, start + column * lanes, broadcast(word, lanes), lanes)
