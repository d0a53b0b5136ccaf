"""Convolutions and dense layers of every instruction set at hand against the arithmetic contract, bit for bit.

Protects what the project promises first: that a kernel computes exactly what the simulator and ``numerics`` say, for odd
sizes, tails, strides, dilation, groups, padding, all storages, several points and planes, and a fused residual.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.kernels.anchor_cases import (
    AT_HAND,
    CASES,
    FAMILIES,
    HOST,
    TARGETS,
    check,
    families,
    random_case,
    run_kernel,
    windows,
)
from tvm_hquant import numerics
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.convolution.patches import conv_of_patches
from tvm_hquant.kernels.convolution.template import conv2d_geometry
from tvm_hquant.kernels.instruction_sets import avx2, avx512_vnni
from tvm_hquant.kernels.interface import (
    FloatAnchorConstants,
    KernelRequest,
    Tile,
)
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES, families_for_target, select_kernel
from tvm_hquant.operators import Conv2D, Epilogue, Window


@pytest.mark.parametrize("family", AT_HAND)
@pytest.mark.parametrize("case", CASES)
def test_a8w8_is_exact(family: str, case: str) -> None:
    """Plain 8-bit layers with full-range weights, to codes."""
    check(family, KernelRequest(CASES[case], ("uint8",), "uint8", "int8"))


@pytest.mark.parametrize("family", AT_HAND)
@pytest.mark.parametrize("case", ["3x3 padded", "1x1", "grouped", "depthwise", "dense", "stem, three channels"])
@pytest.mark.parametrize(
    ("storage", "points", "output"), [("uint16", 1, "uint16"), ("uint16", 2, "float32"), ("uint8", 2, "uint16")]
)
def test_planes_and_points_are_exact(family: str, case: str, storage: str, points: int, output: str) -> None:
    """16-bit activations as two byte planes and weights of several points, in the contract's order of passes."""
    check(family, KernelRequest(CASES[case], (storage,), output, "int8", points))


@pytest.mark.parametrize("family", FAMILIES)
def test_words_of_rows_that_always_exist(family: str) -> None:
    """Above the map there is padding and below it none, so the compiler knows that the last rows of a word are there."""
    operator = Conv2D((1, 12, 9, 32), 32, Window((3, 1), padding=(1, 0, 0, 1)), groups=32)
    check(family, KernelRequest(operator, ("uint16",), "uint16", "int8"))


@pytest.mark.parametrize("family", AT_HAND)
@pytest.mark.parametrize("case", ["3x3 padded", "grouped, few channels", "depthwise", "dense"])
@pytest.mark.parametrize(("residual", "output"), [("uint8", "uint8"), ("uint16", "float32"), ("uint8", "uint16")])
def test_fused_residual_is_exact(family: str, case: str, residual: str, output: str) -> None:
    """The residual joins after the scaled sums and before the clamp."""
    operator = replace(CASES[case], epilogue=Epilogue(True, True))
    check(family, KernelRequest(operator, ("uint8", residual), output, "int8"))


@pytest.mark.parametrize("family", AT_HAND)
@pytest.mark.parametrize("case", CASES)
def test_float32_is_exact(family: str, case: str) -> None:
    """Fused multiply-adds in the contract's order give the same bits on every machine."""
    check(family, KernelRequest(CASES[case], ("float32",), "float32", "float32"))


@pytest.mark.parametrize("family", AT_HAND)
@pytest.mark.parametrize("case", ["3x3 padded", "1x1", "grouped", "depthwise", "dense", "few outputs"])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_sixteen_bit_floats_are_exact(family: str, case: str, storage: str) -> None:
    """16-bit storage with float32 sums, rounded once; a fused residual is widened and added."""
    operator = replace(CASES[case], epilogue=Epilogue(True, True))
    check(family, KernelRequest(operator, (storage, "float32"), storage, storage))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("lower", [0.0, -2.0])
@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (32, 32)])
def test_padding_that_is_left_out_changes_no_bit(family, storage, lower, channels, groups) -> None:
    """Behind a clamp at 0 finite weights make padding neutral; elsewhere it turns sums of −0 into +0, and kernels have it.

    Sums of −0 come from products too small for float32. Infinite and NaN activations stay where they are.
    """
    window = Window((3, 3), padding=(1, 1, 1, 1))
    operator = Conv2D((1, 9, 15, channels), 32, window, groups, Epilogue(has_bias=True, lower=lower))
    request = KernelRequest(operator, (storage,), "float32", storage)
    rng = np.random.default_rng(0)
    request, constants, inputs = random_case(rng, request)
    x = numerics.widen(inputs[0], storage)
    x[rng.random(x.shape) < 0.9] *= np.float32(1e-30)
    x[0, 4, 0, 0], x[0, 0, 7, 1] = np.nan, np.inf
    weights = numerics.widen(constants.weights, storage) * np.float32(1e-25)
    constants = FloatAnchorConstants(numerics.narrow(weights, storage), constants.bias * 0, lower, 3.5)
    inputs = [numerics.narrow(x, storage)]
    kernel = select_kernel(families_for_target((family,)), request)
    actual = run_kernel(kernel, constants, inputs, TARGETS[family])
    expected = numerics.evaluate(request, constants, inputs)
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32), err_msg=kernel.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_infinite_weights_meet_padding(family: str) -> None:
    """∞ · 0 is NaN: padding takes part unless the weights prove to be finite."""
    operator = replace(CASES["3x3 padded"], epilogue=Epilogue(lower=0.0))
    request, constants, inputs = random_case(
        np.random.default_rng(0), KernelRequest(operator, ("float32",), "float32", "float32")
    )
    constants.weights[5, 3, 0, 0] = np.inf
    request = replace(request, finite_weights=False)
    expected = numerics.evaluate(request, constants, inputs)
    kernel = select_kernel(families_for_target((family,)), request)
    actual = run_kernel(kernel, constants, inputs, TARGETS[family])
    np.testing.assert_array_equal(actual, expected)
    # NaNs, which the clamp turned into its lower bound.
    assert not expected[0, 0, :, 5].any()


@pytest.mark.parametrize("family", families("avx512_vnni", "avx_vnni", "avx2", "portable"))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 19)),
    groups=st.integers(1, 2),
    channels=st.tuples(st.sampled_from([4, 8, 12]), st.integers(1, 37)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(0, 4)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    passes=st.sampled_from([("uint8", 1), ("uint8", 2), ("uint16", 1)]),
    limit=st.sampled_from([127, 7]),
    seed=st.integers(0, 2**31),
)
def test_codes_without_padding_are_exact(
    family, size, groups, channels, kernel, strides, padding, dilation, passes, limit, seed
) -> None:
    """Sums start with what the zero point adds inside the map, for windows that reach beyond it on any sides, or miss it."""
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    assume(all(size[1 + a] + padding[a] + padding[a + 2] >= extents[a] for a in (0, 1)))
    window = Window(kernel, strides, padding, dilation)
    operator = Conv2D((*size, channels[0] * groups), channels[1] * groups, window, groups)
    storage, points = passes
    check(family, KernelRequest(operator, (storage,), storage, "int8", points), seed, limit)


def test_where_codes_need_no_padding() -> None:
    """Activations are read where they are, unless steps take several positions of the window or come in an order of theirs.

    Nor may sums over a part of the window be beyond what the contract's check of weights covers.
    """
    padded = Window((3, 3), padding=(1, 1, 1, 1))
    vnni, pairs, chains = avx512_vnni.VnniDot(), avx2.ByteDot(1), avx2.ByteDot(16)
    for channels, dot, skips in (
        (64, vnni, True),
        (64, chains, True),
        (64, pairs, False),
        (6, vnni, False),
        (3, vnni, False),
        (4096, vnni, False),
    ):
        request = KernelRequest(Conv2D((1, 7, 7, channels), 16, padded), ("uint8",), "uint8", "int8")
        geometry = conv2d_geometry(request, dot)
        assert geometry.skips_padding is skips
        assert (geometry.needs_copy("uint8") or geometry.patches is not None) is not skips
        assert len(geometry.window_parts) == (9 if skips else 1)


@pytest.mark.parametrize("family", families("avx_vnni"))
@pytest.mark.parametrize("case", ["3x3 padded", "grouped", "depthwise", "dense", "stem, three channels"])
def test_family_of_codes_is_exact(family: str, case: str) -> None:
    """Dot products on 256-bit vectors, with a fused residual where the layer can have one."""
    check(family, KernelRequest(CASES[case], ("uint8",), "uint8", "int8"))


@pytest.mark.parametrize("family", families("avx512_bf16"))
@pytest.mark.parametrize("case", ["3x3 padded", "1x1 strided", "grouped", "dense, rows", "few outputs"])
@pytest.mark.parametrize("output", ["bfloat16", "float32"])
def test_bfloat16_unit_is_exact(family: str, case: str, output: str) -> None:
    """vdpbf16ps with exchanged halves rounds as fused multiply-adds in the contract's order do."""
    operator = replace(CASES[case], epilogue=Epilogue(True, True))
    check(family, KernelRequest(operator, ("bfloat16", "float32"), output, "bfloat16"))


@pytest.mark.parametrize("family", families("avx512_bf16"))
@pytest.mark.parametrize("case", ["stem, three channels", "asymmetric, dilated"])
def test_bfloat16_unit_fills_up_odd_channels(family: str, case: str) -> None:
    """Behind a clamp at 0 one more channel of zeros changes nothing."""
    operator = replace(CASES[case], epilogue=Epilogue(has_bias=True, lower=0.0))
    kernel = check(family, KernelRequest(operator, ("bfloat16",), "bfloat16", "bfloat16"))
    assert "vdpbf16ps" in kernel.name


@pytest.mark.parametrize("family", families("avx512_bf16"))
def test_bfloat16_unit_leaves_other_layers(family: str) -> None:
    """An odd number of channels with no clamp, depthwise layers and other storages are the next family's."""
    (found,) = families_for_target((family,))[:1]
    for case, storage in (("stem, three channels", "bfloat16"), ("depthwise", "bfloat16"), ("1x1", "float32")):
        assert found.kernel(KernelRequest(CASES[case], (storage,), storage, storage)) is None


@pytest.mark.skipif("avx2" not in HOST, reason="this CPU has no AVX2")
@pytest.mark.parametrize(("limit", "chain"), [(64, 1), (31, 2), (15, 4), (7, 8), (3, 16)])
def test_narrow_weights_take_fewer_instructions(limit: int, chain: int) -> None:
    """What weights prove picks the chain of vpmaddubsw, and the values stay the same."""
    operator = Conv2D((1, 5, 5, 64), 16, Window((3, 3), padding=(1, 1, 1, 1)))
    kernel = check("avx2", KernelRequest(operator, ("uint8",), "uint8", "int8"), weight_limit=limit)
    assert kernel.request.saturation_free_pairs >= chain
    assert "vpmaddubsw" in kernel.name


@pytest.mark.skipif("avx2" not in HOST, reason="this CPU has no AVX2")
@pytest.mark.parametrize("channels", [12, 17, 24, 34, 35, 44, 68])
@pytest.mark.parametrize("limit", [7, 64])
def test_channels_left_over_by_chains_are_exact(channels: int, limit: int) -> None:
    """What a chain leaves makes shorter ones; one or two channels left are a step that reads others once more."""
    operator = Conv2D((1, 3, 4, 2 * channels), 26, Window((1, 1)), groups=2)
    kernel = check("avx2", KernelRequest(operator, ("uint8",), "uint8", "int8"), weight_limit=limit)
    assert ("chain" in kernel.name) == (limit == 7)


@pytest.mark.skipif("avx2" not in HOST, reason="this CPU has no AVX2")
@pytest.mark.parametrize(("channels", "chain"), [(96, 24), (128, 32), (144, 16)])
def test_one_chain_takes_all_steps_of_a_pixel(channels: int, chain: int) -> None:
    """Where the weights let it and it is not too long; several chains of a pixel have 16 steps at most."""
    operator = Conv2D((1, 3, 4, channels), 16, Window((1, 1)))
    kernel = check("avx2", KernelRequest(operator, ("uint8",), "uint8", "int8"), weight_limit=1)
    assert f"chain {chain}]" in kernel.name


def test_odd_channels_need_no_copy() -> None:
    """Steps of dot products that may split pixels read groups of 34 channels, and kernel rows of 3 · 7, where they are.

    Where what the weights prove goes by the channels of a pixel, activations are filled up to whole steps if three channels
    are left, or if a step would have to go on into the next pixel.
    """
    grouped, three = (
        KernelRequest(Conv2D((1, 4, 4, 4 * c), 136, Window((1, 1)), groups=4), ("uint8",), "uint8", "int8")
        for c in (34, 35)
    )
    stem = KernelRequest(Conv2D((1, 21, 21, 3), 16, Window((7, 7), (2, 2))), ("uint8",), "uint8", "int8")
    vnni, proven = avx512_vnni.VnniDot(), avx2.ByteDot(1)
    for request, steps, is_copied in ((grouped, 9, False), (three, 9, True), (stem, 6, True)):
        geometry = conv2d_geometry(request, vnni)
        assert not geometry.needs_copy("uint8")
        assert geometry.steps == steps
        assert conv2d_geometry(request, proven).needs_copy("uint8") is is_copied


@pytest.mark.parametrize("family", families("avx512_vnni", "avx_vnni", "avx2"))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 2), st.integers(5, 9), st.integers(7, 19)),
    channels=st.tuples(st.integers(1, 4), st.integers(8, 35)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    limit=st.sampled_from([127, 64, 7]),
    seed=st.integers(0, 2**31),
)
def test_windows_of_few_channels_are_exact(family, size, channels, kernel, strides, padding, limit, seed) -> None:
    """Patches of any shape, beside the last pixels of rows and images too, and what weights prove in the order of a patch."""
    operator = Conv2D((*size, channels[0]), channels[1], Window(kernel, strides, padding))
    check(family, KernelRequest(operator, ("uint8",), "uint8", "int8"), seed, limit)


def test_first_layers_take_patches() -> None:
    """3×3 over three channels: seven steps of four products in place of nine, but no patches where few steps are saved, or so
    few outputs are made of a patch that copying it takes longer."""
    stem = CASES["stem, three channels"]
    request = KernelRequest(replace(stem, out_channels=32), ("uint8",), "uint8", "int8")
    for dot in (avx512_vnni.VnniDot(), avx2.ByteDot(1)):
        geometry = conv2d_geometry(request, dot)
        assert (geometry.patches, geometry.steps) == (request.operator, 7)
    assert conv2d_geometry(request, avx2.WordDot()).patches is None
    assert conv2d_geometry(replace(request, operator=stem), avx512_vnni.VnniDot()).patches is None
    seven = Conv2D((1, 224, 224, 3), 64, Window((7, 7), (2, 2), (3, 3, 3, 3)))
    for dot in (avx512_vnni.VnniDot(), avx2.ByteDot(1)):
        assert conv2d_geometry(replace(request, operator=seven), dot).steps == 37


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_of_a_few_rows_exist_at_a_time(family: str) -> None:
    """A large map goes through little memory, two output rows of 82 here, in both images and beside their borders."""
    conv = Conv2D((2, 82, 180, 3), 32, Window((3, 3), (2, 2), (1, 1, 0, 0)))
    assert conv_of_patches(conv).input_shape == (1, 41, 180, 27)
    check(family, KernelRequest(conv, ("uint8",), "uint8", "int8"))


@pytest.mark.skipif("avx2" not in HOST, reason="this CPU has no AVX2")
def test_every_tile_computes_the_same() -> None:
    """A family lists tiles of a layer, the model's own first; kernels with others give the same bits; no other is built."""
    family = ANCHOR_FAMILIES["avx2"]
    request = KernelRequest(CASES["3x3 padded"], ("uint8",), "uint8", "int8")
    request, constants, inputs = random_case(np.random.default_rng(0), request)
    tiles = family.tiles(request)
    assert len(set(tiles)) == len(tiles) > 3
    model = family.kernel(request)
    assert model is not None
    assert f" {tiles[0]}" in model.name
    expected = numerics.evaluate(request, constants, inputs)
    for tile in (tiles[1], tiles[-1]):
        kernel = family.kernel(request, tile)
        assert kernel is not None
        np.testing.assert_array_equal(run_kernel(kernel, constants, inputs, TARGETS["avx2"]), expected, str(tile))
    with pytest.raises(KernelError, match="no tile 99x1"):
        family.kernel(request, Tile(99, 1))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 11), st.integers(1, 37)),
    window=windows,
    storage=st.sampled_from(["uint8", "uint16", "float32"]),
    lower=st.sampled_from([0.0, -math.inf]),
    seed=st.integers(0, 2**31),
)
def test_random_shapes_are_exact(family, size, groups, channels, window, storage, lower, seed) -> None:
    """Any window, any number of channels per group; with and without a clamp at 0."""
    epilogue = Epilogue(lower=lower)
    operator = Conv2D((1, *size, channels[0] * groups), channels[1] * groups, window, groups, epilogue)
    is_float = storage == "float32"
    request = KernelRequest(operator, (storage,), storage, "float32" if is_float else "int8")
    check(family, request, seed)
