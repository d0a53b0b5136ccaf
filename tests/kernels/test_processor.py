"""What a target spec says of caches and cores decides how kernels cut their work, and nothing that they compute."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.convolution.template import conv2d_geometry
from tvm_hquant.kernels.convolution.tile_order import TileOrder
from tvm_hquant.kernels.depthwise.geometry import DepthwiseGeometry
from tvm_hquant.kernels.dot_product import FloatDot, WideningDot
from tvm_hquant.kernels.instruction_sets.avx512_vnni import VnniDot
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.matmul.batch_matmul import batch_matmul_kernel
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor, Work
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.kernels.x86.byte_vectors import ByteVectors
from tvm_hquant.operators import BatchMatmul, Conv2D, Epilogue, Window
from tvm_hquant.target_spec import TargetSpec, load_target_spec

BASE = load_target_spec("x86-64-avx2")
POINTWISE = Conv2D((1, 14, 14, 1024), 256, Window((1, 1)))


def with_memory(**fields: float | None) -> TargetSpec:
    return BASE.model_copy(update={"memory": BASE.memory.model_copy(update=fields)})


def with_cores(count: int) -> TargetSpec:
    return BASE.model_copy(update={"units": tuple(unit.model_copy(update={"count": count}) for unit in BASE.units)})


def float_family(spec: TargetSpec) -> AnchorFamily:
    family = families_for_target(spec.instruction_sets, spec.processor)[0]
    assert isinstance(family, AnchorFamily)
    return family


def order(spec: TargetSpec, conv: Conv2D) -> TileOrder:
    request = KernelRequest(conv, ("float32",), "float32", "float32")
    return TileOrder(conv2d_geometry(request, FloatDot(8, 16, "float32", prefetches=True), processor=spec.processor))


def test_a_spec_says_what_the_processor_is() -> None:
    """Protects the units, and what stands for what a spec leaves out."""
    assert BASE.processor == ASSUMED_PROCESSOR, (
        "the defaults are the caches of the spec that they are documented to be of"
    )
    assert load_target_spec("portable-cpu").processor == replace(ASSUMED_PROCESSOR, cores=1)
    assert with_memory(l1_data_kib=64, l1_data_ways=4).processor.l1_sets == 256
    assert with_memory(l1_data_kib=48, l1_data_ways=12).processor.l1_sets == 64
    assert with_memory(l1_data_kib=64, l1_data_ways=None, l2_kib=0, l3_kib=0).processor == Processor(
        65536, 64, 65536, 65536
    )


def test_what_was_measured_decides_how_kernels_are_cut() -> None:
    """Protects that a spec can say what fetching from afar and sharing work takes, and that each has its effect."""
    assert with_memory(l1_data_kib=0, l2_kib=0, l3_kib=0, other_core_line=5).processor.other_core_line == 5
    many_weights = Conv2D((1, 14, 14, 576), 96, Window((1, 1)), 1, Epilogue(True, has_residual=True))
    request = KernelRequest(many_weights, ("uint8", "uint8"), "uint8", "int8")
    vectors = ByteVectors(64, "vpdpbusd")
    near, far = (
        conv2d_geometry(request, VnniDot(), processor=with_memory(**cost).processor, vectors=vectors).tile
        for cost in ({"l2_vector_instructions": 0.1}, {"l2_vector_instructions": 9.0})
    )
    assert near.pixels < far.pixels
    small = Work(instructions=6000, moved_bytes=0)
    assert [with_memory(shared_instructions=n).processor.shares(small) for n in (None, 5000)] == [False, True]
    moving = Work(instructions=0, moved_bytes=64 * 100)
    assert [with_memory(line_instructions=n).processor.shares(moving) for n in (None, 200)] == [False, True]
    conv = Conv2D((1, 28, 28, 128), 64, Window((1, 1)))
    request = KernelRequest(conv, ("float32",), "float32", "float32")
    dot = FloatDot(8, 16, "float32", prefetches=True)
    shares = [
        TileOrder(conv2d_geometry(request, dot, processor=with_memory(other_core_line=n).processor), cores=2).shares
        for n in (None, 0.01)
    ]
    assert shares == [2, 1]


def test_tiles_follow_the_first_level_cache() -> None:
    """Pixels of 1024 floats lie 4 KiB apart: in one set of 64, and in four of 256, where larger tiles cost nothing more."""
    request = KernelRequest(replace(POINTWISE, out_channels=8), ("float32",), "float32", "float32")
    few, many = (float_family(with_memory(l1_data_ways=ways)).tiles(request)[0] for ways in (8, 2))
    assert few.pixels < many.pixels
    depthwise = Conv2D((1, 56, 56, 64), 64, Window((3, 3), padding=(1, 1, 1, 1)), 64)
    rows = [
        DepthwiseGeometry(depthwise, WideningDot(8, 16), 1, 1, with_memory(l1_data_kib=size).processor).group_rows
        for size in (8, 32)
    ]
    assert rows[0] < rows[1]


def test_the_order_of_tiles_follows_the_farther_caches() -> None:
    """Weights that the second-level cache holds are read again for every row, unless the last one holds the activations."""
    conv, large = POINTWISE, Conv2D((1, 128, 128, 128), 1024, Window((1, 1)))
    assert order(with_memory(l2_kib=512), conv).weights_stay_outside
    assert not order(with_memory(l2_kib=2048, l3_kib=2048), large).weights_stay_outside
    assert order(with_memory(l2_kib=2048, l3_kib=65536), large).weights_stay_outside


@pytest.mark.parametrize("cores", [2, 64])
def test_every_core_has_work(cores: int) -> None:
    """Protects processors of many cores: a layer has enough items for each, more than are cut for few cores."""
    conv = Conv2D((1, 28, 28, 64), 64, Window((3, 3), padding=(1, 1, 1, 1)))
    items = order(with_cores(cores), conv).items
    assert items >= cores
    assert items > order(with_cores(1), conv).items or cores == 2


def test_one_core_has_no_threads() -> None:
    """Protects what the spec says of cores from being lost on the way to any kernel that shares work."""
    product = KernelRequest(
        BatchMatmul(((4, 64, 64), (4, 64, 64)), ((0, 1, 2), (0, 1, 2)), (0, 1, 2)), ("float32", "float32"), "float32"
    )
    for cores in (1, 4):
        spec = with_cores(cores)
        kernel = float_family(spec).kernel(KernelRequest(POINTWISE, ("float32",), "float32", "float32"))
        assert kernel is not None
        functions = [kernel, batch_matmul_kernel(product, FloatDot(8, 16, "float32"), "avx2", spec.processor)]
        assert [("T.parallel" in k.function.script()) for k in functions] == [cores > 1] * 2
