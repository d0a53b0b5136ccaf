"""Convolutions that go over the map for one position of the kernel after the other.

Tiles of a row (:mod:`.row_tiles`) take all positions of the kernel before the next tile. On small maps that
leaves much undone: rows end in tiles of few sums, which wait for each other, so do the pixels beside the padding, and the
weights of all positions pass through the nearest caches once for every row. A *sweep* takes one position for all outputs that
it reaches on the map, in tiles that run over the ends of rows; sums lie in a buffer meanwhile. Every sum still gets its
products in the order of the window, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, product

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.convolution.row_tiles import cut_row
from tvm_hquant.kernels.window_axis import WindowAxis


@dataclass(frozen=True)
class PositionSweeps:
    """How the sweeps over a map are cut: into bands of rows, of which each is done with before the next, and these into tiles.

    Attributes:
        axes: the window along rows and columns.
        pixels: of a tile.
        pixel_bytes: of the sums of a pixel.
        band_bytes: of the sums of a band, at most.
        cost: what a tile of so many pixels takes.
    """

    axes: tuple[WindowAxis, WindowAxis]
    pixels: int
    pixel_bytes: int
    band_bytes: int
    cost: Callable[[int], float]

    @cached_property
    def band_rows(self) -> int:
        """Rows of output in a band; the last one may have fewer."""
        height, width = (axis.output_size for axis in self.axes)
        bands = -(-height * width * self.pixel_bytes // self.band_bytes)
        return -(-height // min(bands, height))

    @property
    def bands(self) -> int:
        return len(self.tops)

    @cached_property
    def columns(self) -> tuple[range, ...]:
        """For every column of the kernel the columns of the output that it reaches on the map from."""
        return tuple(self.axes[1].positions(column) for column in range(self.axes[1].kernel))

    @cached_property
    def rows(self) -> tuple[tuple[range, ...], ...]:
        """For every band and every row of the kernel the same of rows."""
        axis = self.axes[0]
        reached = [axis.positions(row) for row in range(axis.kernel)]
        bands = [range(top, min(top + self.band_rows, axis.output_size)) for top in self.tops]
        return tuple(
            tuple(range(max(r.start, band.start), max(r.start, band.start, min(r.stop, band.stop))) for r in reached)
            for band in bands
        )

    @property
    def tops(self) -> range:
        """The first row of every band."""
        return range(0, self.axes[0].output_size, self.band_rows)

    @cached_property
    def sweeps(self) -> tuple[int, ...]:
        """Outputs of every sweep, band by band in the order of the kernel."""
        return tuple(len(rows) * len(columns) for band in self.rows for rows in band for columns in self.columns)

    @cached_property
    def cuts(self) -> dict[int, dict[int, int]]:
        """For every number of outputs that a sweep has: how many tiles of which sizes make it up."""
        found: dict[int, dict[int, int]] = {}
        for count in sorted(set(self.sweeps)):
            runs = cut_row(count, self.pixels, self.cost, may_not_overlap=True) if count else ()
            found[count] = {run.pixels: run.count for run in runs}
        return found

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Pixels of tiles, the largest first."""
        return tuple(sorted({size for cut in self.cuts.values() for size in cut}, reverse=True))

    @property
    def total_cost(self) -> float:
        """What the tiles of all sweeps take."""
        return sum(number * self.cost(size) for count in self.sweeps for size, number in self.cuts[count].items())

    @property
    def fewest_tiles(self) -> int:
        """Tiles of the sweep that has the fewest."""
        return min((sum(cut.values()) for count, cut in self.cuts.items() if count), default=1)

    def table(self, channels: int, sums: int) -> npt.NDArray[np.int32]:
        """What a kernel knows of the sweeps: int32, flat.

        For every sweep: where its first output reads, in elements of a map of ``channels`` channels; where its sums begin, in
        elements of a band's sums with ``sums`` for a pixel; where in this table its outputs are; how many tiles of each size it
        has. Behind all sweeps, for outputs in rows of every length: how far on each reads, and where its sums are.
        """
        rows, columns = self.axes
        lists: dict[int, list[int]] = {}
        start, most = (3 + len(self.sizes)) * len(self.sweeps), max(map(len, chain(*self.rows)))
        for length in sorted({len(xs) for xs in self.columns}):
            lists[length] = [
                offset
                for y in range(most)
                for x in range(length)
                for offset in (
                    (y * rows.stride * columns.size + x * columns.stride) * channels,
                    (y * columns.output_size + x) * sums,
                )
            ]
        begins = dict(zip(lists, accumulate(map(len, lists.values()), initial=start), strict=False))
        found = []
        for top, band in zip(self.tops, self.rows, strict=True):
            for (ky, ys), (kx, xs) in product(enumerate(band), enumerate(self.columns)):
                y = ys.start * rows.stride - rows.before + ky * rows.dilation
                x = xs.start * columns.stride - columns.before + kx * columns.dilation
                place = (ys.start - top) * columns.output_size + xs.start
                cut = self.cuts[len(ys) * len(xs)]
                tiles = [cut.get(size, 0) for size in self.sizes]
                found += [(y * columns.size + x) * channels, place * sums, begins[len(xs)], *tiles]
        return np.array([*found, *chain(*lists.values())], np.int32)
