"""3×3 convolutions by Winograd's algorithm in integers against the contract, bit for bit.

Protects that the transforms are exact, that no sum of extreme codes and weights leaves int32 with as many channels as are
allowed, the overlap of last tiles and of blocks of them, and which layers are computed so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.anchor_cases import HOST, TARGETS, random_case, run_kernel
from tests.kernels.code_endings import CodeEnding, code_endings
from tvm_hquant import numerics
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.convolution.winograd import can_transform, saved_products, winograd_kernel
from tvm_hquant.kernels.convolution.winograd_geometry import WinogradGeometry
from tvm_hquant.kernels.epilogues.proven_endings import proven_ending
from tvm_hquant.kernels.interface import IntegerAnchorConstants, KernelRequest, Placement, Requantization, Tile
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES
from tvm_hquant.kernels.x86.byte_vectors import ByteVectors
from tvm_hquant.operators import Conv2D, Epilogue, Window

VECTORS = ByteVectors(32, "vpmaddwd")
needs_avx2 = pytest.mark.skipif("avx2" not in HOST, reason="this CPU has no AVX2")


def _request(operator: Conv2D) -> KernelRequest:
    return KernelRequest(operator, ("uint8",) * (1 + operator.epilogue.has_residual), "uint8", "int8")


def _check(
    request: KernelRequest,
    constants: IntegerAnchorConstants,
    inputs: list[np.ndarray],
    processor: Processor = ASSUMED_PROCESSOR,
) -> None:
    kernel = winograd_kernel(replace(request, ending=proven_ending(constants)), VECTORS, "avx2", processor)
    actual = run_kernel(kernel, constants, inputs, TARGETS["avx2"])
    np.testing.assert_array_equal(actual, numerics.evaluate(request, constants, inputs), kernel.name)


@st.composite
def _convolutions(draw: st.DrawFn) -> Conv2D:
    padding = draw(st.sampled_from([(1, 1, 1, 1), (0, 0, 0, 0), (2, 0, 1, 3)]))
    height = draw(st.integers(max(1, 4 - padding[0] - padding[2]), 11))
    width = draw(st.integers(max(1, 4 - padding[1] - padding[3]), 17))
    shape = (draw(st.integers(1, 2)), height, width, draw(st.sampled_from([16, 32, 48])))
    epilogue = Epilogue(True, draw(st.booleans()))
    return Conv2D(shape, draw(st.sampled_from([16, 32, 48])), Window((3, 3), padding=padding), 1, epilogue)


@needs_avx2
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    operator=_convolutions(),
    ends=code_endings(),
    l2_bytes=st.sampled_from([1, 40_000, 2**20]),
    cores=st.sampled_from([1, 8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_is_exact(operator: Conv2D, ends: CodeEnding, l2_bytes: int, cores: int, seed: int) -> None:
    """Any map, odd sizes included, in blocks of one to all rows of tiles, with residuals and every end of the values."""
    request, constants, inputs = random_case(np.random.default_rng(seed), _request(operator))
    assert isinstance(constants, IntegerAnchorConstants)
    assert can_transform(request, VECTORS.words)
    _check(request, ends.of(constants), inputs, Processor(l2_bytes=l2_bytes, cores=cores))


@needs_avx2
@pytest.mark.parametrize("pattern", ["equal", "alternating", "corners"])
def test_extreme_sums_do_not_overflow(pattern: str) -> None:
    """The largest weights and codes in as many channels as are allowed, with the signs that each transform adds up."""
    channels = 912
    operator = Conv2D((1, 4, 4, channels), 16, Window((3, 3)))
    assert can_transform(_request(operator), 8)
    assert not can_transform(_request(Conv2D((1, 4, 4, 928), 16, Window((3, 3)))), 8)
    signs = {
        "equal": np.ones((3, 3)),
        "alternating": np.array([[1, -1, 1], [-1, 1, -1], [1, -1, 1]]),
        "corners": np.array([[1, 0, -1], [0, 0, 0], [-1, 0, 1]]),
    }[pattern]
    codes = np.broadcast_to(127 * signs, (1, 16, channels, 3, 3)).astype(np.int8).copy()
    codes[:, 1::2] *= -1
    multiplier = np.full((1, 16), 1e-7, np.float32)
    constants = IntegerAnchorConstants(
        codes, 0, multiplier, np.zeros(16, np.float32), Requantization(-128.0, 127.0, 128)
    )
    rows, columns = np.indices((4, 4))
    for bright in (np.ones((4, 4), bool), (rows + columns) % 2 == 0, rows % 3 == 0, rows % 4 < 2, columns % 2 == 1):
        image = np.broadcast_to(np.where(bright, 255, 0)[None, :, :, None], (1, 4, 4, channels)).astype(np.uint8)
        _check(_request(operator), constants, [image])


@needs_avx2
def test_writes_into_a_wider_buffer() -> None:
    """As part of a concatenation."""
    operator = Conv2D((1, 5, 6, 32), 32, Window((3, 3), padding=(1, 1, 1, 1)))
    request, constants, inputs = random_case(np.random.default_rng(0), _request(operator))
    placed = replace(request, placement=Placement(16, 64))
    kernel = winograd_kernel(placed, VECTORS, "avx2")
    module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    library = tvm.compile(module, target=tvm.target.Target(TARGETS["avx2"]), tir_pipeline=CPU_PIPELINE)
    output = tvm.runtime.tensor(np.full(placed.output_shape, 77, np.uint8))
    library["kernel"](
        *(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (*inputs, *kernel.pack(constants))), output
    )
    expected = np.full(placed.output_shape, 77, np.uint8)
    expected[..., 16:48] = numerics.evaluate(request, constants, inputs)
    np.testing.assert_array_equal(output.numpy(), expected)


def test_which_layers_are_computed_so() -> None:
    """3×3 layers at stride 1 on maps that tiles divide well, the larger and evener the fewer bits the weights have."""
    family = ANCHOR_FAMILIES["avx2"]
    padded = Window((3, 3), padding=(1, 1, 1, 1))
    large, wide, small, tiny = (_request(Conv2D((1, size, size, 64), 64, padded)) for size in (28, 14, 7, 3))
    uneven = replace(large, operator=Conv2D((1, 13, 13, 64), 64, padded))
    assert 2.2 < saved_products(Conv2D((1, 28, 28, 64), 64, padded), 8) < 2.25
    chosen = {
        "8 bits": wide,
        "7 bits": replace(wide, saturation_free_pairs=1),
        "6 bits": replace(wide, saturation_free_pairs=2),
        "4 bits": replace(large, saturation_free_pairs=8),
        "8 bits, odd map": small,
        "7 bits, odd map": replace(small, saturation_free_pairs=1),
        "7 bits, larger odd map": replace(uneven, saturation_free_pairs=1),
        "6 bits, larger odd map": replace(uneven, saturation_free_pairs=2),
        "8 bits, few tiles": tiny,
        "stride 2": replace(wide, operator=Conv2D((1, 14, 14, 64), 64, Window((3, 3), (2, 2), (1, 1, 1, 1)))),
        "1×1": replace(wide, operator=Conv2D((1, 14, 14, 64), 64, Window((1, 1)))),
        "grouped": replace(wide, operator=Conv2D((1, 14, 14, 64), 64, padded, 2)),
        "float output": replace(wide, output="float32"),
        "two points": replace(wide, weight_points=2),
    }
    names = {case: family.kernel(request).name for case, request in chosen.items()}
    assert [case for case, name in names.items() if "winograd" in name] == [
        "8 bits",
        "7 bits",
        "6 bits",
        "4 bits",
        "8 bits, odd map",
        "7 bits, larger odd map",
    ]
    assert family.tiles(wide) == ()
    with pytest.raises(KernelError, match="no choice of tiles"):
        family.kernel(wide, Tile(2, 2))


def test_blocks_of_tiles_cover_a_map() -> None:
    """Blocks that keep transformed codes and sums in the second-level cache; small ones where that is hardly more work."""
    geometry = WinogradGeometry(Conv2D((1, 56, 56, 64), 64, Window((3, 3), padding=(1, 1, 1, 1))), 8)
    assert geometry.tiles == (28, 28)
    assert geometry.block_rows == 2
    assert sum(run.count * run.pixels for run in geometry.runs) >= geometry.block_tiles == 56
    small = replace(geometry, conv=Conv2D((2, 32, 32, 16), 16, Window((3, 3), padding=(1, 1, 1, 1))))
    assert (small.block_rows, small.blocks) == (8, 4)
    whole = replace(geometry, conv=Conv2D((1, 14, 14, 256), 256, Window((3, 3), padding=(1, 1, 1, 1))))
    assert (whole.block_rows, whole.blocks) == (7, 1)
