"""From a histogram to the range that codes should span."""

from __future__ import annotations

import math

import numpy as np

from tvm_hquant.calibration.histogram import Floats, HistogramRow, Integers

Range = tuple[float, float]

_CANDIDATES = 96
_CANDIDATES_PER_SIDE = 64
_SMALLEST_FRACTION = 2.0**-6
_CHECKED_EXACTLY = 24
_BINS_PER_STEP = 4
_LEAST_BINS = 16
_CODES_NEAR_ZERO = 8


def percentile_range(row: HistogramRow, percentile: float) -> Range:
    """The range that leaves out at most ``100 − percentile`` percent of the values on either side.

    Within a bin values are taken to be spread evenly.
    """
    counts = row.counts.copy()
    counts[int(np.searchsorted(row.edges, 0.0))] += row.zeros
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    total = cumulative[-1]
    left_out = total * (100.0 - percentile) / 100.0
    lower = float(np.interp(left_out, cumulative, row.edges))
    # From the top, so that a long tail of empty bins above the last value is not taken for part of it.
    upper = float(np.interp(-(total - left_out), -cumulative[::-1], row.edges[::-1]))
    return max(min(lower, 0.0), row.lower), min(max(upper, 0.0), row.upper)


def least_error_range(
    row: HistogramRow, q_min: int, q_max: int, symmetric: bool, clipping_weight: float = 1.0
) -> Range:
    """The range with the least expected squared error of quantization.

    First all candidates are rated by a formula: values outside the range cost their squared distance to the bound;
    values inside cost their squared distance to the nearest of the 17 codes around zero, where most of them are, and
    Δ²/12 further away, Δ being the step. Candidates are 96 fractions of the extremes, from 1 down to 1/64 in equal
    ratios, or all pairs of 64 fractions of both extremes. The best of them and the extremes themselves are then
    quantized, bin by bin, where bins are fine enough for that; so a tensor whose values lie on the codes of the full
    range, such as pixels, is not clipped.

    ``clipping_weight`` multiplies the errors outside. (The idea of minimizing that error over a histogram is common
    practice: TensorRT's and ONNX Runtime's calibrators with other criteria, Banner et al. 2019, arXiv 1810.05723, in
    closed form.)
    """
    if row.upper - row.lower < _LEAST_BINS * row.width:
        return row.lower, row.upper
    is_one_sided = symmetric or row.lower == 0.0 or row.upper == 0.0
    fractions = np.geomspace(1.0, _SMALLEST_FRACTION, _CANDIDATES if is_one_sided else _CANDIDATES_PER_SIDE)
    if symmetric:
        uppers = max(-row.lower, row.upper) * fractions
        lowers = -uppers
        steps = uppers / q_max
    else:
        upper_candidates = row.upper * fractions if row.upper > 0 else np.zeros(1)
        lower_candidates = row.lower * fractions if row.lower < 0 else np.zeros(1)
        lowers, uppers = (grid.reshape(-1) for grid in np.meshgrid(lower_candidates, upper_candidates))
        steps = (uppers - lowers) / (q_max - q_min)
    errors = _estimated_error(row, lowers, uppers, steps, clipping_weight)
    best = np.argsort(errors, kind="stable")[:_CHECKED_EXACTLY]
    # Candidate 0 is the full range; being first it also wins ties.
    considered = [0, *(int(i) for i in best if i != 0)]
    exact = [
        squared_error(row, (float(lowers[i]), float(uppers[i])), q_min, q_max, symmetric, clipping_weight)
        if steps[i] >= _BINS_PER_STEP * row.width
        else float(errors[i])
        for i in considered
    ]
    chosen = considered[int(np.argmin(exact))]
    return float(lowers[chosen]), float(uppers[chosen])


def power_of_two_range(row: HistogramRow, bounds: Range, q_min: int, q_max: int, symmetric: bool) -> Range:
    """A range whose step is a power of two: the one around ``bounds``, or a smaller one if its expected error is less.

    (upper − lower) / (q_max − q_min), or upper / q_max if symmetric, is a power of two exactly, and 0 is a code.
    """
    lower, upper = bounds
    if lower == upper == 0.0:
        return 0.0, 0.0
    exact_step = max(-lower, upper) / q_max if symmetric else (upper - lower) / (q_max - q_min)
    # log2 may be off by an ulp at a power of two itself, hence the comparison.
    exponent = math.frexp(exact_step)[1] - (math.frexp(exact_step)[0] == 0.5)
    candidates: list[tuple[float, Range]] = []
    for step in (math.ldexp(1.0, exponent - halvings) for halvings in range(4)):
        if symmetric:
            ranges = [(-step * q_max, step * q_max)]
        else:
            points = _zero_points(round(q_min - lower / step), round(q_max - upper / step), bounds)
            within = [min(max(point, q_min), q_max) for point in points]
            ranges = [((q_min - point) * step, (q_max - point) * step) for point in within]
        candidates += [(_error(row, r, step, q_min, q_max, symmetric), r) for r in ranges]
    return min(candidates, key=lambda candidate: candidate[0])[1]


def squared_error(
    row: HistogramRow, bounds: Range, q_min: int, q_max: int, symmetric: bool, clipping_weight: float = 1.0
) -> float:
    """Sum of the squared errors when the centers of all bins are quantized with the scale and zero point of a range."""
    lower, upper = bounds
    step = max(-lower, upper) / q_max if symmetric else (upper - lower) / (q_max - q_min)
    zero_point = 0 if symmetric else min(max(round(q_min - lower / step), q_min), q_max)
    codes = np.rint(row.centers / step)
    clipped = np.clip(codes, q_min - zero_point, q_max - zero_point)
    weights = np.where(codes == clipped, row.counts, row.counts * clipping_weight)
    return float(np.sum(weights * (row.centers - clipped * step) ** 2))


def _zero_points(lowest_reached: int, highest_reached: int, bounds: Range) -> list[int]:
    """Zero points worth trying between one that just reaches the lower bound and one that just reaches the upper."""
    if highest_reached < lowest_reached:  # Not enough codes for both.
        return [lowest_reached, highest_reached]
    if bounds[0] == 0.0:
        return [lowest_reached]
    if bounds[1] == 0.0:
        return [highest_reached]
    return [(lowest_reached + highest_reached) // 2]


def _error(row: HistogramRow, bounds: Range, step: float, q_min: int, q_max: int, symmetric: bool) -> float:
    if step >= _BINS_PER_STEP * row.width:
        return squared_error(row, bounds, q_min, q_max, symmetric)
    lower, upper = (np.array([bound]) for bound in bounds)
    return float(_estimated_error(row, lower, upper, np.array([step]), 1.0)[0])


def _estimated_error(
    row: HistogramRow, lowers: Floats, uppers: Floats, steps: Floats, clipping_weight: float
) -> Floats:
    count, total, squares = row.moments
    below, above = _bins_below(row, lowers), _bins_below(row, uppers)
    rounding = np.zeros_like(steps)
    near_low, near_high = above, below
    for code in range(-_CODES_NEAR_ZERO, _CODES_NEAR_ZERO + 1):
        first = np.clip(_bins_below(row, (code - 0.5) * steps), below, above)
        last = np.clip(_bins_below(row, (code + 0.5) * steps), below, above)
        near_low, near_high = np.minimum(near_low, first), np.maximum(near_high, last)
        value = code * steps
        rounding += squares[last] - squares[first] - 2 * value * (total[last] - total[first])
        rounding += value**2 * (count[last] - count[first])
    far = count[above] - count[below] - (count[near_high] - count[near_low])
    low = squares[below] - 2 * lowers * total[below] + lowers**2 * count[below]
    high = (
        (squares[-1] - squares[above])
        - 2 * uppers * (total[-1] - total[above])
        + uppers**2 * (count[-1] - count[above])
    )
    # Differences of sums can come out a little below zero.
    clipping = np.maximum(low, 0.0) + np.maximum(high, 0.0)
    estimated: Floats = np.maximum(rounding, 0.0) + far * steps**2 / 12 + clipping_weight * clipping
    return estimated


def _bins_below(row: HistogramRow, values: Floats) -> Integers:
    """How many bins have their centers below each value."""
    position = np.rint((values - row.edges[0]) / row.width)
    return np.asarray(np.clip(position, 0, len(row.counts)), np.int64)
