"""The copy of activations that convolution steps read: padded, filled up to whole steps, in the operand's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, broadcast, convert, lanes_of, widen
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor, Work
from tvm_hquant.kernels.vector_loops import fitting_lanes, flat_loop, load, row_loop, store, vector_loop
from tvm_hquant.kernels.work import of_bytes
from tvm_hquant.operators import Conv2D

COPY_LANES = 32
"""Elements that are converted at once: a register of bytes, or some of what is wider."""
_FEW_CHANNELS = 8
"""Pixels of so few channels are moved several at a time."""
_FEW_PIXELS = 4


@dataclass(frozen=True)
class ActivationCopy:
    """Copies flat activations to a flat buffer ordered plane, image, row, column, group, channel.

    Attributes:
        conv: whose window says the padding.
        padded_inputs: channels of a group in the copy.
        operand_dtype: of the copy.
        storage: of the source; two planes, low bytes first, are made of uint16 where there are two fills.
        source, target: flat buffers.
        fills: the value of padding for every plane, in ``operand_dtype``.
        offset: −128 where codes are made signed on the way, else 0. The fills have it already.
        processor: that work is cut for.
        source_start: of the activations in the source.
        source_pixel: elements from one pixel to the next there, if other channels lie between them.
        plane_rows: rows of the padded map that a plane of the target holds, if not all of all images.
    """

    conv: Conv2D
    padded_inputs: int
    operand_dtype: str
    storage: str
    source: Buffer
    target: Buffer
    fills: tuple[Expression, ...]
    offset: int = 0
    processor: Processor = ASSUMED_PROCESSOR
    source_start: Expression = 0
    source_pixel: int | None = None
    plane_rows: int | None = None

    @property
    def _pixel(self) -> int:
        """Elements of a pixel in the copy."""
        return self.conv.groups * self.padded_inputs

    @property
    def _source_pixel(self) -> int:
        return self.source_pixel or self.conv.in_channels

    @property
    def _has_neighbours(self) -> bool:
        """Whether the channels of neighbouring pixels are neighbours in the source and in the copy."""
        return self.padded_inputs == self._group_inputs and self._source_pixel == self.conv.in_channels

    @property
    def _group_inputs(self) -> int:
        return self.conv.in_channels // self.conv.groups

    def _work(self, elements: int) -> Work:
        """That of copying so many elements. What one core has copied comes slowly to others."""
        written = len(self.fills) * np.dtype(self.operand_dtype).itemsize
        return of_bytes(elements * (np.dtype(str(self.source.dtype)).itemsize + written))

    @property
    def _padded_rows(self) -> int:
        top, _, bottom, _ = self.conv.window.padding
        return self.conv.input_shape[1] + top + bottom

    @property
    def _row_elements(self) -> int:
        _, left, _, right = self.conv.window.padding
        return (self.conv.input_shape[2] + left + right) * self._pixel

    @property
    def _plane_elements(self) -> int:
        rows = self.conv.input_shape[0] * self._padded_rows if self.plane_rows is None else self.plane_rows
        return rows * self._row_elements

    def emit(self) -> None:
        """Writes the loops for the whole map."""
        n, height, width, channels = self.conv.input_shape
        if self._has_neighbours and not any(self.conv.window.padding):
            length = n * height * width * channels
            lanes = fitting_lanes(length, COPY_LANES)
            with flat_loop(length, lanes, self._work(length), self.processor) as position:
                self._copy_vector(self.source_start + position, position, lanes)
            return
        rows = self._padded_rows
        with self._row_loop(n * rows) as row:
            image, y = row // rows, row % rows
            self.emit_row(image, y, T.bind(row * self._row_elements))

    def emit_rows(self, image: Expression, first: Expression, count: int) -> None:
        """Writes the loops for ``count`` rows of the padded map, which go to the start of the target."""
        with self._row_loop(count) as row:
            self.emit_row(image, first + row, T.bind(row * self._row_elements))

    def _row_loop(self, rows: int) -> Any:
        return row_loop(rows, self._work(rows * self._row_elements), self.processor)

    def emit_row(self, image: Expression, y: Expression, start: Expression) -> None:
        """Writes the loops for one row of the padded map, which goes to ``start`` of the target."""
        height = self.conv.input_shape[1]
        top, _, bottom, _ = self.conv.window.padding
        if not (top or bottom):
            self._copy_row(image, y, start)
            return
        with T.If(T.And(y >= top, y < top + height)):
            with T.Then():
                self._copy_row(image, y - top, start)
            with T.Else():
                self._fill(start, self._row_elements)

    def _copy_row(self, image: Expression, y: Expression, start: Expression) -> None:
        """One row of the source with the padding beside it."""
        _, height, width, channels = self.conv.input_shape
        _, left, _, right = self.conv.window.padding
        pixel = self._source_pixel
        source = T.bind(self.source_start + (image * height + y) * (width * pixel))
        self._fill(start, left * self._pixel)
        if self._has_neighbours:
            self._copy(source, start + left * self._pixel, width * channels)
        elif self.conv.groups == 1 and channels <= _FEW_CHANNELS and width >= _FEW_PIXELS and pixel == channels:
            with vector_loop(width, _FEW_PIXELS) as x:
                self._spread(source + x * channels, start + (left + x) * self._pixel)
        else:
            with T.serial(width) as x, T.serial(self.conv.groups) as group:
                run = T.bind(start + (left + x) * self._pixel + group * self.padded_inputs)
                self._copy(source + x * pixel + group * self._group_inputs, run, self._group_inputs)
                self._fill(run + self._group_inputs, self.padded_inputs - self._group_inputs)
        self._fill(start + (left + width) * self._pixel, right * self._pixel)

    def _spread(self, source: Expression, target: Expression) -> None:
        """Some pixels of few channels, moved apart by a shuffle. Channels that do not exist repeat the last one."""
        channels, padded = self._group_inputs, self.padded_inputs
        stored = T.bind(load(self.source, source, _FEW_PIXELS * channels))
        order = [p * channels + min(c, channels - 1) for p in range(_FEW_PIXELS) for c in range(padded)]
        for plane in range(len(self.fills)):
            # TVM wants no more lanes to come out of a shuffle than go into it.
            moved = T.Shuffle([stored] * -(-padded // channels), order)
            value = self._converted(moved, plane)
            store(self.target, target + plane * self._plane_elements, value, _FEW_PIXELS * padded)

    def _copy(self, source: Expression, target: Expression, length: int) -> None:
        lanes = fitting_lanes(length, COPY_LANES)
        with vector_loop(length, lanes) as offset:
            self._copy_vector(source + offset, target + offset, lanes)

    def _copy_vector(self, source: Expression, target: Expression, lanes: int) -> None:
        for plane in range(len(self.fills)):
            value = self._converted(load(self.source, source, lanes), plane)
            store(self.target, target + plane * self._plane_elements, value, lanes)

    def _fill(self, start: Expression, length: int) -> None:
        if length == 0:
            return
        lanes = fitting_lanes(length, COPY_LANES)
        with vector_loop(length, lanes) as offset:
            for plane, value in enumerate(self.fills):
                place = start + plane * self._plane_elements + offset
                store(self.target, place, broadcast(value, lanes), lanes)

    def _converted(self, value: Expression, plane: int) -> Expression:
        converted = self._of_plane(value, plane)
        return converted ^ broadcast(T.int8(self.offset), lanes_of(converted)) if self.offset else converted

    def _of_plane(self, value: Expression, plane: int) -> Expression:
        if self.storage in ("float16", "bfloat16") and self.operand_dtype == "float32":
            return widen(value, self.storage)
        if len(self.fills) > 1:
            number = broadcast(T.uint16(8 if plane else 255), lanes_of(value))
            return convert(value >> number if plane else value & number, self.operand_dtype)
        return convert(value, self.operand_dtype) if str(self.source.dtype) != self.operand_dtype else value
