"""Tiles are computed once each, by cores that share the map or its channels; what they read comes to the cache before, and not
much more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.template import conv2d_geometry, conv2d_kernel
from tvm_hquant.kernels.convolution.tile_order import TileOrder, UpcomingElements, elements_ahead
from tvm_hquant.kernels.dot_product import FloatDot
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.processor import Processor
from tvm_hquant.operators import Conv2D, Window

DOT = FloatDot(8, 16, prefetches=True, latency=8)
POINTWISE = Conv2D((1, 20, 20, 96), 16, Window((1, 1)))
"""150 KiB of activations, and one block of channels: its tiles ask for no weights."""


def request(conv: Conv2D) -> KernelRequest:
    return KernelRequest(conv, ("float32",), "float32", "float32")


def order(conv: Conv2D, cores: int) -> TileOrder:
    return TileOrder(conv2d_geometry(request(conv), DOT, processor=Processor(cores=cores)), cores=cores)


@pytest.mark.parametrize(
    ("conv", "cores", "shares"),
    [
        (Conv2D((1, 28, 28, 128), 64, Window((1, 1))), 2, 2),
        (Conv2D((1, 28, 28, 128), 64, Window((1, 1))), 1, 1),
        (Conv2D((1, 28, 28, 32), 64, Window((3, 3), padding=(1, 1, 1, 1))), 4, 4),
        (Conv2D((1, 5, 5, 64), 256, Window((1, 1))), 2, 1),
        (Conv2D((1, 28, 28, 256), 1024, Window((1, 1))), 2, 1),
        (Conv2D((1, 7, 7, 64), 32, Window((3, 3))), 2, 1),
    ],
    ids=["pixels", "one core", "rows", "more weights than activations", "more weights than cache", "odd rows"],
)
def test_cores_share_the_map_where_its_lines_cost_more_than_weights(conv: Conv2D, cores: int, shares: int) -> None:
    """Protects large maps from going from core to core, and large weights from being read by all of them."""
    assert order(conv, cores).shares == shares


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize(
    "conv",
    [
        Conv2D((1, 1, 196, 64), 64, Window((1, 1))),
        Conv2D((2, 12, 13, 16), 48, Window((3, 3), padding=(1, 1, 1, 1))),
        Conv2D((1, 6, 50, 16), 64, Window((3, 3))),
    ],
    ids=["one row", "two images", "long rows"],
)
def test_every_tile_is_computed_once(conv: Conv2D, cores: int) -> None:
    """Protects the results of all layers; the numbers of tiles, which say what to ask for; and cores from unequal shares."""
    tiles = order(conv, cores)
    total = tiles.rows * tiles.tiles * tiles.channel_blocks
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        found = T.arg("found", T.buffer((total, 5), "int32"))
        count = T.arg("count", T.buffer((1,), "int32"))
        with T.serial(tiles.items) as item, tiles.tile_loop(item) as place:
            for column, value in enumerate((item, place.row, place.tile, place.channel_block, place.number)):
                T.buffer_store(found, value, [count[0], column])
            T.buffer_store(count, count[0] + 1, [0])
    function = builder.get().with_attr("global_symbol", "visit")
    library = tvm.compile(tvm.IRModule({"visit": function}), target="llvm")
    rows, number = tvm.runtime.tensor(np.full((total, 5), -1, "int32")), tvm.runtime.tensor(np.zeros(1, "int32"))
    library["visit"](rows, number)
    assert number.numpy()[0] == total
    visited = rows.numpy()
    assert len(np.unique(visited[:, 1:4], axis=0)) == total
    assert tiles.shares == cores
    core = visited[:, 0] * cores // tiles.items
    for part in (
        visited[(core == c) & (visited[:, 3] == block)] for c, block in np.ndindex(cores, tiles.channel_blocks)
    ):
        np.testing.assert_array_equal(part[:, 4], range(len(part)))
    of_core = np.bincount(core)
    assert of_core.max() <= 1.05 * of_core.mean()


@given(
    step_weights=st.sampled_from((8, 24, 48, 64, 128, 256, 384)),
    tiles=st.integers(2, 300),
    steps_of_a_tile=st.integers(8, 64),
    line=st.sampled_from((16, 32, 64)),
)
def test_tiles_ask_for_all_weights_of_the_next_channels(
    step_weights: int, tiles: int, steps_of_a_tile: int, line: int
) -> None:
    elements, steps = elements_ahead(step_weights, tiles, line)
    lines = set()
    for number in range(tiles):
        first = number * steps_of_a_tile // steps * elements
        for step in range(steps_of_a_tile):
            at = first + step // steps * elements
            lines.update((at + offset) // line for offset in range(0, elements, line))
    wanted = -(-step_weights * steps_of_a_tile // line)
    # A last line may be left to the step that reads it; the first one that is asked for is always the first.
    assert {number for number in range(wanted) if number not in lines} <= {wanted - 1}
    assert len(lines) <= 1.3 * wanted + 4


@given(pixels=st.integers(1, 12), channels=st.sampled_from((16, 24, 64, 96, 100)), stride=st.integers(1, 3))
def test_tiles_ask_for_all_activations_of_the_next_tile(pixels: int, channels: int, stride: int) -> None:
    """With strides, not for the pixels between those that are read."""
    line = 16
    elements, steps_in_one = elements_ahead(pixels, 1, line)
    buffer = T.buffer((1,), "float32")
    upcoming = UpcomingElements(
        buffer, 0, elements, steps_in_one, (channels, stride * channels) if stride > 1 else None
    )
    lines = set()
    for step in range(channels):
        at = upcoming.place(step)
        lines.update((at + offset) // line for offset in range(0, elements, line))
    wanted = {(i * stride * channels + c) // line for i in range(pixels) for c in range(channels)}
    ends = {at // line for i in range(pixels) for at in (i * stride * channels, (i * stride + 1) * channels - 1)}
    # The first or last line of a pixel may be left to the step that reads it.
    assert wanted - lines <= ends
    assert len(lines) <= 1.3 * len(wanted) + 4


@pytest.mark.parametrize(
    ("conv", "processor", "asks"),
    [
        (POINTWISE, Processor(l2_bytes=2**17), True),
        (POINTWISE, Processor(l2_bytes=2**18), False),
        (replace(POINTWISE, input_shape=(1, 10, 10, 1024)), Processor(l2_bytes=2**17), False),
        (replace(POINTWISE, input_shape=(1, 10, 10, 1024)), Processor(l1_bytes=2**16, l2_bytes=2**17), True),
    ],
)
def test_activations_are_asked_for_where_they_are_far_and_have_room(
    conv: Conv2D, processor: Processor, asks: bool
) -> None:
    """Pixels of 1024 channels share a set of the first-level cache: those of two tiles would fill it."""
    kernel = conv2d_kernel(request(conv), DOT, "avx2", processor=processor)
    others = conv2d_kernel(request(conv), DOT, "avx2", processor=replace(processor, l2_bytes=2**24))
    asked = [k.function.script().count("llvm.prefetch") for k in (kernel, others)]
    assert (asked[0] > asked[1]) == asks
