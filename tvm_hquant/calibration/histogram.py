"""Histograms that grow with what they see, and can be merged without any loss.

Bins are ``2^e`` wide and start at multiples of that, ``e`` being the smallest exponent with which the bins reach from
the lowest to the highest value seen. Doubling the width joins whole bins, so no count is ever spread over two, and the
result does not depend on the order of the values or on how they were divided among several histograms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_LOWEST_EXPONENT = -126  # 2^-126 and its inverse are normal float32 numbers.
_LARGEST_SHIFT = 62


@dataclass(frozen=True, eq=False)
class HistogramRow:
    """The histogram of one tensor or channel.

    Attributes:
        counts: float64 [bins], values in each bin, without those that are exactly zero.
        edges: float64 [bins + 1], where bins start and end.
        centers: float64 [bins], what the values of a bin are taken for; within lower … upper.
        zeros: how many values were exactly zero.
        width: of a bin.
        lower, upper: lowest and highest value seen; lower ≤ 0 ≤ upper.
    """

    counts: Floats
    edges: Floats
    centers: Floats
    zeros: int
    width: float
    lower: float
    upper: float

    @cached_property
    def moments(self) -> tuple[Floats, Floats, Floats]:
        """Sums of 1, x and x² over the first 0, 1, … bins; float64 [bins + 1] each."""
        powers = (np.ones_like(self.centers), self.centers, self.centers**2)
        sums = [np.concatenate([[0.0], np.cumsum(self.counts * power)]) for power in powers]
        return sums[0], sums[1], sums[2]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Histograms of ``rows`` tensors or channels with the same number of bins.

    Attributes:
        lower, upper: float64 [rows], the range the bins have to cover; lower ≤ 0 ≤ upper.
        exponent: int64 [rows], bins are 2^exponent wide.
        origin: int64 [rows], the first bin starts at origin · 2^exponent.
        counts: int64 [rows, bins], exact zeros included.
        zeros: int64 [rows], values that are exactly zero.
    """

    lower: Floats
    upper: Floats
    exponent: Integers
    origin: Integers
    counts: Integers
    zeros: Integers

    @staticmethod
    def empty(rows: int, bins: int) -> Histogram:
        """No values yet."""
        zero = np.zeros(rows)
        exponent, origin = _grid(zero, zero, bins)
        return Histogram(zero, zero, exponent, origin, np.zeros((rows, bins), np.int64), np.zeros(rows, np.int64))

    def extended(self, lower: Floats, upper: Floats) -> Histogram:
        """The same values, with bins that also cover lower … upper (float64 [rows])."""
        low, high = np.minimum(self.lower, lower), np.maximum(self.upper, upper)
        rows, bins = self.counts.shape
        exponent, origin = _grid(low, high, bins)
        if np.array_equal(exponent, self.exponent) and np.array_equal(origin, self.origin):
            return Histogram(low, high, exponent, origin, self.counts, self.zeros)
        row, column = self.counts.nonzero()
        shift = np.minimum(exponent - self.exponent, _LARGEST_SHIFT)[row]
        target = ((self.origin[row] + column) >> shift) - origin[row]
        counts = np.zeros((rows, bins), np.int64)
        np.add.at(counts, (row, target), self.counts[row, column])
        return Histogram(low, high, exponent, origin, counts, self.zeros)

    def counted(self, values: npt.NDArray[np.float32], weight: int = 1) -> Histogram:
        """With ``values``, float32 [count, rows], each counted ``weight`` times; they lie within lower … upper."""
        rows, bins = self.counts.shape
        inverse_width = np.ldexp(np.float32(1), -self.exponent.astype(np.int32))
        # A product with a power of two is exact, so a value falls into the same bin in whatever order values come.
        index = np.floor(values * inverse_width).astype(np.int32)
        index += (np.arange(rows) * bins - self.origin).astype(np.int32)
        counts = np.bincount(index.reshape(-1), minlength=rows * bins).reshape(rows, bins)
        zeros = values.shape[0] - np.count_nonzero(values, axis=0)
        return Histogram(
            self.lower,
            self.upper,
            self.exponent,
            self.origin,
            self.counts + counts * weight,
            self.zeros + np.asarray(zeros, np.int64) * weight,
        )

    def merged(self, other: Histogram) -> Histogram:
        """The values of both; they have the same rows and bins."""
        left = self.extended(other.lower, other.upper)
        right = other.extended(self.lower, self.upper)
        return Histogram(
            left.lower,
            left.upper,
            left.exponent,
            left.origin,
            left.counts + right.counts,
            left.zeros + right.zeros,
        )

    def row(self, index: int) -> HistogramRow:
        """The histogram of one tensor or channel."""
        width = float(np.ldexp(1.0, int(self.exponent[index])))
        lower, upper = float(self.lower[index]), float(self.upper[index])
        bins = self.counts.shape[1]
        edges = (self.origin[index] + np.arange(bins + 1)) * width
        centers = np.clip(edges[:-1] + width / 2, lower, upper)
        counts = self.counts[index].astype(np.float64)
        counts[-int(self.origin[index])] -= int(self.zeros[index])
        return HistogramRow(counts, edges, centers, int(self.zeros[index]), width, lower, upper)


def _grid(lower: Floats, upper: Floats, bins: int) -> tuple[Integers, Integers]:
    """The smallest exponents and the origins with which ``bins`` bins cover lower … upper; depends on nothing else."""
    with np.errstate(divide="ignore"):
        start = np.floor(np.log2((upper - lower) / bins)) - 1
    exponent = np.maximum(start, _LOWEST_EXPONENT).astype(np.int64)
    while True:
        first = np.floor(np.ldexp(lower, -exponent)).astype(np.int64)
        last = np.floor(np.ldexp(upper, -exponent)).astype(np.int64)
        too_narrow = last - first >= bins
        if not too_narrow.any():
            return exponent, first
        exponent = exponent + too_narrow
