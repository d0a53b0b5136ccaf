"""Observers: one pass, any order, any division of the work; ranges that contain 0 and serve their purpose."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant.calibration import OBSERVERS, Observer, make_observer
from tvm_hquant.errors import DataError

CODES = [(0, 255, False), (-128, 127, True), (0, 15, False), (0, 3, False), (0, 65535, False)]
DISTRIBUTIONS = ("normal", "relu", "outliers", "laplace", "shifted", "clipped", "negative")


def values_of(distribution: str, size: tuple[int, ...], seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.normal(size=size) * 10.0 ** random.integers(-6, 6)
    if distribution == "relu":
        x = np.maximum(x, 0)
    elif distribution == "outliers":
        x[random.random(size) < 0.001] *= 50
    elif distribution == "laplace":
        x = random.laplace(size=size)
    elif distribution == "shifted":
        x = x + 5 * np.abs(x).max()
    elif distribution == "clipped":
        x = np.clip(random.normal(size=size) * 4, 0, 6)
    elif distribution == "negative":
        x = -np.abs(x)
    return x.astype(np.float32)


def quantization_error(x: np.ndarray, bounds: tuple[float, float], q_min: int, q_max: int, symmetric: bool) -> float:
    """Mean squared error of quantizing and dequantizing, as the arithmetic contract does."""
    lower, upper = bounds
    scale = (upper / q_max if symmetric else (upper - lower) / (q_max - q_min)) or 1.0
    zero_point = 0 if symmetric else int(np.clip(np.rint(q_min - lower / scale), q_min, q_max))
    codes = np.clip(np.rint(x.astype(np.float64) / scale), q_min - zero_point, q_max - zero_point)
    return float(np.mean((codes * scale - x) ** 2))


def observed(name: str, arrays: list[np.ndarray], **options: Any) -> Observer:
    observer = make_observer(name, "t", **options)
    for array in arrays:
        observer.observe(array)
    return observer


def ranges_of(observer: Any, codes: tuple[int, int, bool]) -> np.ndarray:
    return np.array(observer.channel_ranges(*codes) if observer.per_channel else observer.range(*codes))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(OBSERVERS),
    per_channel=st.booleans(),
    arrays=st.lists(
        st.lists(
            st.lists(
                st.floats(-1e6, 1e6, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0, -2.0]),
                min_size=3,
                max_size=3,
            ),
            min_size=1,
            max_size=5,
        ),
        min_size=2,
        max_size=6,
    ),
    cut=st.integers(0, 6),
    codes=st.sampled_from(CODES),
)
def test_merging_equals_one_pass(
    name: str, per_channel: bool, arrays: list[list[list[float]]], cut: int, codes: tuple[int, int, bool]
) -> None:
    """However samples are divided among processes, and in whatever order, the range is the same to the last bit."""
    seen = [np.array(a, np.float32) for a in arrays]
    whole = observed(name, seen, per_channel=per_channel)
    parts = [observed(name, part, per_channel=per_channel) for part in (seen[:cut], seen[cut:])]
    before = [pickle.dumps(part) for part in parts]
    merged = parts[1].merge(pickle.loads(before[0]))
    np.testing.assert_array_equal(ranges_of(merged, codes), ranges_of(whole, codes))
    np.testing.assert_array_equal(
        ranges_of(observed(name, seen[::-1], per_channel=per_channel), codes), ranges_of(whole, codes)
    )
    assert merged.observations == len(seen)
    assert [pickle.dumps(part) for part in parts] == before, "merging changed its operands"


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(OBSERVERS),
    distribution=st.sampled_from(DISTRIBUTIONS),
    codes=st.sampled_from(CODES),
    seed=st.integers(0, 1000),
)
def test_ranges_contain_zero_and_stay_near_the_extremes(
    name: str, distribution: str, codes: tuple[int, int, bool], seed: int
) -> None:
    """Ranges include 0, never exceed what was seen but for widening and powers of two, and symmetric ones are."""
    x = values_of(distribution, (4, 50, 8), seed)
    lower, upper = observed(name, list(x)).range(*codes)
    assert lower <= 0 <= upper
    assert lower < upper
    largest = max(0.0, float(x.max()), float(-x.min()))
    if codes[2]:
        assert lower == -upper
    if name == "power-of-two":
        seen = largest if codes[2] else max(0.0, float(x.max())) - min(0.0, float(x.min()))
        span = (upper - lower) / (2 if codes[2] else 1) / (2 if codes[1] > 4095 else 1)
        assert span < 2 * seen
    elif codes[1] > 4095:
        assert (lower, upper) == (2 * min(float(x.min()), 0.0), 2 * max(float(x.max()), 0.0))
    elif name == "min-max":
        assert (-lower if codes[2] else upper) == (largest if codes[2] else max(float(x.max()), 0.0))
    else:
        assert max(-lower, upper) <= largest


@settings(max_examples=50, deadline=None)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    codes=st.sampled_from(CODES[:-1]),
    seed=st.integers(0, 1000),
)
def test_least_error_is_no_worse_than_the_extremes(distribution: str, codes: tuple[int, int, bool], seed: int) -> None:
    """What the search believes about errors holds for the values themselves; 2 % is what bins leave open."""
    x = values_of(distribution, (4, 3000), seed)
    extremes = quantization_error(x, observed("min-max", list(x)).range(*codes), *codes)
    chosen = quantization_error(x, observed("mean-squared-error", list(x)).range(*codes), *codes)
    assert chosen <= 1.02 * extremes


@pytest.mark.parametrize("codes", CODES[:-1])
@pytest.mark.parametrize("distribution", ["normal", "relu", "outliers", "laplace"])
def test_least_error_is_near_the_best_range(distribution: str, codes: tuple[int, int, bool]) -> None:
    """Brute force over symmetric shrinking of the extremes finds nothing notably better."""
    x = values_of(distribution, (20000,), 7)
    chosen = quantization_error(x, observed("mean-squared-error", [x]).range(*codes), *codes)
    lower, upper = observed("min-max", [x]).range(*codes)
    best = min(quantization_error(x, (lower * f, upper * f), *codes) for f in np.linspace(0.02, 1, 200))
    assert chosen <= 1.05 * best


def test_least_error_cuts_off_outliers() -> None:
    """One extreme value must not cost all others their precision: the reason for the method."""
    x = values_of("relu", (100000,), 3)
    x[17] = 10 * x.max()
    codes = (0, 15, False)
    gain = quantization_error(x, observed("min-max", [x]).range(*codes), *codes) / quantization_error(
        x, observed("mean-squared-error", [x]).range(*codes), *codes
    )
    assert gain > 3


def test_least_error_keeps_what_full_range_codes_hold_exactly() -> None:
    """Pixels 0 … 255 are codes already: any clipping only loses."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.float32) ** 2 // 255
    pixels[0, 0, 0] = 0.0
    pixels[0, 0, 1] = 255.0
    assert observed("mean-squared-error", list(pixels)).range(0, 255, False) == (0.0, 255.0)


def test_weight_of_clipping_widens_the_range() -> None:
    """The heavier clipped values count, the less is clipped."""
    x = values_of("laplace", (50000,), 1)
    uppers = [
        observed("mean-squared-error", [x], clipping_weight=w).range(-128, 127, True)[1] for w in (0.1, 1.0, 10.0, 1e6)
    ]
    assert uppers == sorted(uppers)
    assert uppers[0] < uppers[-1] == pytest.approx(float(np.abs(x).max()))


@settings(max_examples=30, deadline=None)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    percentile=st.sampled_from([90.0, 99.0, 99.9, 99.99, 100.0]),
    seed=st.integers(0, 1000),
)
def test_percentile_leaves_out_what_it_says(distribution: str, percentile: float, seed: int) -> None:
    """Bounds agree with numpy's percentiles of all values up to one bin, 1/2048 of the range seen."""
    x = values_of(distribution, (5, 2000), seed)
    lower, upper = observed("percentile", list(x), percentile=percentile).range(0, 255, False)
    bin_width = (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / 2047
    for bound, share, side in ((lower, 100 - percentile, min), (upper, percentile, max)):
        around = [side(0.0, float(np.percentile(x, share, method=m))) for m in ("lower", "higher")]
        assert around[0] - bin_width <= bound <= around[1] + bin_width


@settings(max_examples=40, deadline=None)
@given(distribution=st.sampled_from(DISTRIBUTIONS), codes=st.sampled_from(CODES), seed=st.integers(0, 1000))
def test_power_of_two_scales(distribution: str, codes: tuple[int, int, bool], seed: int) -> None:
    """The scale that follows from the range is a power of two exactly, and 0 is a code exactly."""
    q_min, q_max, symmetric = codes
    lower, upper = observed("power-of-two", list(values_of(distribution, (3, 500), seed))).range(*codes)
    scale = upper / q_max if symmetric else (upper - lower) / (q_max - q_min)
    assert math.frexp(scale)[0] == 0.5
    if not symmetric:
        assert (q_min - lower / scale).is_integer()
        assert q_min <= q_min - lower / scale <= q_max


def test_power_of_two_keeps_a_range_that_already_is_one() -> None:
    """A scale of exactly 2^k is not doubled by a rounding of its logarithm."""
    for k in range(-20, 20):
        x = np.linspace(0, 255 * 2.0**k, 256, dtype=np.float32)
        assert observed("power-of-two", [x]).range(0, 255, False) == (0.0, 255 * 2.0**k)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("codes", CODES)
def test_zeros_and_constants(name: str, codes: tuple[int, int, bool]) -> None:
    """A tensor that is always 0 has the range 0 … 0; a constant is kept."""
    assert observed(name, [np.zeros((2, 3))] * 2).range(*codes) == (0.0, 0.0)
    for constant in (3.0, -0.001, 1e-30, 1e30):
        bounds = observed(name, [np.full((2, 3), constant, np.float32)]).range(*codes)
        error = quantization_error(np.full(1, constant), bounds, *codes) ** 0.5
        assert error <= abs(constant) * (0.51 if name == "power-of-two" or codes[1] > 255 else 1e-6)


@pytest.mark.parametrize("name", OBSERVERS)
def test_channels_are_those_of_the_last_axis(name: str) -> None:
    """Each channel gets the range that an observer of it alone would give, to the resolution of fewer bins."""
    x = np.stack([values_of("relu", (6, 7, 7), seed) for seed in range(5)], axis=-1)
    observer = observed(name, list(x), per_channel=True)
    lower, upper = observer.channel_ranges(0, 255, False)
    alone = [observed(name, list(x[..., c])).range(0, 255, False) for c in range(5)]
    # Two scales that are powers of two may serve equally well.
    tolerance = 1.0 if name == "power-of-two" else 0.06
    np.testing.assert_allclose(lower, [a[0] for a in alone], rtol=tolerance)
    np.testing.assert_allclose(upper, [a[1] for a in alone], rtol=tolerance)
    with pytest.raises(ValueError, match="use channel_ranges"):
        observer.range(0, 255, False)
    with pytest.raises(ValueError, match="use range"):
        observed(name, list(x)).channel_ranges(0, 255, False)
    with pytest.raises(ValueError, match="5 channels before, now 4"):
        observer.observe(x[0, ..., :4])


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_the_tensor(name: str, value: float) -> None:
    """The float model's overflow is reported, not calibrated on; what was seen before stays valid."""
    observer = observed(name, [np.ones((2, 2))])
    before = observer.range(0, 255, False)
    with pytest.raises(DataError, match="tensor t: holds NaN or infinity in observation 1"):
        observer.observe(np.array([[1.0, value], [0.0, 9.0]]))
    assert observer.range(0, 255, False) == before


@pytest.mark.parametrize("name", OBSERVERS)
def test_nothing_observed(name: str) -> None:
    """A range of nothing is an error, as is an empty tensor; merging with nothing changes nothing."""
    with pytest.raises(DataError, match="nothing was observed"):
        make_observer(name, "t").range(0, 255, False)
    with pytest.raises(DataError, match="has no elements"):
        make_observer(name, "t").observe(np.zeros((0, 3)))
    one = observed(name, [np.arange(5.0)])
    assert one.merge(make_observer(name, "t")).range(0, 255, False) == one.range(0, 255, False)
    with pytest.raises(ValueError, match="cannot be merged"):
        one.merge(make_observer(name, "other"))


def test_unknown_names_and_options() -> None:
    """A misspelt observer is answered with those that exist."""
    with pytest.raises(DataError, match="'minmax': use one of min-max, percentile, mean-squared-error, power-of-two"):
        make_observer("minmax", "t")
    with pytest.raises(DataError, match="percentile 101"):
        make_observer("percentile", "t", percentile=101)
    with pytest.raises(DataError, match="clipping errors is 0"):
        make_observer("mean-squared-error", "t", clipping_weight=0)


def test_large_tensors_are_sampled_evenly() -> None:
    """Of a tensor with more than 2^18 values each channel, row and column takes part, and extremes are exact."""
    x = np.zeros((1, 512, 512, 4), np.float32)
    x += np.arange(1, 5, dtype=np.float32)
    x[0, 3, 5, 2] = 1000.0
    observer = observed("percentile", [x], percentile=75.0)
    assert observer.range(0, 65535, False) == (0.0, 2000.0)
    # Channels 0 … 3 hold 1 … 4, a quarter each: the upper quarter begins between 3 and 4.
    assert 3.0 <= observer.range(0, 255, False)[1] <= 4.5


@pytest.mark.parametrize("name", OBSERVERS)
def test_memory_does_not_grow_with_samples(name: str) -> None:
    """Observing a thousand samples keeps no more than observing ten."""
    observer = make_observer(name, "t")
    random = np.random.default_rng(0)
    tracemalloc.start()
    held = []
    for count in (10, 500):
        for _ in range(count):
            observer.observe(random.normal(size=(1, 16, 16, 8)).astype(np.float32))
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] < held[0] + 10_000
