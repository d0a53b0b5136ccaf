"""What tiles read comes to the cache before they do: all of it, and not much more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.template import conv2d_kernel
from tvm_hquant.kernels.convolution.tile_order import UpcomingElements, elements_ahead
from tvm_hquant.kernels.dot_product import FloatDot
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.processor import Processor
from tvm_hquant.operators import Conv2D, Window

DOT = FloatDot(8, 16, prefetches=True, latency=8)
POINTWISE = Conv2D((1, 20, 20, 96), 16, Window((1, 1)))
"""150 KiB of activations, and one block of channels: its tiles ask for no weights."""


def request(conv: Conv2D) -> KernelRequest:
    return KernelRequest(conv, ("float32",), "float32", "float32")


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
