"""Integer layers of the oracle against plain loops in Python integers and rational arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from exact_arithmetic import convolutions, exact_fma, float32_array, window_terms
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant import numerics
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.interface import (
    IntegerAnchorConstants,
    IntegerElementwiseConstants,
    KernelRequest,
    NoConstants,
    Requantization,
)
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    BatchMatmul,
    Conv2D,
    Convert,
    Dense,
    Epilogue,
    MaxPool2D,
    Multiply,
    Unary,
    Window,
)
from tvm_hquant.tensor_format import FLOAT32_FORMAT, Storage, TensorFormat

Array = npt.NDArray[Any]
SEEDS = st.integers(0, 2**32 - 1)


def slow_requantize(v: float, end: Requantization, storage: Storage) -> float:
    v = end.lower if not v > end.lower else v
    v = end.upper if not v < end.upper else v
    return v if storage == "float32" else round(v) + end.zero_point


def slow_convolution(
    operator: Conv2D, request: KernelRequest, constants: IntegerAnchorConstants, inputs: list[Array]
) -> Array:
    """Python integers for the sums; points ascending, within each the low plane, then the high one."""
    x, output = inputs[0], np.zeros(operator.output_shape, request.output)
    wide = request.inputs[0] == "uint16"
    for index in np.ndindex(output.shape):
        v = float(constants.offset[index[-1]])
        for codes, multipliers in zip(constants.weight_codes, constants.multiplier, strict=True):
            for shift, factor in ((0, 1), (8, 256)) if wide else ((0, 1),):
                zero_point = constants.input_zero_point >> shift & 255
                acc = sum(
                    ((int(x[i]) >> shift & 255) - zero_point) * int(codes[w])
                    for i, w in window_terms(operator, *index)
                    if i is not None
                )
                v = exact_fma(float(np.float32(acc)), float(multipliers[index[-1]]) * factor, v)
        if operator.epilogue.has_residual:
            r = int(inputs[1][index]) - constants.residual_zero_point
            v = exact_fma(r, constants.residual_multiplier, v)
        output[index] = slow_requantize(v, constants.requantization, request.output)
    return output


def random_format(rng: np.random.Generator, dtype: str) -> TensorFormat:
    scale = float(np.float32(rng.uniform(0.01, 0.1)))
    if dtype == "int8":
        return TensorFormat("int8", scale, 0, -128, 127)
    if dtype == "uint16":
        return TensorFormat("uint16", scale / 128, int(rng.integers(0, 65536)), 0, 65535)
    return TensorFormat("uint8", scale, int(rng.integers(0, 256)), 0, 255) if dtype == "uint8" else FLOAT32_FORMAT


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], storage: Storage) -> Array:
    return rng.integers(0, np.iinfo(storage).max + 1, shape).astype(storage)


CODES = st.sampled_from(["uint8", "int8", "uint16"])


@settings(max_examples=60, deadline=None)
@given(
    convolutions(), CODES, st.sampled_from(["uint8", "int8", "uint16", "float32"]),
    st.sampled_from([None, "uint8", "uint16"]),
    st.lists(st.sampled_from([8, 5, 4]), min_size=1, max_size=3), SEEDS,
)  # fmt: skip
def test_convolution_equals_plain_loops(
    operator: Conv2D, source: str, target: str, residual: str | None, widths: list[int], seed: int
) -> None:
    """Every combination of storages, points, groups, strides, dilation and padding: equal to the last bit."""
    rng = np.random.default_rng(seed)
    epilogue = Epilogue(True, residual is not None, operator.epilogue.lower, operator.epilogue.upper)
    operator = Conv2D(operator.input_shape, operator.out_channels, operator.window, operator.groups, epilogue)
    weights = rng.normal(size=operator.weight_shape).astype(np.float32)
    codes, scales = numerics.weight_points(weights, widths)
    source_format, target_format = random_format(rng, source), random_format(rng, target)
    residual_format = None if residual is None else random_format(rng, residual)
    constants = numerics.integer_anchor_constants(
        codes, scales, rng.normal(size=operator.out_channels), source_format, target_format, epilogue, residual_format
    )
    formats = [source_format] if residual_format is None else [source_format, residual_format]
    shapes = [operator.input_shape, operator.output_shape]
    request = KernelRequest(operator, tuple(f.storage for f in formats), target_format.storage, "int8", len(codes))
    inputs = [random_codes(rng, shape, f.storage) for shape, f in zip(shapes, formats, strict=False)]
    ours = numerics.evaluate(request, constants, inputs)
    expected = slow_convolution(operator, request, constants, inputs)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


def test_long_sums_stay_exact() -> None:
    """Sums beyond 2²⁴ are not exact in float32 matrix products: the oracle must notice and go on in float64."""
    depth = 4096
    operator = Dense(40, depth, 30)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, depth)).astype(np.uint8)
    codes = rng.integers(-127, 128, (1, 30, depth)).astype(np.int8)
    codes[..., ::2] = 127
    constants = IntegerAnchorConstants(
        codes, 0, np.ones((1, 30), np.float32), np.zeros(30, np.float32), Requantization(-math.inf, math.inf, 0)
    )
    ours = numerics.evaluate(KernelRequest(operator, ("uint8",), "float32", "int8"), constants, [x])
    sums = x.astype(np.int64) @ codes[0].astype(np.int64).T
    assert sums.min() > 2**24
    np.testing.assert_array_equal(ours, sums.astype(np.float32))
    in_float32 = np.add.accumulate(x[:1].astype(np.float32) * codes[0].astype(np.float32), axis=1, dtype=np.float32)
    assert np.any(in_float32[:, -1] != ours[0])


def test_padding_has_the_value_zero() -> None:
    """Padding stands for the real 0, whatever the zero point: an input of zeros gives the bias everywhere."""
    operator = Conv2D((1, 3, 3, 2), 4, Window((3, 3), padding=(1, 0, 2, 1)))
    weights = np.random.default_rng(0).normal(size=operator.weight_shape).astype(np.float32)
    codes, scales = numerics.quantize_weights(weights, 8)
    source = TensorFormat("uint8", 0.5, 77, 0, 255)
    bias = float32_array([1.0, -2.0, 0.25, 3.0])
    constants = numerics.integer_anchor_constants(
        codes[None], scales[None], bias, source, FLOAT32_FORMAT, Epilogue(True)
    )
    x = np.full(operator.input_shape, 77, np.uint8)
    ours = numerics.evaluate(KernelRequest(operator, ("uint8",), "float32", "int8"), constants, [x])
    np.testing.assert_array_equal(ours, np.broadcast_to(bias, operator.output_shape))


def test_shifted_codes_give_the_same_reals() -> None:
    """int8 codes, and the uint8 codes larger by 128 that stand for them, are one plan with one result."""
    rng = np.random.default_rng(3)
    operator = Dense(5, 12, 7, Epilogue(True, False, 0.0))
    codes, scales = numerics.quantize_weights(rng.normal(size=operator.weight_shape), 8)
    bias = rng.normal(size=7)
    signed, target = TensorFormat("int8", 0.0625, 0, -128, 127), TensorFormat("int8", 0.125, 0, -128, 127)
    shifted, shifted_target = (TensorFormat("uint8", f.scale, 128, 0, 255) for f in (signed, target))
    request = KernelRequest(operator, ("uint8",), "uint8", "int8")
    x = random_codes(rng, (5, 12), "uint8")
    results = [
        numerics.evaluate(
            request, numerics.integer_anchor_constants(codes[None], scales[None], bias, a, b, operator.epilogue), [x]
        )
        for a, b in ((signed, target), (shifted, shifted_target))
    ]
    np.testing.assert_array_equal(results[0], results[1])


def chosen_epilogues(count: int = 4000) -> tuple[Array, Array, Array, Array, Array]:
    """(w, m, r, m_r, c) for which the epilogue ends close to the middle between two codes."""
    rng = np.random.default_rng(7)
    w = rng.integers(1, 128, count).astype(np.int8)
    m, m_r = (rng.uniform(*limits, count).astype(np.float32) for limits in ((1e-3, 4e-3), (0.2, 0.9)))
    r = rng.integers(0, 256, count)
    middle = rng.integers(20, 200, count) + 0.5
    c = (middle - 255.0 * w.astype(np.float64) * m - (r - 100.0) * m_r.astype(np.float64)).astype(np.float32)
    return w, m, r.astype(np.uint8), m_r, c


def test_order_and_fusion_of_the_epilogue() -> None:
    """acc and residual are added in this order by fused multiply-adds: for chosen values any other way changes codes.

    The wrong ways are computed too and must differ from the right one, which proves that the values can tell.
    """
    w, m, r, m_r, c = chosen_epilogues()
    end = Requantization(0.0, 255.0, 0)
    ours = []
    for i in range(len(w)):  # a residual has one multiplier for the whole layer, so every case is a layer
        constants = IntegerAnchorConstants(
            w[i].reshape(1, 1, 1), 0, m[i].reshape(1, 1), c[i].reshape(1), end, float(m_r[i]), 100
        )
        request = KernelRequest(Dense(1, 1, 1, Epilogue(True, True)), ("uint8", "uint8"), "uint8", "int8")
        inputs = [np.full((1, 1), 255, np.uint8), r[i].reshape(1, 1)]
        ours.append(int(numerics.evaluate(request, constants, inputs)[0, 0]))
    acc, residual = (255.0 * w).astype(np.float32), r.astype(np.float32) - np.float32(100)
    right = [round(exact_fma(residual[i], m_r[i], exact_fma(acc[i], m[i], c[i]))) for i in range(len(w))]
    assert ours == right
    wrong_ways = {
        "products rounded alone": (acc * m + c) + residual * m_r,
        "only the residual's product rounded alone": numerics.fma(acc, m, c) + residual * m_r,
        "only the accumulator's product rounded alone": numerics.fma(residual, m_r, acc * m + c),
        "residual first": numerics.fma(acc, m, numerics.fma(residual, m_r, c)),
        "bias last": numerics.fma(residual, m_r, acc * m) + c,
    }
    for name, v in wrong_ways.items():
        assert np.count_nonzero(np.rint(v) != right) >= 20, name


def test_order_of_planes() -> None:
    """Low plane first, then the high one with 256·m: for chosen values the other order changes codes."""
    count = 3000
    rng = np.random.default_rng(11)
    w = rng.integers(1, 128, count).astype(np.int8)
    m = rng.uniform(1e-5, 4e-5, count).astype(np.float32)
    code, zero_point = 0xA7C9, 0x2B3D
    planes = (code & 255) - (zero_point & 255), (code >> 8) - (zero_point >> 8)
    low, high = (w.astype(np.float32) * np.float32(plane) for plane in planes)
    middle = rng.integers(20, 200, count) + 0.5
    c = (middle - (low.astype(np.float64) + 256.0 * high) * m).astype(np.float32)
    constants = IntegerAnchorConstants(w.reshape(1, count, 1), zero_point, m[None], c, Requantization(0.0, 255.0, 0))
    request = KernelRequest(Dense(1, 1, count, Epilogue(True)), ("uint16",), "uint8", "int8")
    ours = numerics.evaluate(request, constants, [np.full((1, 1), code, np.uint16)])[0]
    right = [round(exact_fma(high[i], 256 * float(m[i]), exact_fma(low[i], m[i], c[i]))) for i in range(count)]
    np.testing.assert_array_equal(ours, right)
    other_order = np.rint(numerics.fma(low, m, numerics.fma(high, 256 * m, c)))
    one_sum = np.rint(numerics.fma(low + 256 * high, m, c))
    assert np.count_nonzero(other_order != right) >= 20
    assert np.count_nonzero(one_sum != right) >= 20


@settings(max_examples=40, deadline=None)
@given(CODES, CODES, st.sampled_from(["uint8", "int8", "uint16", "float32"]), SEEDS)
def test_add_equals_scalar_arithmetic(first: str, second: str, target: str, seed: int) -> None:
    """The first input plays the accumulator, c is 0; mixed storages and float outputs included."""
    rng = np.random.default_rng(seed)
    formats = [random_format(rng, first), random_format(rng, second)]
    output = random_format(rng, target)
    constants = numerics.elementwise_constants(formats, output, 0.0, 6.0)
    inputs = [random_codes(rng, (1, 2, 3, 4), f.storage) for f in formats]
    request = KernelRequest(Add((1, 2, 3, 4), 0.0, 6.0), (formats[0].storage, formats[1].storage), output.storage)
    ours = numerics.evaluate(request, constants, inputs)
    for index in np.ndindex(ours.shape):
        v = 0.0
        for x, zero_point, factor in zip(inputs, constants.input_zero_points, constants.multipliers, strict=True):
            v = exact_fma(int(x[index]) - zero_point, float(factor), v)
        assert ours[index] == np.asarray(slow_requantize(v, constants.requantization, output.storage), ours.dtype)


@settings(max_examples=40, deadline=None)
@given(CODES, CODES, st.sampled_from(["uint8", "int8", "uint16", "float32"]), SEEDS)
def test_multiply_equals_scalar_arithmetic(first: str, second: str, target: str, seed: int) -> None:
    """The product of the differences is rounded alone, then scaled; the smaller input is repeated over the pixels."""
    rng = np.random.default_rng(seed)
    formats = [random_format(rng, first), random_format(rng, second)]
    output = random_format(rng, target)
    constants = numerics.multiply_constants(formats, output)
    shapes = ((1, 2, 3, 4), (1, 1, 1, 4))
    a, b = (random_codes(rng, shape, f.storage) for shape, f in zip(shapes, formats, strict=True))
    request = KernelRequest(Multiply(shapes), (formats[0].storage, formats[1].storage), output.storage)
    ours = numerics.evaluate(request, constants, [a, b])
    for index in np.ndindex(ours.shape):
        product = (int(a[index]) - constants.input_zero_points[0]) * (
            int(b[0, 0, 0, index[3]]) - constants.input_zero_points[1]
        )
        v = exact_fma(float(np.float32(product)), float(constants.multipliers[0]), 0.0)
        assert ours[index] == np.asarray(slow_requantize(v, constants.requantization, output.storage), ours.dtype)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["uint8", "int8"]), st.sampled_from(["uint8", "int8", "uint16", "float32"]), SEEDS)
def test_batch_matmul_equals_scalar_arithmetic(first: str, target: str, seed: int) -> None:
    """Sums of products of differences are exact, then scaled once; axes are those that the operator names."""
    rng = np.random.default_rng(seed)
    a_format, b_format, output = random_format(rng, first), random_format(rng, "int8"), random_format(rng, target)
    split, swapped = (0, 2, 1, 3), (0, 2, 3, 1)
    operator = BatchMatmul(((2, 3, 2, 5), (1, 4, 2, 5)), (split, swapped), (0, 2, 1, 3), 0.37)
    assert operator.product_shape == (2, 2, 3, 4)
    constants = numerics.matmul_constants(operator, (a_format, b_format), output)
    assert constants.input_zero_points[1] == 128
    a, b = (random_codes(rng, shape, "uint8") for shape in operator.input_shapes)
    ours = numerics.evaluate(KernelRequest(operator, ("uint8", "uint8"), output.storage), constants, [a, b])
    for n, row, head, column in np.ndindex(ours.shape):
        total = sum(
            (int(a[n, row, head, k]) - constants.input_zero_points[0]) * (int(b[0, column, head, k]) - 128)
            for k in range(5)
        )
        v = exact_fma(float(total), float(constants.multipliers[0]), 0.0)
        wanted = np.asarray(slow_requantize(v, constants.requantization, output.storage), ours.dtype)
        assert ours[n, row, head, column] == wanted


def test_add_takes_the_first_input_first() -> None:
    """Swapping the inputs, or rounding the products alone, changes codes of chosen values."""
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 256, (2, 200_000)).astype(np.uint8)
    m = [np.float32(0.7131), np.float32(0.2869)]
    end = Requantization(0.0, 65535.0, 0)
    request = KernelRequest(Add((200_000,)), ("uint8", "uint8"), "float32")
    ours = numerics.evaluate(request, IntegerElementwiseConstants((0, 0), (m[0], m[1]), end), [a, b])  # type: ignore[arg-type]
    swapped = numerics.evaluate(request, IntegerElementwiseConstants((0, 0), (m[1], m[0]), end), [b, a])  # type: ignore[arg-type]
    unfused = a.astype(np.float32) * m[0] + b.astype(np.float32) * m[1]
    assert np.any(ours != swapped)
    assert np.any(ours != unfused)
    for i in range(200):
        assert ours[i] == exact_fma(float(b[i]), float(m[1]), exact_fma(float(a[i]), float(m[0]), 0.0))


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.sampled_from(["uint8", "uint16"]), st.booleans(), SEEDS)
def test_pools_equal_plain_loops(convolution: Conv2D, storage: Storage, count_padding: bool, seed: int) -> None:
    """Average pools divide by what the operator counts; padding adds nothing to sums and never is a maximum."""
    window, shape = convolution.window, convolution.input_shape
    rng = np.random.default_rng(seed)
    source, target = random_format(rng, storage), random_format(rng, "uint8")
    counted = window.padding if count_padding else (0, 0, 0, 0)
    average = AveragePool2D(shape, window, counted)
    depthwise = Conv2D(shape, shape[3], window, shape[3])
    x = random_codes(rng, shape, storage)
    constants = numerics.average_pool_constants(average, source, target)
    means = numerics.evaluate(KernelRequest(average, (storage,), "uint8"), constants, [x])
    maxima = numerics.evaluate(KernelRequest(MaxPool2D(shape, window), (storage,), storage), NoConstants(), [x])
    rows, columns = average.divisors
    for index in np.ndindex(means.shape):
        inside = [int(x[i]) for i, _ in window_terms(depthwise, *index) if i is not None]
        divisor = rows[index[1]] * columns[index[2]]
        assert divisor == len(inside) or count_padding or not inside
        factor = float(np.float32(source.scale / (divisor * target.scale)))
        v = exact_fma(float(np.float32(sum(inside) - len(inside) * source.zero_point)), factor, 0.0)
        assert means[index] == slow_requantize(v, constants.requantization, "uint8")
        assert maxima[index] == max(inside, default=0)


@settings(max_examples=40, deadline=None)
@given(CODES, CODES, SEEDS)
def test_requantize_is_one_step(first: str, second: str, seed: int) -> None:
    """From codes to codes: rint((q − zp)·m), clamped, one product; the same for a clip of 16-bit codes."""
    rng = np.random.default_rng(seed)
    source, target = random_format(rng, first), random_format(rng, second)
    x = random_codes(rng, (300,), source.storage)
    constants = numerics.elementwise_constants([source], target)
    ours = numerics.evaluate(KernelRequest(Convert((300,)), (source.storage,), target.storage), constants, [x])
    factor = np.float32(source.scale / target.scale)
    scaled = np.rint((x.astype(np.float32) - np.float32(source.storage_zero_point)) * factor)
    expected = np.clip(scaled + target.zero_point, target.q_min, target.q_max) + target.storage_offset
    np.testing.assert_array_equal(ours, expected)
    unary = KernelRequest(Unary((300,), "clip", (-1e9, 1e9)), (source.storage,), target.storage)
    np.testing.assert_array_equal(numerics.evaluate(unary, constants, [x]), expected)


def test_constants_of_another_kind_are_refused() -> None:
    """A wrong pair of request and constants says so instead of computing something."""
    request = KernelRequest(Dense(1, 2, 3), ("uint8",), "uint8", "int8")
    with pytest.raises(KernelError, match="NoConstants do not fit"):
        numerics.evaluate(request, NoConstants(), [np.zeros((1, 2), np.uint8)])
    with pytest.raises(KernelError, match="input 0 is float32, uint8 is stored as uint8"):
        numerics.evaluate(request, NoConstants(), [np.zeros((1, 2), np.float32)])
    with pytest.raises(KernelError, match="0 inputs given"):
        numerics.evaluate(request, NoConstants(), [])
