"""Convolutions whose activations are copied one band of the map after the other, in little memory, bit for bit.

Protects tiles that read a band from reading what another band has left there: at ends of maps and images, beside padding,
where the last band has fewer rows than others, with windows that reach over several bands, and with threads that share bands
or the tiles of each.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.anchor_cases import FAMILIES, check, windows
from tvm_hquant.kernels.convolution.map_bands import MapBands
from tvm_hquant.kernels.convolution.template import conv2d_geometry
from tvm_hquant.kernels.convolution.wide_weights import widens_weights
from tvm_hquant.kernels.instruction_sets import avx2
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR
from tvm_hquant.operators import Conv2D, Epilogue, Window

TINY = replace(ASSUMED_PROCESSOR, l2_bytes=3000)
"""With a cache that no map fits into."""


def bands(conv: Conv2D, processor=TINY) -> MapBands:
    geometry = conv2d_geometry(KernelRequest(conv, ("uint8",), "uint8", "int8"), avx2.WordDot(), None, None, processor)
    return MapBands(geometry)


def test_a_band_fits_the_cache() -> None:
    """Rows of a map, or tiles of a single row; of these no fewer than the shorter ones at its end."""
    rows = bands(Conv2D((2, 30, 9, 4), 24, Window((3, 3), (2, 2), (1, 1, 1, 1))))
    assert (rows.units, rows.count, rows.is_even) == (4, 8, False)
    assert 2 * rows.elements <= TINY.l2_bytes // 4
    pixels = bands(Conv2D((1, 40, 40, 2), 24, Window((1, 1))))
    assert pixels.is_single_row
    assert pixels.count > 1
    assert bands(Conv2D((1, 40, 40, 64), 24, Window((1, 1)))).units == 8
    assert bands(Conv2D((1, 40, 40, 16), 24, Window((1, 1))), ASSUMED_PROCESSOR).count == 1


def test_few_weights_are_widened_once() -> None:
    """Not those that are more than the outputs, nor those that the cache has no room for."""
    few, many = Conv2D((1, 30, 30, 16), 32, Window((1, 1))), Conv2D((1, 3, 3, 64), 32, Window((1, 1)))
    assert widens_weights(bands(few, ASSUMED_PROCESSOR).geometry)
    assert not widens_weights(bands(many, ASSUMED_PROCESSOR).geometry)
    assert not widens_weights(bands(few, replace(TINY, l2_bytes=1024)).geometry)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.integers(1, 2),
    size=st.tuples(st.integers(9, 30), st.integers(8, 19)),
    groups=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 11), st.integers(1, 37)),
    window=st.one_of(st.just(Window((1, 1))), windows),
    storage=st.sampled_from(["uint8", "uint8", "uint16"]),
    l2_bytes=st.integers(1, 4000),
    cores=st.sampled_from([1, 2, 40]),
    seed=st.integers(0, 2**31),
)
def test_bands_are_exact(family, images, size, groups, channels, window, storage, l2_bytes, cores, seed) -> None:
    """Any window over several bands; both ways of sharing the work."""
    epilogue = Epilogue(lower=-math.inf)
    operator = Conv2D((images, *size, channels[0] * groups), channels[1] * groups, window, groups, epilogue)
    processor = replace(ASSUMED_PROCESSOR, l2_bytes=l2_bytes, cores=cores)
    check(family, KernelRequest(operator, (storage,), storage, "int8"), seed, processor=processor)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", [3, 4])
def test_shuffled_groups_in_bands_are_exact(family: str, groups: int) -> None:
    """Activations of several groups side by side, of some pixels at a time; more weights of a step are loaded than are used."""
    operator = Conv2D((1, 13, 11, 8 * groups), 16 * groups, Window((1, 1)), groups)
    check(family, KernelRequest(operator, ("uint8",), "uint8", "int8", shuffled=groups), processor=TINY)
