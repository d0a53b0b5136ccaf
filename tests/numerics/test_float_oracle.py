"""Float layers of the oracle: the fixed order of fused multiply-adds, 16-bit storage, and the other float operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from exact_arithmetic import bits, convolutions, exact_fma, float16_array, float32_array, window_terms
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant import float_polynomials, numerics
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.interface import (
    FillConstants,
    FloatAnchorConstants,
    FloatElementwiseConstants,
    KernelRequest,
    NoConstants,
    NormalizationConstants,
    QuantizeConstants,
    Requantization,
    TableConstants,
)
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    Concat,
    Conv2D,
    Convert,
    Dense,
    Epilogue,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Opaque,
    Softmax,
    Unary,
)
from tvm_hquant.tensor_format import Storage, TensorFormat

Array = npt.NDArray[Any]
SEEDS = st.integers(0, 2**32 - 1)
FLOATS = st.sampled_from(["float32", "float16", "bfloat16"])


def random_floats(rng: np.random.Generator, shape: tuple[int, ...], storage: Storage, spread: float = 1.0) -> Array:
    values = (rng.normal(size=shape) * spread).astype(np.float32)
    values[rng.random(shape) < 0.2] = 0
    return numerics.narrow(values, storage)


@settings(max_examples=60, deadline=None)
@given(
    convolutions(), FLOATS, FLOATS, FLOATS, st.sampled_from([None, "float32", "bfloat16"]),
    st.sampled_from([1.0, 1e-19, 1e-24, 1e4]), SEEDS,
)  # fmt: skip
def test_convolution_equals_plain_loops(
    operator: Conv2D,
    source: Storage,
    weight: Storage,
    target: Storage,
    residual: Storage | None,
    spread: float,
    seed: int,
) -> None:
    """One accumulator from the bias, fma in (kh, kw, ci) order, residual, clamp, one rounding: equal to the last bit.

    Small spreads make sums of denormal numbers, where the cheap way of rounding does not hold.
    """
    rng = np.random.default_rng(seed)
    bounds = operator.epilogue.lower, operator.epilogue.upper
    epilogue = Epilogue(bool(rng.random() < 0.5), residual is not None, *bounds)
    operator = Conv2D(operator.input_shape, operator.out_channels, operator.window, operator.groups, epilogue)
    x = random_floats(rng, operator.input_shape, source, spread)
    w = random_floats(rng, operator.weight_shape, weight, spread)
    bias = (rng.normal(size=operator.out_channels) * spread**2).astype(np.float32)
    r = None if residual is None else random_floats(rng, operator.output_shape, residual, spread)
    storages = (source,) if residual is None else (source, residual)
    request = KernelRequest(operator, storages, target, weight)
    ours = numerics.evaluate(request, FloatAnchorConstants(w, bias, *bounds), [x] if r is None else [x, r])
    values, weights = numerics.widen(x, source), numerics.widen(w, weight)
    expected = np.zeros(operator.output_shape, np.float32)
    for index in np.ndindex(expected.shape):
        acc = float(bias[index[-1]]) if epilogue.has_bias else 0.0
        for i, j in window_terms(operator, *index):
            acc = exact_fma(0.0 if i is None else float(values[i]), float(weights[j]), acc)
        v: Any = np.float32(acc)
        if r is not None and residual is not None:
            v = v + numerics.widen(r, residual)[index]
        v = v if v > bounds[0] else np.float32(bounds[0])
        expected[index] = v if v < bounds[1] else np.float32(bounds[1])
    wide_ours = numerics.widen(ours, target)
    np.testing.assert_array_equal(bits(wide_ours), bits(numerics.widen(numerics.narrow(expected, target), target)))


def test_order_of_the_sum_shows() -> None:
    """Another order, split sums or unfused products give other bits on ordinary data: the order is not free."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 256)).astype(np.float32), rng.normal(size=(500, 256)).astype(np.float32)
    zeros = np.zeros(500, np.float32)
    request = KernelRequest(Dense(1, 256, 500), ("float32",), "float32", "float32")

    def layer(order: Array) -> Array:
        constants = FloatAnchorConstants(w[:, order], zeros, -math.inf, math.inf)
        row: Array = numerics.evaluate(request, constants, [x[:, order]])[0]
        return row

    ours, backwards = layer(np.arange(256)), layer(np.arange(256)[::-1])
    unfused = np.add.accumulate(x * w, axis=1, dtype=np.float32)[:, -1]
    assert np.count_nonzero(ours != backwards) > 100
    assert np.count_nonzero(ours != unfused) > 100
    np.testing.assert_allclose(ours, (w.astype(np.float64) @ x[0].astype(np.float64)), atol=1e-4)


def test_denormal_sums_are_rounded_once() -> None:
    """(2²² + 1)·2⁻¹⁴⁹ + 2⁻¹⁵⁰·(1 − 2⁻⁴⁶) lies just below the middle of two denormals, too close for float64 to tell."""
    bias = float32_array([(2**22 + 1) * 2.0**-149])
    x, w = float32_array([[2.0**-75 * (1 + 2.0**-23)]]), float32_array([[2.0**-75 * (1 - 2.0**-23)]])
    request = KernelRequest(Dense(1, 1, 1, Epilogue(True)), ("float32",), "float32", "float32")
    ours = numerics.evaluate(request, FloatAnchorConstants(w, bias, -math.inf, math.inf), [x])
    assert bits(ours) == bits(bias)
    rounded_twice = (x.astype(np.float64) * w + bias).astype(np.float32)
    assert bits(rounded_twice) != bits(bias)


def test_large_layer_in_blocks_equals_itself_in_parts() -> None:
    """Outputs are computed block by block; a block's border must not show."""
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(700, 9)).astype(np.float32), rng.normal(size=(60, 9)).astype(np.float32)
    constants = FloatAnchorConstants(w, np.ones(60, np.float32), 0.0, 6.0)
    whole = numerics.evaluate(
        KernelRequest(Dense(700, 9, 60, Epilogue(True)), ("float32",), "float32", "float32"), constants, [x]
    )
    request = KernelRequest(Dense(1, 9, 60, Epilogue(True)), ("float32",), "float32", "float32")
    rows = [numerics.evaluate(request, constants, [row[None]])[0] for row in x]
    np.testing.assert_array_equal(whole, np.stack(rows))


def test_bfloat16_rounds_to_nearest_even() -> None:
    """Every bfloat16 survives the way to float32 and back; midway values go to even; NaN stays NaN."""
    patterns = np.arange(65536, dtype=np.uint16)
    values = numerics.bfloat16_values(patterns)
    back = numerics.bfloat16_bits(values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(back[~nan], patterns[~nan])
    assert np.isnan(numerics.bfloat16_values(back[nan])).all()
    finite = patterns[:0x7F7F]
    middles = ((finite.astype(np.uint32) << 16) | 0x8000).view(np.float32)
    np.testing.assert_array_equal(numerics.bfloat16_bits(middles), finite + (finite & 1))
    above = ((finite.astype(np.uint32) << 16) | 0x8001).view(np.float32)
    np.testing.assert_array_equal(numerics.bfloat16_bits(above), finite + 1)
    assert numerics.bfloat16_values(numerics.bfloat16_bits(np.float32(3.4e38))) == np.inf
    hidden = np.array([0x7F800001], np.uint32).view(np.float32)  # a NaN whose upper half is infinity's
    assert np.isnan(numerics.bfloat16_values(numerics.bfloat16_bits(hidden))).all()


def test_float16_rounds_once() -> None:
    """The largest float16, overflow and denormals."""
    x = float32_array([65519.9, 65520.0, 2.0**-25, 2.0**-25 * 1.001, -1e-9, np.nan])
    np.testing.assert_array_equal(
        numerics.narrow(x, "float16"), float16_array([65504, np.inf, 0, 2.0**-24, -0.0, np.nan])
    )


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_add_and_unary_compute_in_float32(storage: Storage) -> None:
    """16-bit storage is widened, computed and rounded once."""
    rng = np.random.default_rng(1)
    a, b = (random_floats(rng, (2, 3, 5), storage, 3.0) for _ in range(2))
    wide_a, wide_b = numerics.widen(a, storage), numerics.widen(b, storage)
    added = numerics.evaluate(
        KernelRequest(Add((2, 3, 5)), (storage, storage), storage), FloatElementwiseConstants((0.0, 2.5)), [a, b]
    )
    expected = np.clip(wide_a + wide_b, np.float32(0), np.float32(2.5))
    np.testing.assert_array_equal(added, numerics.narrow(expected, storage))
    request = KernelRequest(Unary((2, 3, 5), "tanh"), (storage,), storage)
    ours = numerics.evaluate(request, NoConstants(), [a])
    np.testing.assert_array_equal(ours, numerics.narrow(float_polynomials.tanh(wide_a), storage))


@settings(max_examples=40, deadline=None)
@given(convolutions(), FLOATS, st.booleans(), SEEDS)
def test_pools_equal_plain_loops(convolution: Conv2D, storage: Storage, count_padding: bool, seed: int) -> None:
    """Average: a sum in order, then one product with the rounded reciprocal. Maximum: padding takes no part."""
    window, shape = convolution.window, convolution.input_shape
    x = random_floats(np.random.default_rng(seed), shape, storage)
    values = numerics.widen(x, storage)
    average = AveragePool2D(shape, window, window.padding if count_padding else (0, 0, 0, 0))
    means = numerics.evaluate(KernelRequest(average, (storage,), storage), NoConstants(), [x])
    maxima = numerics.evaluate(KernelRequest(MaxPool2D(shape, window), (storage,), storage), NoConstants(), [x])
    rows, columns = average.divisors
    depthwise = Conv2D(shape, shape[3], window, shape[3])
    for index in np.ndindex(means.shape):
        inside = [values[i] for i, _ in window_terms(depthwise, *index) if i is not None]
        total = np.float32(0)
        for value in inside:
            total = total + value
        mean = total * np.float32(1.0 / (rows[index[1]] * columns[index[2]]))
        assert means[index] == numerics.narrow(np.asarray(mean), storage)[()]
        assert numerics.widen(np.asarray(maxima[index]), storage) == max(inside, default=-np.inf)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_adds_in_ascending_order(axis: int) -> None:
    """Equal to a plain loop, and each slice sums to 1."""
    x = (np.random.default_rng(axis).normal(size=(3, 40, 5)) * 5).astype(np.float32)
    ours = numerics.evaluate(KernelRequest(Softmax((3, 40, 5), axis), ("float32",), "float32"), NoConstants(), [x])
    np.testing.assert_allclose(ours.sum(axis=axis), 1, rtol=1e-5)
    lines, outputs = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]), np.moveaxis(ours, axis, -1)
    for line, output in zip(lines, outputs.reshape(lines.shape), strict=True):
        e = float_polynomials.exp(line - line.max())
        total = np.float32(0)
        for value in e:
            total = total + value
        np.testing.assert_array_equal(output, e / total)


@pytest.mark.parametrize(
    ("shape", "axis", "channel_axis", "groups"),
    [((3, 37), 1, 1, 1), ((2, 3, 5), 1, 1, 1), ((2, 3, 4, 12), 1, 3, 3), ((2, 7, 40), 1, 2, 2), ((1, 9, 4), 1, 2, 4)],
)
def test_group_normalization_adds_sixteen_sums(
    shape: tuple[int, ...], axis: int, channel_axis: int, groups: int
) -> None:
    """Equal to a plain loop over elements, and near the formula in float64."""
    operator = GroupNormalization(shape, axis, channel_axis, 1e-3, groups)
    random = np.random.default_rng(groups)
    x = random.normal(2.0, 1.5, shape).astype(np.float32)
    gamma, beta = (random.normal(size=operator.channels).astype(np.float32) for _ in range(2))
    constants = NormalizationConstants(gamma, beta)
    ours = numerics.evaluate(KernelRequest(operator, ("float32",), "float32"), constants, [x])
    blocks = x.reshape(operator.outer, operator.positions, groups, -1)
    factors, shifts = gamma.reshape(groups, -1), beta.reshape(groups, -1)
    for (n, g), found in np.ndenumerate(np.zeros((operator.outer, groups))):
        assert not found
        group = blocks[n, :, g]
        mean = _added(group, square=False) / np.float32(group.size)
        variance = _added(group - mean, square=True) / np.float32(group.size)
        r = np.float32(1) / np.sqrt(variance + np.float32(1e-3))
        own = ours.reshape(blocks.shape)[n, :, g]
        for place, value in np.ndenumerate(group):
            c = place[1]
            assert own[place] == exact_fma((value - mean) * r, factors[g, c], shifts[g, c])
        exact = group.astype(np.float64)
        exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-3) * factors[g] + shifts[g]
        np.testing.assert_allclose(own, exact, rtol=1e-5, atol=1e-5)


def _added(group: np.ndarray, square: bool) -> np.float32:
    """The sum over [positions, channels], one operation after the other."""
    sums = [np.float32(0)] * 16
    for row in group:
        for c, value in enumerate(row):
            sums[c % 16] = np.float32(exact_fma(value, value, sums[c % 16])) if square else sums[c % 16] + value
    for half in (8, 4, 2, 1):
        sums = [sums[j] + sums[j + half] for j in range(half)]
    return sums[0]


def test_softmax_and_normalization_end_in_the_codes_of_a_conversion() -> None:
    """Codes behind a float operator are those that a quantize makes of its floats."""
    random = np.random.default_rng(5)
    x = random.normal(size=(7, 20)).astype(np.float32)
    codes = QuantizeConstants(float(np.float32(0.013)), Requantization(-100.0, 120.0, 103))
    gamma, beta = (random.normal(size=20).astype(np.float32) for _ in range(2))
    for operator, of_floats, of_codes in (
        (Softmax((7, 20), 1), NoConstants(), codes),
        (
            GroupNormalization((7, 20), 1, 1, 1e-5),
            NormalizationConstants(gamma, beta),
            NormalizationConstants(gamma, beta, codes),
        ),
    ):
        floats = numerics.evaluate(KernelRequest(operator, ("float32",), "float32"), of_floats, [x])
        wanted = numerics.evaluate(KernelRequest(Convert((7, 20)), ("float32",), "uint8"), codes, [floats])
        found = numerics.evaluate(KernelRequest(operator, ("float32",), "uint8"), of_codes, [x])
        np.testing.assert_array_equal(found, wanted)
        assert len(np.unique(found)) > 5


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_local_response_normalization(size: int) -> None:
    """ONNX's window: one more channel above than below where the size is even; the sum is exact in order."""
    operator = LocalResponseNormalization((2, 2, 3, 6), size, 0.1, 0.75, 1.5)
    x = np.random.default_rng(size).normal(size=operator.shape).astype(np.float32)
    ours = numerics.evaluate(KernelRequest(operator, ("float32",), "float32"), NoConstants(), [x])
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    for index in np.ndindex(x.shape):
        c, total = index[-1], 0.0
        for j in range(max(0, c - before), min(5, c + after) + 1):
            v = float(x[(*index[:-1], j)])
            total = exact_fma(v, v, total)
        exact = float(x[index]) / (1.5 + 0.1 / size * total) ** 0.75
        assert ours[index] == pytest.approx(exact, rel=1e-6)
        base = exact_fma(total, float(np.float32(0.1 / size)), 1.5)
        assert ours[index] == x[index] * float_polynomials.power(base, -0.75)


MOVES = [
    Movement("reshape", (2, 3, 4, 5), (6, 20)),
    Movement("permute_dims", (2, 3, 4, 5), (5, 2, 4, 3), (3, 0, 2, 1)),
    Movement("strided_slice", (2, 3, 4, 5), (2, 1, 4, 2), (1, 1, 1, 3, 0, 3)),
    Movement("take", (2, 3, 4, 5), (2, 3, 4, 4), (3, 4, 0, 0, 2)),
    Movement("depth_to_space", (2, 2, 2, 24), (2, 3, 5, 4), (2, 2, 3, 1, 1)),
    Movement("pad", (2, 3, 4, 5), (2, 6, 4, 6), (0, 0, 1, 2, 0, 0, 0, 1), 1.5),
]


def source_index(function: str, i: tuple[int, ...]) -> tuple[int, ...]:
    """Where the movement of ``MOVES`` takes output element ``i`` from; outside the input for padding."""
    if function == "reshape":
        flat = 20 * i[0] + i[1]
        return flat // 60, flat // 20 % 3, flat // 5 % 4, flat % 5
    if function == "permute_dims":
        return i[1], i[3], i[2], i[0]
    if function == "strided_slice":
        return i[0], 1, i[2], 3 * i[3]
    if function == "take":
        return i[0], i[1], i[2], (4, 0, 0, 2)[i[3]]
    if function == "depth_to_space":
        # Two groups of two channels, blocks of 2×3 pixels, one row and one column cut off.
        row, column = divmod(i[1] + 1, 2), divmod(i[2] + 1, 3)
        return i[0], row[0], column[0], 12 * (i[3] // 2) + 6 * row[1] + 2 * column[1] + i[3] % 2
    return i[0], i[1] - 1, i[2], i[3]


@pytest.mark.parametrize("operator", MOVES, ids=lambda operator: operator.function)
@pytest.mark.parametrize("storage", ["uint8", "uint16", "float32", "float16", "bfloat16"])
def test_movements_move_and_change_nothing(operator: Movement, storage: Storage) -> None:
    """Each output element is looked up by index arithmetic of its own."""
    rng = np.random.default_rng(0)
    if storage in ("uint8", "uint16"):
        x = rng.integers(0, 256, operator.input_shape).astype(storage)
    else:
        x = random_floats(rng, operator.input_shape, storage)
    fill = 7.0 if storage in ("uint8", "uint16") else 1.5
    stored_fill = 7 if storage in ("uint8", "uint16") else numerics.narrow(np.asarray(1.5, np.float32), storage)[()]
    ours = numerics.evaluate(KernelRequest(operator, (storage,), storage), FillConstants(fill), [x])
    assert ours.dtype == x.dtype
    assert ours.shape == operator.output_shape
    for i in np.ndindex(ours.shape):
        source = source_index(operator.function, i)
        inside = all(0 <= a < n for a, n in zip(source, x.shape, strict=True))
        assert ours[i] == (x[source] if inside else stored_fill)


def test_concat_joins_stored_values() -> None:
    """Any axis; no conversion takes place in a concat."""
    a, b = np.arange(6, dtype=np.uint8).reshape(1, 2, 3), np.arange(3, dtype=np.uint8).reshape(1, 1, 3)
    request = KernelRequest(Concat(((1, 2, 3), (1, 1, 3)), 1), ("uint8", "uint8"), "uint8")
    ours = numerics.evaluate(request, NoConstants(), [a, b])
    np.testing.assert_array_equal(ours, [[[0, 1, 2], [3, 4, 5], [0, 1, 2]]])


def test_conversions() -> None:
    """quantize, dequantize, casts and tables are told apart by the storages."""
    codes = TensorFormat("int8", 0.5, 0, -128, 127)
    x = float32_array([-100.0, -0.25, 0.75, 3.0, 63.6])
    quantized = numerics.evaluate(
        KernelRequest(Convert((5,)), ("float32",), "uint8"), numerics.quantize_constants(codes), [x]
    )
    np.testing.assert_array_equal(quantized, [0, 128, 130, 134, 255])
    outside = float32_array([np.nan, np.inf, -np.inf])
    request = KernelRequest(Convert((3,)), ("float32",), "uint8")
    np.testing.assert_array_equal(
        numerics.evaluate(request, numerics.quantize_constants(codes), [outside]), [0, 255, 0]
    )
    dequantize = KernelRequest(Convert((5,)), ("uint8",), "bfloat16")
    reals = numerics.evaluate(dequantize, numerics.dequantize_constants(codes), [quantized])
    np.testing.assert_array_equal(numerics.bfloat16_values(reals), [-64, 0, 1, 3, 63.5])
    half = numerics.evaluate(KernelRequest(Convert((5,)), ("bfloat16",), "float16"), NoConstants(), [reals])
    np.testing.assert_array_equal(half, float16_array([-64, 0, 1, 3, 63.5]))
    table = numerics.unary_table("clip", (0.0, 6.0), codes, codes)
    looked_up = numerics.evaluate(
        KernelRequest(Unary((5,), "clip"), ("uint8",), "uint8"), TableConstants(table), [quantized]
    )
    np.testing.assert_array_equal(looked_up, [128, 128, 130, 134, 140])


def test_opaque_operators_have_no_oracle() -> None:
    """They are TVM's own; saying so is better than a wrong number."""
    request = KernelRequest(Opaque("relax.sort", ((4,),), (4,)), ("float32",), "float32")
    with pytest.raises(KernelError, match=r"relax.sort has no kernel"):
        numerics.evaluate(request, NoConstants(), [np.zeros(4, np.float32)])
