"""Every kernel cuts its work for the caches and cores of a spec, and computes the same bits for all of them."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm

from tests.kernels.anchor_cases import HOST, TARGETS, random_case
from tests.kernels.kernel_cases import Case, assert_same_bits, elementwise_constants, requantization, stored_values
from tvm_hquant import numerics
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.convolution.patches import conv_of_patches
from tvm_hquant.kernels.convolution.winograd_geometry import WinogradGeometry
from tvm_hquant.kernels.interface import (
    Array,
    BiasConstants,
    Kernel,
    KernelRequest,
    LayerConstants,
    NoConstants,
    NormalizationConstants,
    QuantizeConstants,
    TableConstants,
)
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    BiasAdd,
    Concat,
    Conv2D,
    Convert,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Multiply,
    Operator,
    Resize2D,
    Softmax,
    Unary,
    Window,
)
from tvm_hquant.stored_outputs import in_channel_order
from tvm_hquant.tensor_format import STORAGE_DTYPE

PADDED = Window((3, 3), padding=(1, 1, 1, 1))
SMALL_CACHES = {"l1_bytes": 16 * 2**10, "l2_bytes": 64 * 2**10, "last_bytes": 2**20}


def _codes(operator: Operator, count: int = 1) -> KernelRequest:
    return KernelRequest(operator, ("uint8",) * count, "uint8", "int8" if isinstance(operator, Conv2D) else "")


def _floats(operator: Operator, count: int = 1) -> KernelRequest:
    return KernelRequest(operator, ("float32",) * count, "float32", "float32" if isinstance(operator, Conv2D) else "")


def _requests(size: int) -> dict[str, KernelRequest]:
    """A layer of every kind of kernel, on maps of that many rows and columns."""
    channels = 32
    shape = (1, size, size, channels)
    pool = Window((2, 2), (2, 2))
    depthwise = Conv2D(shape, channels, PADDED, channels)
    return {
        "winograd": _codes(Conv2D(shape, channels, PADDED)),
        "patches": _codes(Conv2D((1, size, size, 3), channels, Window((3, 3), (2, 2), (1, 1, 1, 1)))),
        "convolution": _floats(Conv2D(shape, channels, Window((1, 1)))),
        "shuffled": replace(_floats(Conv2D(shape, channels, Window((1, 1)), 4)), shuffled=4),
        "depthwise of codes": _codes(depthwise),
        "depthwise of floats": _floats(depthwise),
        "depthwise of wide codes": replace(_codes(depthwise), inputs=("uint16",), output="uint16"),
        "add": _codes(Add(shape), 2),
        "bias": _floats(BiasAdd(shape, (1, size, 1, channels))),
        "multiply": _floats(Multiply((shape, (1, 1, 1, channels))), 2),
        "quantize": replace(_codes(Convert(shape)), inputs=("float32",)),
        "table": _codes(Unary(shape, "sigmoid")),
        "tanh": _floats(Unary(shape, "tanh")),
        "max pool": _codes(MaxPool2D(shape, pool)),
        "average pool": _floats(AveragePool2D(shape, pool)),
        "resize": _floats(Resize2D(shape, (2 * size, 2 * size), (1, 0, 2), (1, 0, 2))),
        "concat": _codes(Concat((shape, shape), 3), 2),
        "reshape": _codes(Movement("reshape", shape, (size * size, channels))),
        "permute": _floats(Movement("permute_dims", shape, (1, channels, size, size), (0, 3, 1, 2))),
        "softmax": _floats(Softmax((size * size, channels), 1)),
        "softmax of columns": _floats(Softmax((size, size, channels), 1)),
        "layer normalization": _floats(GroupNormalization(shape, 3, 3, 1e-5)),
        "instance normalization": _floats(GroupNormalization(shape, 1, 3, 1e-5, channels)),
        "normalization": _floats(LocalResponseNormalization(shape, 5, 1e-4, 0.75, 1.0)),
    }


def _kernels(size: int, processor: Processor, *names: str) -> dict[str, Kernel]:
    """Of instruction sets with these names."""
    families = families_for_target((*names, "portable"), processor)
    return {name: select_kernel(families, request) for name, request in _requests(size).items()}


def _items(kernel: Kernel) -> list[int]:
    """Iterations of the loops that threads share."""
    return [int(count) for count in re.findall(r"T\.parallel\((\d+)\)", kernel.function.script())]


@pytest.mark.parametrize("names", [("avx2",), ("amx", "avx512_vnni"), ("arm_neon",), ("arm_dotprod",)], ids=str)
def test_cores_share_what_is_work_enough(names: tuple[str, ...]) -> None:
    """Protects one core from loops for threads, small layers from waiting for them, and every family from asking no spec."""
    for name, kernel in _kernels(128, Processor(cores=1), *names).items():
        assert not _items(kernel), name
    for name, kernel in _kernels(128, Processor(cores=8), *names).items():
        assert max(_items(kernel), default=0) > 1, name
    for name, kernel in _kernels(2, Processor(cores=8), *names).items():
        assert not _items(kernel) or kernel.name.startswith("portable"), name


@pytest.mark.parametrize("name", ["add", "tanh", "reshape", "winograd", "patches"])
@pytest.mark.parametrize("cores", [2, 8, 64])
def test_every_core_has_items(name: str, cores: int) -> None:
    """Protects large processors: loops that are cut for the cores have an item for each."""
    assert max(_items(_kernels(128, Processor(cores=cores), "avx2")[name])) >= min(cores, 64)


@pytest.mark.parametrize("l2_kib", [64, 256, 1024])
@pytest.mark.parametrize("cores", [1, 2, 8])
def test_winograd_blocks_fit_the_second_level_cache(l2_kib: int, cores: int) -> None:
    """Protects the cache from blocks of another one, one core from much more work, and others from having none."""
    processor = Processor(l2_bytes=l2_kib * 2**10, cores=cores)
    for size, channels in ((56, 64), (28, 128), (14, 256), (28, 32)):
        geometry = WinogradGeometry(Conv2D((1, size, size, channels), channels, PADDED), 8, processor)
        transformed = 2 * 16 * geometry.block_tiles * channels
        assert transformed <= processor.l2_bytes or geometry.block_rows == 1
        assert geometry.work <= 1.05 * geometry.blocks * (geometry.block_tiles + 2)
        shared = geometry.blocks if geometry.shares_tiles else geometry.channel_blocks
        assert shared >= min(cores, 2)


def test_threads_that_share_channels_transform_tiles_by_themselves() -> None:
    """Protects Winograd's layers of few tiles from what one core has transformed coming slowly to the others; and one thread
    from transforming anew what the spec expects other cores to do."""
    request = _codes(Conv2D((1, 14, 14, 256), 256, PADDED))
    script = select_kernel(families_for_target(("avx2", "portable"), Processor(cores=4)), request).function.script()
    before, *inside = script.split("T.parallel(")
    assert len(inside) == 1
    assert "runtime.NumThreads" in before
    assert "alloc_buffer" not in before
    assert "alloc_buffer" in inside[0]


def test_copies_are_shared_with_the_layer() -> None:
    """Protects layers whose activations are copied first: what one core has copied comes slowly to the others."""
    request = _codes(Conv2D((1, 13, 13, 512), 24, Window((1, 1))))
    families = families_for_target(("avx2", "portable"), Processor(cores=2))
    assert len(_items(select_kernel(families, request))) == 2


def test_smaller_caches_have_smaller_pieces() -> None:
    """Patches fit the first-level cache, sums of sweeps the second-level one, and what lines of softmax leave behind, too."""
    small = replace(ASSUMED_PROCESSOR, **SMALL_CACHES)
    stem = Conv2D((1, 64, 64, 3), 32, Window((3, 3), padding=(1, 1, 1, 1)))
    widths = [conv_of_patches(stem, processor).input_shape for processor in (small, ASSUMED_PROCESSOR)]
    assert widths[0][2] < widths[1][2]
    assert [rows[2] * rows[3] <= p.l1_bytes // 2 for rows, p in zip(widths, (small, ASSUMED_PROCESSOR), strict=True)]

    wide = Softmax((64, 4096), 1)
    found = [
        select_kernel(families_for_target(("avx2", "portable"), p), _floats(wide)) for p in (small, ASSUMED_PROCESSOR)
    ]
    assert [_items(kernel)[0] for kernel in found] == [32, 8], "lines of softmax that are worked on at once"


def _constants(request: KernelRequest, rng: np.random.Generator) -> LayerConstants:
    if isinstance(request.operator, Unary) and request.inputs == ("uint8",):
        return TableConstants(stored_values(rng, (256,), request.output))
    if isinstance(request.operator, BiasAdd):
        return BiasConstants(stored_values(rng, request.operator.bias_shape, "float32"))
    if isinstance(request.operator, GroupNormalization):
        return NormalizationConstants(*(stored_values(rng, (request.operator.channels,), "float32") for _ in range(2)))
    if request.inputs[0] != request.output:
        return QuantizeConstants(0.02, requantization(request.output, rng))
    is_arithmetic = request.inputs[0] == "uint8" and isinstance(request.operator, Add)
    return elementwise_constants(request, rng) if is_arithmetic else NoConstants()


def _case(request: KernelRequest, rng: np.random.Generator) -> tuple[KernelRequest, LayerConstants, list[Array]]:
    if isinstance(request.operator, Conv2D):
        return random_case(rng, request)
    shapes = zip(input_shapes(request.operator), request.inputs, strict=True)
    return request, _constants(request, rng), [stored_values(rng, *stored) for stored in shapes]


@pytest.mark.parametrize(
    "processor",
    [Processor(cores=1), Processor(cores=2), Processor(**SMALL_CACHES, cores=8)],
    ids=["one core", "two cores", "small caches"],
)
def test_all_processors_compute_the_same_bits(processor: Processor) -> None:
    """Protects the contract from the ways in which work is cut: blocks that overlap, items that end early."""
    instruction_set = "avx2" if "avx2" in HOST else "portable"
    families, rng = families_for_target((instruction_set, "portable"), processor), np.random.default_rng(0)
    wanted = _requests(30) | {"sweeps": _floats(Conv2D((1, 14, 14, 128), 64, PADDED))}
    cases = {name: _case(request, rng) for name, request in wanted.items()}
    kernels = {name: select_kernel(families, request) for name, (request, _, _) in cases.items()}
    symbols = {name: f"layer_{number}" for number, name in enumerate(kernels)}
    module = tvm.IRModule(
        {symbols[name]: k.function.with_attr("global_symbol", symbols[name]) for name, k in kernels.items()}
    )
    library = tvm.compile(module, target=tvm.target.Target(TARGETS[instruction_set]), tir_pipeline=CPU_PIPELINE)
    for name, (request, constants, inputs) in cases.items():
        output = tvm.runtime.tensor(np.full(request.output_shape, 77, STORAGE_DTYPE[request.output]))
        arguments = [np.ascontiguousarray(a) for a in (*inputs, *kernels[name].pack(constants))]
        library[symbols[name]](*map(tvm.runtime.tensor, arguments), output)
        expected = numerics.evaluate(request, constants, inputs)
        assert_same_bits(in_channel_order(request, output.numpy()), expected, Case(request, constants, 0))
