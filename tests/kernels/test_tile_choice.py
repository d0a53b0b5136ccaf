"""Which tile the model of the processor expects to be fastest."""

from dataclasses import replace

import pytest

from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.convolution.template import conv2d_geometry
from tvm_hquant.kernels.dot_product import FloatDot
from tvm_hquant.kernels.instruction_sets import avx512_vnni
from tvm_hquant.kernels.instruction_sets.avx512_vnni import VnniDot
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.processor import Processor
from tvm_hquant.kernels.x86.byte_vectors import ByteVectors
from tvm_hquant.operators import Conv2D, Epilogue, Window


def vnni_geometry(operator: Conv2D, lookahead: int = VnniDot.lookahead) -> AnchorGeometry:
    request = KernelRequest(operator, ("uint8",) * (1 + operator.epilogue.has_residual), "uint8", "int8")
    return conv2d_geometry(request, VnniDot(lookahead=lookahead), vectors=ByteVectors(64, "vpdpbusd"))


@pytest.mark.parametrize("channels", [64, 256])
def test_the_longer_an_epilogue_the_smaller_a_tile(channels: int) -> None:
    """An epilogue that a core does not see the end of keeps it from the products of the next tile."""
    sums = []
    for has_residual in (False, True):
        operator = Conv2D((1, 28, 28, channels), 256, Window((1, 1)), 1, Epilogue(True, has_residual))
        tile = vnni_geometry(operator).tile
        sums.append(tile.pixels * tile.vectors)
    assert 12 <= sums[1] < sums[0] < 24, "12 sums hide the latency of a product"
    in_turn = vnni_geometry(operator, lookahead=0).tile
    assert in_turn.pixels * in_turn.vectors == 24, "where nothing runs side by side, the largest tile of whole vectors"


def test_tiles_do_not_overlap_where_others_fit() -> None:
    """512 channels are no multiple of three vectors, which would take the fewest loads on rows of seven pixels."""
    geometry = vnni_geometry(Conv2D((1, 7, 7, 512), 512, Window((3, 3), padding=(1, 1, 1, 1))))
    assert not geometry.overlaps


def float_geometry(operator: Conv2D, processor: Processor, **costs: int) -> AnchorGeometry:
    """Of float32 on AVX-512, with some costs replaced."""
    request = KernelRequest(operator, ("float32",), "float32", "float32", finite_weights=True)
    dot = avx512_vnni.INSTRUCTION_SET.families[0].dot(request)
    assert isinstance(dot, FloatDot)
    return conv2d_geometry(request, replace(dot, **costs), processor=processor)


def test_sums_of_floats_leave_time_for_their_epilogue() -> None:
    """As above: a core that does not see the end of an epilogue gets a smaller tile, where the sums have few products."""
    operator = Conv2D((1, 56, 56, 64), 256, Window((1, 1)))
    sums = [
        tile.pixels * tile.vectors
        for tile in (float_geometry(operator, Processor(), lookahead=size).tile for size in (176, 2000))
    ]
    assert 12 <= sums[0] < sums[1]


def test_weights_stay_in_the_second_level_cache() -> None:
    """Four vectors of weights of 3×3×256 channels fill more than half of one of 1 MiB, and would come again for every row."""
    operator = Conv2D((1, 14, 14, 256), 256, Window((3, 3), padding=(1, 1, 1, 1)), epilogue=Epilogue(True, lower=0.0))
    small, large = (float_geometry(operator, Processor(l2_bytes=size)) for size in (2**20, 2**23))
    assert small.tile.vectors < large.tile.vectors
    assert 2 * small.tile_weights * 4 <= 2**20


def test_epilogues_are_hidden_by_as_many_products_as_there_are() -> None:
    """Four steps over 16 channels do not hide the epilogue of three vectors of a pixel, which is longer than that of six."""
    tile = vnni_geometry(Conv2D((1, 112, 112, 16), 96, Window((1, 1)))).tile
    assert tile.vectors in (2, 6)


def test_weights_that_leave_the_first_level_cache_are_shared_by_more_pixels() -> None:
    """Six vectors of weights of 576 channels, 54 KiB, come as slowly as two pixels multiply them; three vectors are 27 KiB."""
    operator = Conv2D((1, 14, 14, 576), 96, Window((1, 1)), 1, Epilogue(True, has_residual=True))
    tile = vnni_geometry(operator).tile
    assert tile.pixels > 2
