"""Confidence intervals: published examples, coverage, and the ends of their ranges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tvm_hquant.statistics import (
    bootstrap_interval,
    factor_upper_bound,
    paired_difference_interval,
    proportion_upper_bound,
    wilson_interval,
)


def table(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Paired samples with these counts."""
    counts = (both, only_first, only_second, neither)
    return np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 500), share=st.floats(0, 1), level=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(count: int, share: float, level: float) -> None:
    """Against an independent implementation."""
    successes = round(share * count)
    expected = stats.binomtest(successes, count).proportion_ci(level, method="wilson")
    found = wilson_interval(successes, count, level)
    assert found == pytest.approx((successes / count, expected.low, expected.high), abs=1e-9)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_paired_difference_of_a_published_example() -> None:
    """Airway hyper-responsiveness before and after transplantation (Bentur et al. 2009; Fagerland, Lydersen and Laake
    2014 give −0.507 … −0.026 for Newcombe's method)."""
    found = paired_difference_interval(*table(1, 1, 7, 12))
    assert found == pytest.approx((-6 / 21, -0.507, -0.026), abs=6e-4)


@settings(max_examples=60, deadline=None)
@given(counts=st.tuples(*[st.integers(0, 60)] * 4).filter(lambda c: sum(c) > 0))
def test_paired_difference_is_antisymmetric_and_bounded(counts: tuple[int, int, int, int]) -> None:
    """Exchanging the two turns the interval around; it stays within −1 … 1 and around the estimate."""
    first, second = table(*counts)
    found, turned = paired_difference_interval(first, second), paired_difference_interval(second, first)
    assert found == pytest.approx((-turned.estimate, -turned.high, -turned.low), abs=1e-12)
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    wider = paired_difference_interval(first, second, 0.99)
    assert wider.low <= found.low <= found.high <= wider.high


def test_pairs_make_the_interval_narrower() -> None:
    """Two models that are nearly always right together are told apart far better than by two separate samples."""
    paired = paired_difference_interval(*table(350, 8, 4, 38))
    unrelated = paired_difference_interval(*table(320, 38, 34, 8))
    assert paired.estimate == unrelated.estimate
    assert paired.high - paired.low < 0.5 * (unrelated.high - unrelated.low)


def test_coverage_of_the_paired_interval() -> None:
    """About 95 of 100 intervals of simulated evaluations contain the true difference."""
    random = np.random.default_rng(0)
    shares, count, trials = (0.85, 0.03, 0.02, 0.10), 400, 1000
    hits = 0
    for counts in random.multinomial(count, shares, trials):
        found = paired_difference_interval(*table(*counts))
        hits += found.low <= 0.03 - 0.02 <= found.high
    assert 0.93 <= hits / trials <= 0.985


def test_bootstrap_of_a_mean() -> None:
    """Close to the interval of the normal distribution, and repeatable."""
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = bootstrap_interval(values, lambda v: float(np.mean(v)), seed=4)
    assert found == bootstrap_interval(values, lambda v: float(np.mean(v)), seed=4)
    half = 1.96 * values.std() / 20
    assert found == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=0.03)


def test_bootstrap_of_infinite_values() -> None:
    """An output with NaN is an infinite loss on its sample: the interval has an end there, not a number that is none."""
    values = np.array([np.inf, 1.0, 2.0])
    assert bootstrap_interval(values, lambda v: float(np.mean(v)))[1:] == (1.0, np.inf)
    assert bootstrap_interval([np.inf], lambda v: float(np.mean(v))) == (np.inf, np.inf, np.inf)


def test_upper_bound_by_a_factor() -> None:
    """It has no unit, tightens with samples, holds about as often as it says for a skewed mean, and is 0 where all is."""
    random = np.random.default_rng(0)
    draws = random.lognormal(sigma=1.0, size=(150, 80))
    bounds = [factor_upper_bound(values, np.mean, seed=n, resamples=100) for n, values in enumerate(draws)]
    assert 0.8 <= np.mean(np.array(bounds) >= np.exp(0.5)) <= 0.95
    assert factor_upper_bound(1e-3 * draws[0], np.mean) == pytest.approx(1e-3 * factor_upper_bound(draws[0], np.mean))
    few, many = draws[0, :20], draws[:20].ravel()
    assert np.mean(many) < factor_upper_bound(many, np.mean) < np.mean(many) * 1.1
    assert factor_upper_bound(few, np.mean) > np.mean(few) * 1.1
    assert factor_upper_bound(np.zeros(5), np.mean) == 0.0
    assert factor_upper_bound([1.0, np.inf], np.mean) == np.inf


def test_upper_bound_needs_more_than_one_sample() -> None:
    """One sample has no scatter that would show; two have little, and the bound allows for that."""
    assert factor_upper_bound([0.3], np.mean) == np.inf
    assert factor_upper_bound([0.0], np.mean) == 0.0
    random = np.random.default_rng(0)
    draws = random.lognormal(sigma=0.5, size=(300, 2))
    bounds = [factor_upper_bound(values, np.mean, seed=n) for n, values in enumerate(draws)]
    assert np.mean(np.array(bounds) >= np.exp(0.125)) >= 0.8


def test_upper_bound_of_a_proportion() -> None:
    """None of n is no proof of never: the rule of three. Against SciPy's two-sided interval, and how often it holds."""
    assert proportion_upper_bound(0, 50) == pytest.approx(1 - 0.1 ** (1 / 50))
    assert proportion_upper_bound(0, 100, 0.95) == pytest.approx(3 / 100, rel=0.02)
    assert proportion_upper_bound(7, 7) == 1.0
    both_sides = stats.binomtest(3, 40).proportion_ci(0.8, method="exact")
    assert proportion_upper_bound(3, 40) == pytest.approx(both_sides.high)
    drawn = np.random.default_rng(0).binomial(50, 0.03, 2000)
    assert np.mean([proportion_upper_bound(int(k), 50) >= 0.03 for k in drawn]) >= 0.9


def test_wrong_arguments() -> None:
    """Mistakes of the caller are told at once."""
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson_interval(5, 4)
    with pytest.raises(ValueError, match="level 1"):
        wilson_interval(1, 4, 1.0)
    with pytest.raises(ValueError, match="shapes"):
        paired_difference_interval([1, 0], [1])
    with pytest.raises(ValueError, match="0 or 1"):
        paired_difference_interval([0.5], [1])
    with pytest.raises(ValueError, match="no samples"):
        bootstrap_interval([], np.mean)
    with pytest.raises(ValueError, match="no samples"):
        factor_upper_bound([], np.mean)
    with pytest.raises(ValueError, match=r"confidence 0\.1"):
        factor_upper_bound([1.0], np.mean, 0.1)
    with pytest.raises(ValueError, match="3 successes of 2"):
        proportion_upper_bound(3, 2)
