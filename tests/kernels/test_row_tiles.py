"""Tiles of a row: every pixel belongs to one, and only pixels that a kernel column reaches on the map are computed for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_hquant.kernels.convolution.row_tiles import TileRun, cut_row, split_at_borders
from tvm_hquant.kernels.window_axis import WindowAxis


def tiles(runs: tuple[TileRun, ...], width: int) -> list[tuple[int, int]]:
    """Start and pixels of every tile, in order."""
    return [(min(r.start + k * r.pixels, width - r.pixels), r.pixels) for r in runs for k in range(r.count)]


@given(st.integers(1, 70), st.integers(1, 16), st.integers(0, 12))
def test_tiles_that_may_not_overlap(width: int, pixels: int, constant: int) -> None:
    """Every pixel belongs to one tile, and none has more pixels than asked for."""
    found = tiles(cut_row(width, pixels, lambda count: count + constant, may_not_overlap=True), width)
    assert sorted(start + i for start, count in found for i in range(count)) == list(range(width))
    assert max(count for _, count in found) <= pixels


@given(st.integers(1, 70), st.integers(1, 16), st.integers(0, 12))
def test_tiles_make_up_the_row(width: int, pixels: int, constant: int) -> None:
    """Whatever a tile costs besides its pixels, no pixel is missing, and no row costs more than with a tile that overlaps."""

    def cost(count: int) -> float:
        return count + constant

    runs = cut_row(width, pixels, cost)
    found = tiles(runs, width)
    assert {start + i for start, count in found for i in range(count)} == set(range(width))
    assert [r.first for r in runs] == [sum(r.count for r in runs[:i]) for i in range(len(runs))]
    assert sum(cost(count) for _, count in found) <= -(-width // pixels) * cost(pixels)


@pytest.mark.parametrize(
    ("width", "pixels", "expected"),
    [
        (56, 6, [(8, 6), (2, 4)]),
        (7, 4, [(1, 4), (1, 3)]),
        (12, 6, [(2, 6)]),
        (49, 6, [(4, 6), (5, 5)]),
        (5, 8, [(1, 5)]),
    ],
)
def test_shorter_tiles_end_a_row(width: int, pixels: int, expected: list[tuple[int, int]]) -> None:
    """Where few pixels take as long as three, one or two at the end cost more than some shorter tiles."""
    runs = cut_row(width, pixels, lambda count: max(count, 3) + 1)
    assert [(run.count, run.pixels) for run in runs] == expected


@given(
    size=st.integers(1, 30),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    before=st.integers(0, 4),
    after=st.integers(0, 4),
    dilation=st.integers(1, 2),
    pixels=st.integers(1, 16),
)
def test_columns_take_the_pixels_that_they_reach(size, kernel, stride, before, after, dilation, pixels) -> None:
    """Parted at the borders a row has the same tiles, each with the pixels of every column that lie on the map.

    So do sections of a row tell what its windows have on the map.
    """
    extent = (kernel - 1) * dilation + 1
    output_size = (size + before + after - extent) // stride + 1
    if size + before + after < extent:
        return
    axis = WindowAxis(size, kernel, stride, before, after, dilation, output_size)
    for position, number in enumerate(axis.sections_from(0, output_size)):
        section = axis.sections[number]
        elements = [element for element in range(kernel) if axis.reaches(position, element)]
        assert list(range(section.begin, section.end)) == elements
    runs = cut_row(output_size, pixels, lambda count: count + 5)
    parted = split_at_borders(runs, axis)
    assert tiles(parted, output_size) == tiles(runs, output_size)
    assert [r.first for r in parted] == [sum(r.count for r in parted[:i]) for i in range(len(parted))]
    for run in parted:
        for start, count in tiles((run,), output_size):
            for column in range(kernel):
                begin, end = (0, count) if run.columns is None else run.columns[column]
                reached = [i for i in range(count) if axis.reaches(start + i, column)]
                assert list(range(begin, end)) == reached
