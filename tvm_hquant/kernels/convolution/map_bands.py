"""The map of a convolution in bands, for kernels that copy their activations into the form of operands.

The copy of a whole map would be twice as large as the map where codes are widened, and would leave the nearer caches before
it is read. So a band is copied, all tiles that read it follow, and the next band takes the place of the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.dot_product import units_loaded

_CACHE_SHARE = 4
"""A band has a share of the second-level cache: weights and outputs pass through it, too."""
_FEWEST_TILES = 8
"""Of a band in a single row: all that are shorter than the others, at the end of the row, lie in two bands then."""


@dataclass(frozen=True)
class MapBands:
    """How the output of a convolution is cut: into bands of *units*, which are rows, or tiles where the map is a single row.

    The last band of an image may have fewer units than others; it is copied with some before them.
    """

    geometry: AnchorGeometry

    @cached_property
    def is_single_row(self) -> bool:
        """Whether outputs and inputs are the same pixels of one row."""
        conv = self.geometry.conv
        is_plain = conv.window.kernel == conv.window.strides == (1, 1) and not any(conv.window.padding)
        return is_plain and self.geometry.patches is None and self.images * self.geometry.output_size[0] == 1

    @property
    def images(self) -> int:
        return self.geometry.conv.input_shape[0]

    @property
    def image_units(self) -> int:
        return self.geometry.tiles if self.is_single_row else self.geometry.output_size[0]

    @cached_property
    def units(self) -> int:
        """Units of a band: as many as the cache holds, in bands that are about equal."""
        if self.geometry.patches is not None:
            return 1
        if self.geometry.sweeps is not None:
            return self.image_units
        item = np.dtype(self.geometry.dot.operand_dtype).itemsize * self.geometry.planes
        most = self.geometry.processor.l2_bytes // (_CACHE_SHARE * item)
        fewest = min(_FEWEST_TILES if self.is_single_row else 1, self.image_units)
        fitting = (n for n in range(self.image_units, fewest, -1) if self._plane_elements(n) <= most)
        bands = -(-self.image_units // next(fitting, fewest))
        return max(fewest, -(-self.image_units // bands))

    @property
    def per_image(self) -> int:
        return -(-self.image_units // self.units)

    @property
    def count(self) -> int:
        return self.images * self.per_image

    @property
    def is_even(self) -> bool:
        """Whether all bands have the same number of units."""
        return self.image_units % self.units == 0

    @property
    def pixels(self) -> int:
        """Of the activations that a band reads, with the padding beside them."""
        return self._pixels(self.units)

    @property
    def input_rows(self) -> int:
        """Rows of the activations that the rows of a band read."""
        return self._input_rows(self.units)

    @property
    def plane_elements(self) -> int:
        """Elements of a plane of the copy of a band."""
        return self._plane_elements(self.units)

    @property
    def elements(self) -> int:
        """Elements of the copy of a band."""
        dot = self.geometry.dot
        # Steps load some more groups than take turns, where these are no power of two.
        slack = (units_loaded(dot.groups) - dot.groups) * dot.products
        return self.plane_elements * self.geometry.planes + slack

    @property
    def shares_bands(self) -> bool:
        """Whether threads take whole bands, not parts of one after the other."""
        return self.geometry.patches is not None or self.count >= self.geometry.processor.fewest_items

    def _input_rows(self, rows: int) -> int:
        window = self.geometry.conv.window
        return min((rows - 1) * window.strides[0] + window.extent[0], self.geometry.padded_size[0])

    def _pixels(self, units: int) -> int:
        if self.is_single_row:
            return min(units * self.geometry.row_tiles[0].pixels, self.geometry.conv.input_shape[2])
        return self._input_rows(units) * self.geometry.padded_size[1]

    def _plane_elements(self, units: int) -> int:
        return self._pixels(units) * self.geometry.conv.groups * self.geometry.padded_inputs
