"""Tiles with more lanes than a group has outputs: vectors that are moved back compute some channels twice, none wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.anchor_cases import TARGETS, families, random_case, run_kernel
from tvm_hquant import numerics
from tvm_hquant.kernels.epilogues.packed_epilogue import channel_order, vector_groups
from tvm_hquant.kernels.interface import KernelRequest, Tile
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES
from tvm_hquant.operators import Conv2D, Epilogue, Window


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("vectors", range(1, 9))
def test_every_channel_has_a_lane(vectors: int, lanes: int) -> None:
    """All channels, none beyond them, and vectors that are packed together hold neighbours."""
    for channels in range(max(lanes, (vectors - 1) * lanes + 1), vectors * lanes + 1):
        order = channel_order(vectors, channels, lanes)
        assert sorted(set(order.ravel().tolist())) == list(range(channels))
        for first, size in vector_groups(vectors, channels, lanes):
            packed = np.sort(order[first : first + size].ravel())
            assert (np.diff(packed) == 1).all()


@pytest.mark.parametrize("family", families("avx512_vnni", "avx2"))
@pytest.mark.parametrize(("vectors", "missing", "has_residual"), [(2, 3, True), (4, 1, False), (5, 3, True)], ids=str)
def test_wide_tiles_are_exact(family: str, vectors: int, missing: int, has_residual: bool) -> None:
    """One tile for each of two groups, whose last tile of a row overlaps too, against the contract."""
    outputs = vectors * ANCHOR_FAMILIES[family].lanes - missing
    operator = Conv2D((1, 1, 17, 40), 2 * outputs, Window((1, 1)), 2, Epilogue(True, has_residual))
    request = KernelRequest(operator, ("uint8",) * (1 + has_residual), "uint8", "int8")
    request, constants, inputs = random_case(np.random.default_rng(outputs), request)
    kernel = ANCHOR_FAMILIES[family].kernel(request, Tile(1 if vectors == 5 else 2, vectors))
    assert kernel is not None
    np.testing.assert_array_equal(
        run_kernel(kernel, constants, inputs, TARGETS[family]), numerics.evaluate(request, constants, inputs)
    )


@pytest.mark.parametrize("family", families("avx512_vnni"))
@pytest.mark.parametrize(("outputs", "lanes"), [(2, 8), (4, 4), (7, 8), (8, 8), (12, 8), (15, 8), (16, 16)])
@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_narrow_groups_are_exact(family: str, outputs: int, lanes: int, storage: str) -> None:
    """Groups with fewer outputs than a vector of 512 bits has lanes take shorter ones, of which a core starts more."""
    has_residual = outputs % 8 > 0
    operator = Conv2D((1, 5, 9, 24), 3 * outputs, Window((3, 3), (1, 1), (1, 1, 1, 1)), 3, Epilogue(True, has_residual))
    weights = "int8" if storage == "uint8" else storage
    request = KernelRequest(operator, (storage,) * (1 + has_residual), storage, weights)
    request, constants, inputs = random_case(np.random.default_rng(outputs), request)
    kernel = ANCHOR_FAMILIES[family].kernel(request)
    dot = ANCHOR_FAMILIES[family].dot(request)
    assert kernel is not None
    assert dot is not None
    assert dot.lanes == lanes
    np.testing.assert_array_equal(
        run_kernel(kernel, constants, inputs, TARGETS[family]), numerics.evaluate(request, constants, inputs)
    )
