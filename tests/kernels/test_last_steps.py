"""The last steps of a tile, taken by groups of pixels in turns with their epilogue: every step once for every pixel."""

import numpy as np
import pytest

from tests.kernels.test_anchor_kernels import TARGETS, families, random_case, run_kernel
from tvm_hquant import numerics
from tvm_hquant.kernels.interface import KernelRequest, Tile
from tvm_hquant.kernels.last_steps import pixel_groups
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES
from tvm_hquant.operators import Conv2D, Epilogue, Window


@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5, 7, 8])
def test_groups_have_sums_enough(vectors: int) -> None:
    """All pixels once, in order; every group but the last hides the latency of a product."""
    groups = pixel_groups(13, vectors)
    assert [pixel for group in groups for pixel in group] == list(range(13))
    assert all(len(group) * vectors >= 8 for group in groups[:-1])


@pytest.mark.parametrize("family", families("avx512_vnni"))
@pytest.mark.parametrize(
    ("tile", "channels", "has_residual"),
    [
        (Tile(6, 4), 24, True),
        (Tile(5, 4), 30, False),  # the last step takes channels once more
        (Tile(9, 3), 27, True),
        (Tile(13, 2), 20, True),
        (Tile(16, 1), 36, False),
        (Tile(5, 5), 64, True),
    ],
    ids=str,
)
def test_sums_are_whole(family: str, tile: Tile, channels: int, has_residual: bool) -> None:
    """Rows of 17 pixels, whose last tiles are shorter or overlap, against the contract."""
    operator = Conv2D((1, 1, 17, channels), 16 * tile.vectors, Window((1, 1)), 1, Epilogue(True, has_residual))
    request = KernelRequest(operator, ("uint8",) * (1 + has_residual), "uint8", "int8")
    request, constants, inputs = random_case(np.random.default_rng(channels), request)
    kernel = ANCHOR_FAMILIES[family].kernel(request, tile)
    expected = numerics.evaluate(request, constants, inputs)
    np.testing.assert_array_equal(run_kernel(kernel, constants, inputs, TARGETS[family]), expected)


@pytest.mark.parametrize("family", families("avx512_vnni"))
def test_sums_of_shuffled_groups_are_whole(family: str) -> None:
    """Steps that take channels of every group, whose outputs take turns."""
    operator = Conv2D((1, 3, 6, 48), 64, Window((1, 1)), 2)
    request, constants, inputs = random_case(
        np.random.default_rng(0), KernelRequest(operator, ("uint8",), "uint8", "int8", shuffled=True)
    )
    kernel = ANCHOR_FAMILIES[family].kernel(request)
    grouped = numerics.evaluate(request, constants, inputs).reshape(1, 3, 6, 2, 32)
    expected = grouped.swapaxes(3, 4).reshape(1, 3, 6, 64)
    np.testing.assert_array_equal(run_kernel(kernel, constants, inputs, TARGETS[family]), expected)
