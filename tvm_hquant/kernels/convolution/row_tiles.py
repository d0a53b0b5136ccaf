"""How a row of output pixels is cut into tiles, and which of a tile's pixels every column of the kernel reaches on the map."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm_hquant.kernels.window_axis import WindowAxis

_SHORTER_TILES = 8
"""Tiles at the end of a row, at most, that are shorter than the others."""
_WORTHWHILE = 0.98
"""Shorter tiles are code of their own: the row has to take this much less time than with a last tile that overlaps."""

Columns = tuple[tuple[int, int], ...]
"""For every column of the kernel the pixels of a tile, from a first up to an end, that it reaches on the map."""


@dataclass(frozen=True)
class TileRun:
    """Neighbouring tiles of a row that the same code computes.

    Attributes:
        first: which tile of the row is the first of them.
        count: how many.
        start: first pixel of the first one. A tile that would not end within the row is moved back.
        pixels: of each.
        columns: None where every column of the kernel takes all of the pixels.
    """

    first: int
    count: int
    start: int
    pixels: int
    columns: Columns | None = None

    def goes_on_with(self, start: int, pixels: int, columns: Columns | None) -> bool:
        """Whether a tile of that kind at that pixel is the next one of the run."""
        return (start, pixels, columns) == (self.start + self.count * self.pixels, self.pixels, self.columns)


def cut_row(
    width: int, pixels: int, cost: Callable[[int], float], may_not_overlap: bool = False
) -> tuple[TileRun, ...]:
    """Tiles of ``pixels``, and some shorter ones or one that overlaps where these do not make up the row.

    ``cost`` is what a tile of so many pixels takes. Where tiles ``may_not_overlap``, shorter ones may cost more.
    """
    if pixels >= width:
        return (TileRun(0, 1, 0, width),)
    whole = TileRun(0, -(-width // pixels), 0, pixels)
    if width % pixels == 0:
        return (whole,)
    limit = math.inf if may_not_overlap else whole.count * cost(pixels) * _WORTHWHILE
    best: tuple[TileRun, ...] = (whole,)
    for count in range(width // pixels, max(-1, width // pixels - _SHORTER_TILES), -1):
        left = width - count * pixels
        for shorter in range(-(-left // pixels), min(left, _SHORTER_TILES) + 1):
            total = count * cost(pixels) + shorter * cost(left // shorter)
            if left % shorter == 0 and total < limit:
                limit = total
                rest = TileRun(count, shorter, count * pixels, left // shorter)
                best = (TileRun(0, count, 0, pixels), rest) if count else (rest,)
    return best


def split_at_borders(runs: tuple[TileRun, ...], axis: WindowAxis) -> tuple[TileRun, ...]:
    """The same tiles, those parted of which some column of the kernel reaches some pixels in the padding only."""
    found: list[TileRun] = []
    for run in runs:
        for number in range(run.count):
            start = min(run.start + number * run.pixels, axis.output_size - run.pixels)
            columns = _columns(axis, start, run.pixels)
            if found and found[-1].goes_on_with(start, run.pixels, columns):
                found[-1] = replace(found[-1], count=found[-1].count + 1)
                continue
            found.append(TileRun(run.first + number, 1, start, run.pixels, columns))
    return tuple(found)


def _columns(axis: WindowAxis, start: int, pixels: int) -> Columns | None:
    ranges = []
    for column in range(axis.kernel):
        reached = [i for i in range(pixels) if axis.reaches(start + i, column)]
        ranges.append((reached[0], reached[-1] + 1) if reached else (0, 0))
    return None if all(r == (0, pixels) for r in ranges) else tuple(ranges)
