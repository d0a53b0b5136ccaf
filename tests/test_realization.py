"""Where arithmetic meets a layer: protects which kernel is asked for, with which constants, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant import numerics
from tvm_hquant.errors import PrecisionError
from tvm_hquant.kernels.convolution.saturation import centred_products, saturation_free_pairs
from tvm_hquant.kernels.epilogues.proven_endings import proven_ending
from tvm_hquant.kernels.interface import (
    DequantizeConstants,
    FillConstants,
    FloatAnchorConstants,
    FloatElementwiseConstants,
    IntegerAnchorConstants,
    IntegerElementwiseConstants,
    KernelRequest,
    NoConstants,
    ProvenEnding,
    QuantizeConstants,
    TableConstants,
)
from tvm_hquant.layers import Layer
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    Conv2D,
    Convert,
    Dense,
    Epilogue,
    MaxPool2D,
    Movement,
    Operator,
    Unary,
    Window,
)
from tvm_hquant.precision import A8W8, BFLOAT16, FLOAT16, FLOAT32, parse_precision
from tvm_hquant.quantized_weights import QuantizedWeights, quantize_layer_weights
from tvm_hquant.realization import realize_conversion, realize_layer
from tvm_hquant.tensor_format import FLOAT32_FORMAT, TensorFormat

Array = npt.NDArray[Any]
BYTE = TensorFormat("uint8", 0.5, 3, 0, 255)
SIGNED = TensorFormat("int8", 0.25, 0, -128, 127)
WIDE = TensorFormat("uint16", 0.125, 300, 0, 65535)
HALF = TensorFormat("float16")
WITH_BIAS = Epilogue(has_bias=True)


def convolution(weights: Array, epilogue: Epilogue = WITH_BIAS, size: int = 4) -> Layer:
    """A convolution called ``conv`` with the given weights [out, in, kh, kw] and a bias of 1, 2, 3…"""
    out_channels, in_channels, *kernel = weights.shape
    window = Window((kernel[0], kernel[1]))
    operator = Conv2D((1, size, size, in_channels), out_channels, window, 1, epilogue)
    bias = np.arange(1, out_channels + 1, dtype=np.float32)
    return Layer("conv", "conv", operator, ("x",), np.asarray(weights, np.float32), bias)


def random_convolution(seed: int = 0) -> Layer:
    """A 3×3 convolution with random weights."""
    return convolution(np.random.default_rng(seed).normal(size=(4, 2, 3, 3)))


@pytest.mark.parametrize(
    ("name", "storage", "points"),
    [
        ("a8w8", BYTE, 1), ("int8", SIGNED, 1), ("a8w4", BYTE, 1), ("a16w8", WIDE, 1), ("a16w16", WIDE, 2),
        ("a8w12", BYTE, 2), ("a12w9", WIDE, 2),
    ],
)  # fmt: skip
def test_integer_layer_asks_for_an_integer_kernel(name: str, storage: TensorFormat, points: int) -> None:
    """Storages of all tensors and the number of points are the whole request: no values in it."""
    layer = random_convolution()
    precision = parse_precision(name)
    codes = quantize_layer_weights(layer, precision)
    request, constants = realize_layer(layer, precision, [storage], BYTE, codes)
    proven = (request.saturation_free_pairs, request.centred_products, False, request.ending)
    assert request == KernelRequest(layer.operator, (storage.storage,), "uint8", "int8", points, *proven)
    assert isinstance(constants, IntegerAnchorConstants)
    np.testing.assert_array_equal(constants.weight_codes, codes.codes)
    assert constants.input_zero_point == storage.storage_zero_point
    expected = np.stack(
        [(np.float64(storage.scale) * s / np.float64(BYTE.scale)).astype(np.float32) for s in codes.scales]
    )
    np.testing.assert_array_equal(constants.multiplier, expected)
    np.testing.assert_array_equal(constants.offset, np.array([2, 4, 6, 8], np.float32))


def test_request_says_what_narrow_weights_prove() -> None:
    """What makes narrow weights fast on plain AVX2: how many pairs of products surely fit int16 stands in the request."""
    layer = convolution(np.random.default_rng(0).normal(size=(4, 32, 3, 3)))
    proofs = []
    for bits in range(8, 1, -1):
        precision = parse_precision(f"a8w{bits}")
        codes = quantize_layer_weights(layer, precision)
        request, _ = realize_layer(layer, precision, [BYTE], BYTE, codes)
        assert request.saturation_free_pairs == saturation_free_pairs(codes.codes)
        assert request.centred_products == centred_products(codes.codes)
        proofs.append(request.saturation_free_pairs)
    assert proofs == sorted(proofs), "fewer bits prove at least as much"
    assert proofs[1] >= 1, "two products of 7-bit weights always fit"
    assert proofs[-1] > proofs[1]
    halves = parse_precision("a8w12"), parse_precision("a8w6")
    wide, narrow = (realize_layer(layer, p, [BYTE], BYTE, quantize_layer_weights(layer, p))[0] for p in halves)
    assert wide.saturation_free_pairs >= 2, "two points of 6 bits are as fast as one, each"
    assert narrow.saturation_free_pairs >= 2


def test_request_says_what_constants_prove_of_the_clamp() -> None:
    """What saves most of the clamp on x86, where activations and outputs are bytes; nothing is said of others."""
    layer, precision = random_convolution(), A8W8
    codes = quantize_layer_weights(layer, precision)
    request, constants = realize_layer(layer, precision, [BYTE], BYTE, codes)
    assert isinstance(constants, IntegerAnchorConstants)
    assert request.ending == proven_ending(constants)
    assert request.ending.fits_int32
    for inputs, output in (([WIDE], BYTE), ([BYTE], WIDE), ([BYTE], FLOAT32_FORMAT)):
        assert realize_layer(layer, precision, inputs, output, codes)[0].ending == ProvenEnding()


def test_sums_that_could_leave_int32_are_refused() -> None:
    """The contract forbids overflow: a layer too deep for int32 says so, with its name, instead of wrapping around."""
    deep = 70_000
    layer = Layer(
        "deep", "deep", Dense(1, deep, 2), ("x",), np.ones((2, deep, 1, 1), np.float32), np.zeros(2, np.float32)
    )
    codes = quantize_layer_weights(layer, A8W8)
    assert 255 * 127 * deep > 2**31
    with pytest.raises(PrecisionError, match="layer deep"):
        realize_layer(layer, A8W8, [BYTE], BYTE, codes)
    shallow = Layer("ok", "ok", Dense(1, 100, 2), ("x",), np.ones((2, 100, 1, 1), np.float32), np.zeros(2, np.float32))
    realize_layer(shallow, A8W8, [BYTE], BYTE, quantize_layer_weights(shallow, A8W8))


def test_float_output_is_not_rounded() -> None:
    """A layer with a float reader ends in real numbers: scale 1, no zero point, only the activation's own clamp."""
    layer = convolution(np.ones((2, 2, 1, 1)), Epilogue(True, False, 0.0, 6.0))
    _, constants = realize_layer(layer, A8W8, [BYTE], FLOAT32_FORMAT, quantize_layer_weights(layer, A8W8))
    assert isinstance(constants, IntegerAnchorConstants)
    assert (constants.requantization.lower, constants.requantization.upper) == (0.0, 6.0)
    assert constants.requantization.zero_point == 0
    np.testing.assert_array_equal(constants.offset, np.array([1, 2], np.float32))


def test_residual_brings_its_own_scale() -> None:
    """The fused addition reads codes of another tensor: its multiplier is the ratio of scales."""
    layer = convolution(np.ones((2, 2, 1, 1)), Epilogue(False, True))
    request, constants = realize_layer(layer, A8W8, [BYTE, WIDE], SIGNED, quantize_layer_weights(layer, A8W8))
    assert request.inputs == ("uint8", "uint16")
    assert isinstance(constants, IntegerAnchorConstants)
    assert constants.residual_multiplier == np.float32(WIDE.scale / SIGNED.scale)
    assert constants.residual_zero_point == WIDE.zero_point
    assert constants.requantization.zero_point == 128, "int8 codes are stored larger by 128"


@pytest.mark.parametrize(
    ("precision", "storage", "dtype"),
    [(FLOAT32, "float32", np.float32), (FLOAT16, "float16", np.float16), (BFLOAT16, "bfloat16", np.uint16)],
)
def test_float_layers_keep_weights_in_their_own_storage(precision: Any, storage: str, dtype: Any) -> None:
    """16-bit layers store 16-bit weights; bfloat16 travels as its bit pattern. The bias stays float32."""
    layer = random_convolution()
    request, constants = realize_layer(layer, precision, [TensorFormat(storage)], FLOAT32_FORMAT, None)  # type: ignore[arg-type]
    assert (request.weights, request.inputs, request.output) == (storage, (storage,), "float32")
    assert isinstance(constants, FloatAnchorConstants)
    assert constants.weights.dtype == dtype
    assert constants.bias.dtype == np.float32
    assert layer.weights is not None
    if storage == "bfloat16":
        np.testing.assert_array_equal(
            constants.weights.view(ml_dtypes.bfloat16), layer.weights.astype(ml_dtypes.bfloat16)
        )
    else:
        np.testing.assert_array_equal(constants.weights, layer.weights.astype(dtype))
    assert (constants.lower, constants.upper) == (-math.inf, math.inf)


def test_weight_that_float16_cannot_hold_is_refused() -> None:
    """Infinity in a kernel's weights would be silent ruin."""
    with pytest.raises(PrecisionError, match="layer conv: its largest weight 70000 does not fit float16; use bfloat16"):
        realize_layer(convolution(np.full((1, 1, 1, 1), 70000.0)), FLOAT16, [HALF], HALF, None)


@given(st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_weight_only_layers_are_float_layers_with_rounded_weights(bits: int, seed: int) -> None:
    """w2 … w8 change the weights and nothing else: codes are made real again at compile time."""
    layer = random_convolution(seed)
    precision = parse_precision(f"w{bits}")
    codes = quantize_layer_weights(layer, precision)
    request, constants = realize_layer(layer, precision, [FLOAT32_FORMAT], FLOAT32_FORMAT, codes)
    assert request.weights == "float32"
    assert isinstance(constants, FloatAnchorConstants)
    for channel, scale in zip(constants.weights, codes.scales[0], strict=True):
        assert len(np.unique(channel)) <= 2**bits
        np.testing.assert_array_equal(channel, np.rint(channel / scale).astype(np.float32) * scale)


def test_corrected_bias_is_used() -> None:
    """A method may correct the bias together with the codes; the layer's own would undo that."""
    layer = random_convolution()
    plain = quantize_layer_weights(layer, A8W8)
    corrected = QuantizedWeights(plain.codes, plain.scales, plain.bias + np.float32(0.5))
    _, constants = realize_layer(layer, A8W8, [BYTE], BYTE, corrected)
    assert isinstance(constants, IntegerAnchorConstants)
    np.testing.assert_array_equal(constants.offset, np.array([3, 5, 7, 9], np.float32))


def test_layers_without_weights() -> None:
    """One row for each kind of layer: what its kernel is asked for in codes and in floats."""
    shape = (1, 4, 4, 2)
    pool = AveragePool2D(shape, Window((2, 2), (2, 2)))
    cases: list[tuple[Operator, list[TensorFormat], TensorFormat, type]] = [
        (Add(shape, 0.0), [BYTE, SIGNED], WIDE, IntegerElementwiseConstants),
        (Add(shape, 0.0), [FLOAT32_FORMAT] * 2, FLOAT32_FORMAT, FloatElementwiseConstants),
        (pool, [BYTE], BYTE, IntegerElementwiseConstants),
        (pool, [HALF], HALF, NoConstants),
        (MaxPool2D(shape, Window((2, 2))), [BYTE], BYTE, NoConstants),
        (Unary(shape, "sigmoid"), [BYTE], WIDE, TableConstants),
        (Unary(shape, "sigmoid"), [FLOAT32_FORMAT], FLOAT32_FORMAT, FloatElementwiseConstants),
        (Unary(shape, "clip", (0.0, 6.0)), [WIDE], WIDE, IntegerElementwiseConstants),
        (Movement("pad", shape, (1, 6, 6, 2), (0, 0, 1, 1, 1, 1, 0, 0), -1.0), [BYTE], BYTE, FillConstants),
        (Movement("permute_dims", shape, shape, (0, 2, 1, 3)), [WIDE], WIDE, NoConstants),
    ]
    for operator, inputs, output, kind in cases:
        layer = Layer("layer", "layer", operator, ("x",) * len(inputs))
        precision = A8W8 if inputs[0].is_integer else FLOAT32
        request, constants = realize_layer(layer, precision, inputs, output, None)
        assert request == KernelRequest(operator, tuple(f.storage for f in inputs), output.storage)
        assert type(constants) is kind, operator


@pytest.mark.parametrize(
    ("output", "fill", "stored"),
    [
        (BYTE, -1.0, 1.0),
        (BYTE, -9.0, 0.0),
        (SIGNED, -1.0, 124.0),
        (SIGNED, 99.0, 255.0),
        (WIDE, 0.0, 300.0),
        (HALF, 2.5, 2.5),
    ],
)
def test_padding_is_filled_with_the_stored_code(output: TensorFormat, fill: float, stored: float) -> None:
    """A real value is put in as the code that stands for it, clamped, in the way codes are stored."""
    operator = Movement("pad", (1, 2), (1, 4), (0, 0, 1, 1), fill)
    _, constants = realize_layer(Layer("pad", "pad", operator, ("x",)), A8W8, [output], output, None)
    assert isinstance(constants, FillConstants)
    assert constants.fill == stored


def test_functions_have_no_table_of_16_bit_codes() -> None:
    """65536 entries are not a table: the layer is named and the way out said."""
    layer = Layer("swish", "swish", Unary((1, 4), "silu"), ("x",))
    with pytest.raises(PrecisionError, match="layer swish: silu has no kernel for 16-bit codes; keep it in float32"):
        realize_layer(layer, parse_precision("a16w8"), [WIDE], WIDE, None)


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        (FLOAT32_FORMAT, BYTE, QuantizeConstants), (HALF, SIGNED, QuantizeConstants),
        (WIDE, FLOAT32_FORMAT, DequantizeConstants), (BYTE, HALF, DequantizeConstants),
        (WIDE, BYTE, IntegerElementwiseConstants), (BYTE, SIGNED, IntegerElementwiseConstants),
        (FLOAT32_FORMAT, HALF, NoConstants), (TensorFormat("bfloat16"), HALF, NoConstants),
    ],
)  # fmt: skip
def test_conversions(source: TensorFormat, target: TensorFormat, kind: type) -> None:
    """Integer to integer is one requantize, never a dequantize and a quantize; evaluated, it inverts where it can."""
    request, constants = realize_conversion((1, 8), source, target)
    assert request == KernelRequest(Convert((1, 8)), (source.storage,), target.storage)
    assert type(constants) is kind


@given(st.sampled_from([BYTE, SIGNED, WIDE]), st.integers(0, 65535))
@settings(max_examples=40, deadline=None)
def test_quantize_undoes_dequantize(code_format: TensorFormat, number: int) -> None:
    """Real values of codes are quantized to the same codes again: a pair of conversions loses nothing."""
    code = code_format.q_min + number % (code_format.q_max - code_format.q_min + 1)
    dtype = "uint16" if code_format.storage == "uint16" else "uint8"
    stored = np.full((1, 1), code + code_format.storage_offset, dtype)
    request, constants = realize_conversion((1, 1), code_format, FLOAT32_FORMAT)
    real = numerics.evaluate(request, constants, [stored])
    assert real[0, 0] == np.float32(code - code_format.zero_point) * np.float32(code_format.scale)
    request, constants = realize_conversion((1, 1), FLOAT32_FORMAT, code_format)
    np.testing.assert_array_equal(numerics.evaluate(request, constants, [real]), stored)
