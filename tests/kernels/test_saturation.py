"""The proof that int16 sums suffice, against every extreme activation.

Protects exactness on AVX2 and NEON: a chain that the proof allows must never saturate, and the proof must not be needlessly
strict.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant.kernels.convolution.saturation import LONGEST_CHAIN, centred_products, saturation_free_pairs

INT16 = np.iinfo(np.int16)


def largest_sums(weights: np.ndarray, activations: tuple[int, int]) -> tuple[int, int]:
    """Lowest and highest sum of activations times weights, over all that are one of two extreme activations."""
    sums = [int(np.dot(weights.astype(int), choice)) for choice in product(activations, repeat=len(weights))]
    return min(sums), max(sums)


def fits(weights: np.ndarray, activations: tuple[int, int] = (0, 255)) -> bool:
    low, high = largest_sums(weights, activations)
    return bool(low >= INT16.min and high <= INT16.max)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(4, 127), st.integers(0, 2**31))
def test_a_chain_is_allowed_exactly_where_it_cannot_saturate(channels: int, limit: int, seed: int) -> None:
    """Chains of one and two quads, tried with all extreme activations, at one kernel position."""
    codes = np.random.default_rng(seed).integers(-limit, limit + 1, (1, 2, channels, 1, 1)).astype(np.int8)
    if channels == 1:
        assert saturation_free_pairs(codes) == 1  # one row: no pair at all
        return
    padded = np.pad(codes[0, :, :, 0, 0], ((0, 0), (0, -channels % 16)))
    allowed = saturation_free_pairs(codes)
    for chain in (1, 2):
        # Channels (0, 1) and (2, 3) of each quad meet in one int16 sum each.
        lanes = padded.reshape(2, -1, chain, 2, 2).swapaxes(2, 3).reshape(-1, 2 * chain)
        assert (allowed >= chain) == all(fits(lane) for lane in lanes)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 36), st.integers(4, 127), st.integers(0, 2**31))
def test_centred_products_are_allowed_exactly_where_they_fit(channels: int, limit: int, seed: int) -> None:
    """Two products of signed codes always fit; four are tried with all extreme activations."""
    codes = np.random.default_rng(seed).integers(-limit, limit + 1, (1, 2, channels, 1, 1)).astype(np.int8)
    padded = np.pad(codes[0, :, :, 0, 0], ((0, 0), (0, -channels % 32)))
    # Of 32 channels, every eighth meets in the same lane of int16 sums.
    lanes = padded.reshape(2, -1, 4, 8).swapaxes(2, 3).reshape(-1, 4)
    assert (centred_products(codes) >= 4) == all(fits(lane, (-128, 127)) for lane in lanes)
    assert all(fits(lane[:2], (-128, 127)) for lane in lanes)


@pytest.mark.parametrize(("limit", "count"), [(127, 2), (-127, 2), (64, 4), (-64, 2), (-63, 4), (32, 8), (-31, 8)])
def test_fewer_bits_let_more_products_meet(limit: int, count: int) -> None:
    """7-bit weights within −63…63 let four products meet, 6-bit ones eight; −128 times −64 is one too much for four."""
    assert centred_products(np.full((1, 1, 64, 3, 3), limit, np.int8)) == count


def test_columns_of_depthwise_layers_meet() -> None:
    """Products of the columns of a kernel row meet, not those of other rows or channels."""
    codes = np.full((1, 20, 1, 5, 3), 85, np.int8)
    assert centred_products(codes) == 8
    codes[0, 3, 0, 2, 1] = 87  # −128 · (85 + 87 + 85) is not within int16
    assert centred_products(codes) == 2
    assert centred_products(np.full((1, 2, 1, 1, 8), 63, np.int8)) == 4


@pytest.mark.parametrize(("limit", "chain"), [(127, 0), (64, 1), (32, 2), (16, 4), (8, 8)])
def test_fewer_bits_allow_longer_chains(limit: int, chain: int) -> None:
    """What the documentation says of 7-, 6-, 5- and 4-bit weights."""
    codes = np.full((1, 1, 64, 3, 3), limit, np.int8)
    assert saturation_free_pairs(codes) == min(chain, LONGEST_CHAIN)


def test_chains_of_few_channels_go_by_the_patch() -> None:
    """Products of two pixels meet there, and those of one pixel have to fit as well, for kernels without patches."""
    codes = np.zeros((1, 1, 3, 3, 3), np.int8)
    codes[0, 0, 2, 0, 0], codes[0, 0, 0, 0, 1] = 100, 28
    assert saturation_free_pairs(codes) == LONGEST_CHAIN
    codes[0, 0, 0, 0, 1] = 29  # the fourth code of the patch, beside the third
    assert saturation_free_pairs(codes) == 0
    codes[0, 0, 0, 0, 1], codes[0, 0, 0, 1, 1], codes[0, 0, 1, 1, 1] = 0, 100, 100
    assert saturation_free_pairs(codes) == 0


def test_depthwise_pairs_are_kernel_rows() -> None:
    """Rows j and j + 2 of one column meet; a large weight between them does no harm."""
    codes = np.zeros((1, 4, 1, 3, 3), np.int8)
    codes[0, :, 0, 1] = 127
    codes[0, 1, 0, 0, 2], codes[0, 1, 0, 2, 2] = 100, 28
    assert saturation_free_pairs(codes) == 1
    codes[0, 1, 0, 2, 2] = 29
    assert saturation_free_pairs(codes) == 0


def test_depthwise_chains_take_all_columns() -> None:
    """The sums of rows j and j + 2 over the whole width of the window, however large its middle row is."""
    codes = np.full((1, 4, 1, 3, 3), 21, np.int8)
    assert saturation_free_pairs(codes) == 3
    codes[0, :, 0, 1] = 42
    assert saturation_free_pairs(codes) == 3
    codes[0, 2, 0, 2, 1] = 24
    assert saturation_free_pairs(codes) == 1
    assert saturation_free_pairs(np.full((1, 4, 1, 5, 5), -12, np.int8)) == 5


def test_any_point_can_forbid() -> None:
    """All points of a multipoint layer run through the same kernel."""
    codes = np.ones((2, 3, 8, 1, 1), np.int8)
    assert saturation_free_pairs(codes) == LONGEST_CHAIN
    codes[1, 2, 4:6] = 127
    assert saturation_free_pairs(codes) == 0
