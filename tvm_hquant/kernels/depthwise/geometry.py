"""Shapes of a depthwise kernel: which input rows meet in a word, how rows are grouped, how weights are packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.convolution.tile_costs import of_depthwise
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.operators import Conv2D

Array = npt.NDArray[Any]

_MOST_SUMS = 16
"""Vectors of sums in a tile at most; half as many with 16 registers."""


@dataclass(frozen=True)
class DepthwiseGeometry:
    """A depthwise convolution in vectors of ``dot.lanes`` channels; the last vector overlaps the one before it.

    A dot product that takes k products a step takes them from k input rows, which are prepared as words of k codes, one word
    a channel. So ⌈kernel rows / k⌉ words make an output; a word that has codes to spare serves several output rows, with
    the weights moved down by the stride. With one product a step, a prepared row is a row of the input.

    Attributes:
        conv: the convolution.
        dot: multiplies words by weights.
        planes: byte planes of the activations.
        points: weight tensors.
        processor: that tiles are for.
    """

    conv: Conv2D
    dot: DotProduct
    planes: int
    points: int
    processor: Processor = ASSUMED_PROCESSOR

    @property
    def instructions(self) -> float:
        return self.planes * self.points * of_depthwise(self.conv, self.lanes, self.dot.products)

    # Channels.

    @property
    def channels(self) -> int:
        return self.conv.in_channels

    @property
    def lanes(self) -> int:
        return self.dot.lanes

    @property
    def vectors(self) -> int:
        return -(-self.channels // self.lanes)

    @property
    def packed_lanes(self) -> int:
        """Channels in the packed order, the overlap counted twice."""
        return self.vectors * self.lanes

    # Rows.

    @property
    def has_words(self) -> bool:
        """Whether a prepared row holds several input rows."""
        return self.dot.products > 1

    @property
    def taps(self) -> int:
        """Prepared rows that make an output."""
        return -(-self.conv.window.kernel[0] // self.dot.products)

    @cached_property
    def group_rows(self) -> int:
        """Output rows that share prepared rows: where these hold one input row each, as many as the first-level cache holds."""
        (height, _), (stride, _), (dilation, _) = (
            self.conv.window.kernel,
            self.conv.window.strides,
            self.conv.window.dilation,
        )
        out_height, _ = self.output_size
        if self.has_words:
            spare = self.taps * self.dot.products - height
            return min(spare // stride + 1 if dilation == 1 else 1, out_height)
        rows = self.processor.l1_bytes // (4 * self.lanes * self.padded_width * self.planes)
        return max(1, min((rows - self.conv.window.extent[0]) // stride + 1, 8, out_height))

    @property
    def groups(self) -> int:
        """Groups of output rows; the last one overlaps the one before it."""
        return -(-self.output_size[0] // self.group_rows)

    @property
    def prepared_rows(self) -> int:
        """Prepared rows of a group."""
        if self.has_words:
            return self.taps
        return (self.group_rows - 1) * self.conv.window.strides[0] + self.conv.window.extent[0]

    def prepared_row(self, row: Any, tap: Any) -> Any:
        """The prepared row that holds a tap of an output row of the group."""
        if self.has_words:
            return tap
        return row * self.conv.window.strides[0] + tap * self.conv.window.dilation[0]

    @property
    def part_rows(self) -> tuple[int, ...]:
        """Which row of a word each part holds.

        Of four rows, neighbouring parts are the first and the third, the second and the fourth: the pairs that
        ``vpmaddubsw`` adds then meet the outer rows of a 3×3 kernel, whose weights are smaller than those in the middle.
        """
        return (0, 2, 1, 3) if self.dot.products == 4 else tuple(range(self.dot.products))

    def input_row(self, prepared: Any, part: int) -> Any:
        """The input row, from the first of the group, that is part of a prepared row."""
        if self.has_words:
            return (prepared * self.dot.products + self.part_rows[part]) * self.conv.window.dilation[0]
        return prepared

    # Tiles.

    @property
    def output_size(self) -> tuple[int, int]:
        return self.conv.window.output_size(*self.conv.input_shape[1:3])

    @property
    def padded_width(self) -> int:
        _, left, _, right = self.conv.window.padding
        return self.conv.input_shape[2] + left + right

    @property
    def tile_rows(self) -> int:
        """Output rows of a tile: those that use the same words."""
        return self.group_rows if self.has_words else 1

    @property
    def pixels(self) -> int:
        """Pixels of a tile: as many as divide a row best."""
        width = self.output_size[1]
        most = max(1, _MOST_SUMS * min(self.dot.registers, 32) // 32 // self.tile_rows)
        return min(range(1, min(most, width) + 1), key=lambda p: (-(-width // p) * (p + 1), -p))

    @property
    def passes(self) -> int:
        return self.planes * self.points

    @property
    def plane_elements(self) -> int:
        """Words of the prepared rows of a plane."""
        return self.prepared_rows * self.padded_width * self.lanes

    # Constants.

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Channel of every packed lane."""
        starts = [min(v * self.lanes, self.channels - self.lanes) for v in range(self.vectors)]
        return np.concatenate([start + np.arange(self.lanes) for start in starts])

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., channels] in the order of the vectors."""
        return np.ascontiguousarray(values[..., self.channel_rows])

    @property
    def weight_rows(self) -> int:
        """Output rows of a group that have weights of their own."""
        return self.group_rows if self.has_words else 1

    @property
    def weight_elements(self) -> int:
        """Elements of the packed weights of a vector."""
        return self.weight_rows * self.taps * self.conv.window.kernel[1] * self.lanes * self.dot.products

    def pack_weights(self, weights: Array) -> Array:
        """[points, channels, 1, kh, kw] as point, vector, output row, tap, kernel column, lane, part; flat.

        Parts of a word that an output row does not use have weight 0.
        """
        points, _, _, height, width = weights.shape
        rows = weights[:, self.channel_rows, 0].reshape(points, self.vectors, self.lanes, height, width)
        k, stride = self.dot.products, self.conv.window.strides[0]
        packed = np.zeros(
            (points, self.vectors, self.weight_rows, self.taps * k, width, self.lanes), self.dot.weight_dtype
        )
        for row in range(self.weight_rows):
            first = row * stride
            packed[:, :, row, first : first + height] = rows.transpose(0, 1, 3, 4, 2)
        words = packed.reshape(points, self.vectors, self.weight_rows, self.taps, k, width, self.lanes)
        words = words[:, :, :, :, list(self.part_rows)]
        return np.ascontiguousarray(words.transpose(0, 1, 2, 3, 5, 6, 4).reshape(-1))
