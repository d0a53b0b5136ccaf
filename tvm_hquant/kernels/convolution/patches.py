"""First layers: the few channels that all positions of a small window take are copied side by side, pixel by pixel.

A 3×3 window over three channels takes 27 codes for an output pixel. Row by row, they need nine steps of four products, parts of
them idle; as one patch they need seven. A 7×7 window needs 37 in place of 42, or of 49 where a step takes channels of one pixel
alone. To the dot products the layer is a 1×1 convolution over patches. Those of a few output rows exist at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.activation_copy import ActivationCopy
from tvm_hquant.kernels.interface import Array
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, broadcast, convert, lanes_of
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import fitting_lanes, load, store, vector_loop
from tvm_hquant.operators import Conv2D, Window

_MOST_CHANNELS = 4
_MOST_ELEMENTS = 4 * 7 * 7
_VECTOR_BYTES = 16
_CLEAR_GAIN = 0.9
"""Patches have to leave this share of the steps of rows at most, for copying them takes a little longer."""


def is_patch(channels: int, kernel_height: int, kernel_width: int) -> bool:
    """Whether layers with such weights are computed by patches, where kernels can.

    Not those with one channel: what depthwise weights prove goes by kernel rows.
    """
    return (
        1 < channels <= _MOST_CHANNELS
        and kernel_height * kernel_width > 1
        and channels * kernel_height * kernel_width <= _MOST_ELEMENTS
    )


def takes_patches(conv: Conv2D, products: int, splits_pixels: bool, lanes: int) -> bool:
    """Whether a convolution of 8-bit codes is computed by patches, with so many products a step for ``lanes`` outputs.

    For every pixel they have to save more multiply-adds of vectors than moves of kernel rows are made.
    ``splits_pixels``: whether a step over a row may take channels of two pixels.
    """
    height, width = conv.window.kernel
    if conv.groups > 1 or conv.window.dilation != (1, 1) or not is_patch(conv.in_channels, height, width):
        return False
    channels = conv.in_channels if splits_pixels else -(-conv.in_channels // products) * products
    by_rows, by_patches = height * -(-channels * width // products), -(-conv.in_channels * height * width // products)
    saved = (by_rows - by_patches) * -(-conv.out_channels // lanes)
    return by_patches <= _CLEAR_GAIN * by_rows and saved > height


def conv_of_patches(conv: Conv2D, processor: Processor = ASSUMED_PROCESSOR) -> Conv2D:
    """The 1×1 convolution over patches. A row of its map has the patches of some output rows, as many as half of the
    first-level cache holds, with one such row for every core at least."""
    n, height, width, _ = conv.output_shape
    elements = conv.in_channels * conv.window.kernel[0] * conv.window.kernel[1]
    most = min(processor.l1_bytes // 2 // (width * elements), n * height // processor.cores)
    rows = max((r for r in range(1, most + 1) if n * height % r == 0), default=1)
    shape = (1, n * height // rows, rows * width, elements)
    return Conv2D(shape, conv.out_channels, Window((1, 1)), 1, conv.epilogue)


def weights_of_patches(weights: Array) -> Array:
    """[…, channels, kernel_h, kernel_w] to […, elements of a patch, 1, 1]."""
    ordered = np.moveaxis(weights, -3, -1)
    return np.ascontiguousarray(ordered.reshape(*weights.shape[:-3], -1, 1, 1))


def padded_elements(conv: Conv2D) -> int:
    """Elements of the input rows that the windows of an output row reach, with the padding beside them; 0 without padding."""
    _, _, width, channels = conv.input_shape
    _, left, _, right = conv.window.padding
    return conv.window.kernel[0] * (left + width + right) * channels if any(conv.window.padding) else 0


@dataclass(frozen=True)
class PatchCopy:
    """Copies uint8 activations, flat, to ``target``: a patch for each output pixel, ``stride`` elements apart.

    What lies between patches is not defined; its weights are zero. ``rows`` is memory for ``padded_elements(conv)`` codes.
    ``fill`` is the stored code of padding, ``offset`` −128 where codes are made signed on the way, else 0.
    """

    conv: Conv2D
    stride: int
    operand_dtype: str
    source: Buffer
    target: Buffer
    rows: Buffer | None
    fill: Expression
    offset: int = 0

    def emit(self, row: Expression, place: Expression) -> None:
        """Writes the loops for an output row, counted over all images, whose patches go to ``place``."""
        conv, window = self.conv, self.conv.window
        _, height, width, channels = conv.input_shape
        _, out_height, out_width, _ = conv.output_shape
        (kernel_height, kernel_width), (row_step, column_step) = window.kernel, window.strides
        image, y = T.bind(row // out_height), T.bind(row % out_height * row_step)
        if self.rows is None:
            source, row_elements = self.source, width * channels
            first = T.bind((image * height + y) * row_elements)
        else:
            source, row_elements, first = self.rows, padded_elements(conv) // kernel_height, T.int32(0)
            copy = ActivationCopy(conv, channels, "uint8", "uint8", self.source, source, (self.fill,))
            with T.serial(kernel_height) as ky:
                copy.emit_row(image, y + ky, ky * row_elements)
        run = kernel_width * channels
        exact = min(self._exact_pixels(run, column_step * channels), out_width)
        for begin, count, lanes in ((0, out_width - exact, self._wide(run)), (out_width - exact, exact, 0)):
            if not count:
                continue
            with T.serial(count) as index:
                x = begin + index
                for ky in range(kernel_height):
                    start = first + ky * row_elements + x * (column_step * channels)
                    self._copy(source, start, place + x * self.stride + ky * run, run, lanes)

    def _wide(self, run: int) -> int:
        """Lanes that hold a kernel row."""
        return 1 << (run - 1).bit_length()

    def _exact_pixels(self, run: int, step: int) -> int:
        """Pixels at the end of a row that have too little behind them for vectors that are longer than a kernel row."""
        excess = self._wide(run) - run
        return max(-(-excess // step), -(-excess // self.stride))

    def _copy(self, source: Buffer, start: Expression, place: Expression, length: int, lanes: int) -> None:
        """A kernel row: with ``lanes``, and what is behind it is written over later; without, nothing but it."""
        if lanes:
            store(self.target, place, self._converted(load(source, start, lanes)), lanes)
            return
        lanes = fitting_lanes(length, _VECTOR_BYTES)
        with vector_loop(length, lanes) as offset:
            store(self.target, place + offset, self._converted(load(source, start + offset, lanes)), lanes)

    def _converted(self, codes: Expression) -> Expression:
        value = convert(codes, self.operand_dtype)
        return value ^ broadcast(T.int8(self.offset), lanes_of(value)) if self.offset else value
