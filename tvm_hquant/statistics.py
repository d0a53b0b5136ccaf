"""Confidence intervals of what is measured on samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

_LARGEST_LOGARITHM = 500.0
"""Of a factor; exp of more than 709 is no float64."""


class Interval(NamedTuple):
    """An estimate with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float


def wilson_interval(successes: int, count: int, level: float = 0.95) -> Interval:
    """A proportion, by Wilson's score method (1927), which stays sensible near 0 and 1.

    Raises:
        ValueError: no trials, more successes than trials, or a level outside 0 … 1.
    """
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} successes of {count} trials")
    z = _normal_quantile(level)
    proportion = successes / count
    center = (proportion + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(proportion * (1 - proportion) / count + (z / (2 * count)) ** 2)
    # Exact at the ends, where rounding could leave the estimate just outside its own interval.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == count else center + half
    return Interval(proportion, low, high)


def paired_difference_interval(first: npt.ArrayLike, second: npt.ArrayLike, level: float = 0.95) -> Interval:
    """The difference of two proportions measured on the same samples: mean(first) − mean(second).

    Newcombe's hybrid score method for paired data (Statistics in Medicine 17, 1998, 2635–2650, method 10): Wilson
    intervals of both proportions, combined with the correlation between the two.

    Args:
        first, second: 0 or 1 (or bool) for each sample, [samples].

    Raises:
        ValueError: different lengths, no samples, or other values.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"paired samples have shapes {a.shape} and {b.shape}")
    if not (np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all()):
        raise ValueError("paired samples have to be 0 or 1")
    count = a.size
    both, neither = int(np.sum(a * b)), int(np.sum((1 - a) * (1 - b)))
    only_first, only_second = int(np.sum(a * (1 - b))), int(np.sum((1 - a) * b))
    p1, low1, high1 = wilson_interval(both + only_first, count, level)
    p2, low2, high2 = wilson_interval(both + only_second, count, level)
    correlation = _corrected_correlation(both, only_first, only_second, neither)
    below = (p1 - low1) ** 2 - 2 * correlation * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    above = (high1 - p1) ** 2 - 2 * correlation * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    difference = (only_first - only_second) / count
    return Interval(difference, difference - math.sqrt(max(below, 0.0)), difference + math.sqrt(max(above, 0.0)))


def bootstrap_interval(
    values: npt.ArrayLike,
    statistic: Callable[[Floats], float],
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 1000,
) -> Interval:
    """Any statistic of the samples, by the percentile bootstrap (Efron 1979).

    Args:
        values: [samples] or [samples, columns]; rows are drawn with replacement.
        statistic: of an array like ``values``.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: no samples, or a level outside 0 … 1.
    """
    rows = _rows(values)
    if not 0 < level < 1:
        raise ValueError(f"confidence level {level} is not between 0 and 1")
    drawn = _resampled(rows, statistic, seed, resamples)
    ends = ((1 - level) / 2, (1 + level) / 2)
    if np.isfinite(drawn).all():
        low, high = np.quantile(drawn, ends)
    else:  # between infinities nothing can be interpolated
        low, high = np.quantile(drawn, ends[0], method="lower"), np.quantile(drawn, ends[1], method="higher")
    return Interval(statistic(rows), float(low), float(high))


def proportion_upper_bound(successes: int, count: int, confidence: float = 0.9) -> float:
    """What a proportion is below with some confidence, exactly (C. Clopper, E. Pearson, Biometrika 26, 1934), one-sided.

    Of none in n trials it is 1 − (1 − confidence)^(1 / n): nearly 2.3 / n for 90 %, and 3 / n for 95 % (the rule of three).

    Raises:
        ValueError: no trials, more successes than trials, or a confidence outside 0.5 … 1.
    """
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} successes of {count} trials")
    _check_confidence(confidence)
    return 1.0 if successes == count else float(stats.beta.ppf(confidence, successes + 1, count - successes))


def factor_upper_bound(
    values: npt.ArrayLike,
    statistic: Callable[[Floats], float],
    confidence: float = 0.9,
    seed: int = 0,
    resamples: int = 200,
) -> float:
    """What a statistic that is never negative is below with some confidence, by the bootstrap of its logarithm.

    estimate · exp(t · s · √(n / (n − 1))), t being the quantile of Student's distribution with n − 1 degrees of freedom and s
    the standard deviation of the logarithm over resamples of the n rows: the error is a factor. Resamples scatter round the
    mean of these rows, so too little, by that root; one row says nothing of how others scatter, and its bound is infinite.
    Percentiles of resamples lie lower, too low where what raises the statistic are rare samples: where the given ones have
    too few of those, resamples have few too. A resample of n rows whose statistic is less than the n-th part of the estimate
    counts as having that.

    Args:
        values: [samples] or [samples, columns]; rows are drawn with replacement.
        statistic: of an array like ``values``.
        seed: the same seed gives the same bound.

    Raises:
        ValueError: no samples, or a confidence outside 0.5 … 1.
    """
    rows = _rows(values)
    _check_confidence(confidence)
    estimate, count = statistic(rows), len(rows)
    if estimate <= 0 or not math.isfinite(estimate):
        return estimate
    if count == 1:
        return math.inf
    drawn = np.maximum(_resampled(rows, statistic, seed, resamples), estimate / count)
    if not np.isfinite(drawn).all():
        return math.inf
    deviation = float(np.std(np.log(drawn))) * math.sqrt(count / (count - 1))
    return estimate * math.exp(min(float(stats.t.ppf(confidence, count - 1)) * deviation, _LARGEST_LOGARITHM))


def _check_confidence(confidence: float) -> None:
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0.5 and 1")


def _rows(values: npt.ArrayLike) -> Floats:
    rows = np.asarray(values, np.float64)
    if rows.ndim == 0 or rows.shape[0] == 0:
        raise ValueError("no samples to draw from")
    return rows


def _resampled(rows: Floats, statistic: Callable[[Floats], float], seed: int, resamples: int) -> list[float]:
    """The statistic of as many rows as there are, drawn with replacement, again and again."""
    random = np.random.default_rng(seed)
    return [statistic(rows[random.integers(0, len(rows), len(rows))]) for _ in range(resamples)]


def _corrected_correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """The phi coefficient of a 2 × 2 table, with Newcombe's continuity correction where it is positive."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    product = float(both * neither - only_first * only_second)
    if product > 0:
        product = max(product - (both + only_first + only_second + neither) / 2, 0.0)
    return product / math.sqrt(margins)


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"confidence level {level} is not between 0 and 1")
    return float(stats.norm.ppf((1 + level) / 2))
