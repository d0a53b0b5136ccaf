"""Observers: they watch a tensor over all calibration samples in one pass and say which range its codes should span.

An observer's memory does not grow with the samples. Observers of one tensor that saw different samples, in different
processes perhaps, are merged into what one of them would have become by seeing all.
"""

from __future__ import annotations

import math
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from tvm_hquant.calibration.histogram import Floats, Histogram, HistogramRow
from tvm_hquant.calibration.range_search import Range, least_error_range, percentile_range, power_of_two_range
from tvm_hquant.calibration.samples import Array
from tvm_hquant.errors import DataError

OBSERVERS = ("min-max", "percentile", "mean-squared-error", "power-of-two")
"""The names that :func:`make_observer` takes."""

_BINS = 4096
_BINS_PER_CHANNEL = 512
_VALUES_PER_CALL = 2**18
_CODES_WITHOUT_WIDENING = 4096
_WIDENING = 2.0


class Observer(Protocol):
    """What calibration needs of an observer."""

    @property
    def tensor(self) -> str:
        """The tensor's name, for messages."""

    @property
    def observations(self) -> int:
        """How many arrays were seen."""

    def observe(self, x: Array) -> None:
        """Takes in the tensor of one sample or batch: floats of any shape, channels last.

        Raises:
            DataError: NaN, infinity, or no elements at all.
        """

    def merge(self, other: Self) -> Self:
        """A new observer that has seen what both have."""

    def range(self, q_min: int, q_max: int, symmetric: bool) -> tuple[float, float]:
        """Lowest and highest real value for codes q_min … q_max of the whole tensor; lower ≤ 0 ≤ upper.

        Both are 0 for a tensor of zeros. Symmetric ranges are (−u, u), for codes with zero point 0 and scale u / q_max.
        With more than 4096 codes it is twice the range seen, whatever the method: steps are then so small that values
        of new samples outside the range would make most of the error.

        Raises:
            DataError: nothing was observed.
        """

    def channel_ranges(self, q_min: int, q_max: int, symmetric: bool) -> tuple[Floats, Floats]:
        """The same for each channel, float64 [channels] each; for observers made with ``per_channel``."""


class MinMaxObserver:
    """The lowest and the highest value seen.

    Args:
        tensor: name for messages.
        per_channel: keep one range per entry of the last axis instead of one for the tensor.
    """

    def __init__(self, tensor: str, per_channel: bool = False) -> None:
        self.tensor = tensor
        self.per_channel = per_channel
        self.observations = 0
        self.lower: Floats = np.zeros(0)
        self.upper: Floats = np.zeros(0)

    def observe(self, x: Array) -> None:
        """See :meth:`Observer.observe`."""
        values = np.asarray(x, np.float32)
        if values.size == 0:
            raise DataError(f"tensor {self.tensor}: has no elements (shape {list(values.shape)})")
        rows = values.reshape(-1, values.shape[-1]) if self.per_channel and values.ndim else values.reshape(-1, 1)
        lower, upper = _extremes(rows)
        # NaN and infinity both survive in one of the extremes.
        if not (np.isfinite(lower).all() and np.isfinite(upper).all()):
            raise DataError(
                f"tensor {self.tensor}: holds NaN or infinity in observation {self.observations}: the float model "
                "overflows on this sample; check its preprocessing, or leave the sample out"
            )
        if self.observations and len(self.lower) != len(lower):
            raise ValueError(f"tensor {self.tensor} had {len(self.lower)} channels before, now {len(lower)}")
        lower, upper = np.minimum(lower, 0.0), np.maximum(upper, 0.0)
        self._count(rows, lower, upper)
        self.lower = np.minimum(self.lower, lower) if self.observations else lower
        self.upper = np.maximum(self.upper, upper) if self.observations else upper
        self.observations += 1

    def merge(self, other: Self) -> Self:
        """See :meth:`Observer.merge`."""
        if (self.tensor, self.per_channel) != (other.tensor, other.per_channel):
            raise ValueError(f"observers of {self.tensor} and {other.tensor} cannot be merged")
        merged = self._unused()
        if not (self.observations and other.observations):
            seen = self if self.observations else other
            merged.lower, merged.upper = seen.lower.copy(), seen.upper.copy()
        else:
            merged.lower, merged.upper = np.minimum(self.lower, other.lower), np.maximum(self.upper, other.upper)
        merged.observations = self.observations + other.observations
        return merged

    def range(self, q_min: int, q_max: int, symmetric: bool) -> tuple[float, float]:
        """See :meth:`Observer.range`."""
        if self.per_channel:
            raise ValueError(f"the observer of {self.tensor} keeps one range per channel: use channel_ranges")
        lower, upper = self._ranges(q_min, q_max, symmetric)[0]
        return lower, upper

    def channel_ranges(self, q_min: int, q_max: int, symmetric: bool) -> tuple[Floats, Floats]:
        """See :meth:`Observer.channel_ranges`."""
        if not self.per_channel:
            raise ValueError(f"the observer of {self.tensor} keeps one range for the tensor: use range")
        bounds = np.array(self._ranges(q_min, q_max, symmetric), np.float64)
        return bounds[:, 0], bounds[:, 1]

    def _ranges(self, q_min: int, q_max: int, symmetric: bool) -> list[Range]:
        if not self.observations:
            raise DataError(f"tensor {self.tensor}: nothing was observed; calibrate with at least one sample")
        is_wide = q_max - q_min >= _CODES_WITHOUT_WIDENING
        found = []
        for index, (lower, upper) in enumerate(zip(self.lower.tolist(), self.upper.tolist(), strict=True)):
            if is_wide:
                bounds = self._refined(index, (_WIDENING * lower, _WIDENING * upper), q_min, q_max, symmetric)
            else:
                bounds = self._choose(index, q_min, q_max, symmetric)
            largest = max(-bounds[0], bounds[1])
            found.append((-largest, largest) if symmetric else bounds)
        return found

    # What follows is where the other observers differ.

    def _unused(self) -> Self:
        """An observer of the same kind that has seen nothing."""
        return type(self)(self.tensor, self.per_channel)

    def _count(self, rows: npt.NDArray[np.float32], lower: Floats, upper: Floats) -> None:
        """Takes in values [count, channels] that lie within lower … upper."""

    def _choose(self, index: int, q_min: int, q_max: int, symmetric: bool) -> Range:
        """The range of one channel, or of the tensor, for up to 4096 codes."""
        return float(self.lower[index]), float(self.upper[index])

    def _refined(self, index: int, bounds: Range, q_min: int, q_max: int, symmetric: bool) -> Range:
        """What becomes of a widened range."""
        return bounds


class HistogramObserver(MinMaxObserver):
    """Keeps the extremes of all values, and a histogram of at most 2^18 evenly spaced ones of each array."""

    def __init__(self, tensor: str, per_channel: bool = False) -> None:
        super().__init__(tensor, per_channel)
        self.histogram: Histogram | None = None

    def merge(self, other: Self) -> Self:
        """See :meth:`Observer.merge`."""
        merged = super().merge(other)
        if self.histogram is None or other.histogram is None:
            merged.histogram = self.histogram or other.histogram
        else:
            merged.histogram = self.histogram.merged(other.histogram)
        return merged

    def _count(self, rows: npt.NDArray[np.float32], lower: Floats, upper: Floats) -> None:
        channels = rows.shape[1]
        if self.histogram is None:
            self.histogram = Histogram.empty(channels, _BINS_PER_CHANNEL if self.per_channel else _BINS)
        step = _sampling_step(rows.shape[0], channels)
        self.histogram = self.histogram.extended(lower, upper).counted(rows[::step], step)

    def _histogram_row(self, index: int) -> HistogramRow:
        if self.histogram is None:
            raise DataError(f"tensor {self.tensor}: nothing was observed; calibrate with at least one sample")
        return self.histogram.row(index)


class PercentileObserver(HistogramObserver):
    """Leaves out the ``100 − percentile`` percent of values that are highest, and as many that are lowest."""

    def __init__(self, tensor: str, per_channel: bool = False, percentile: float = 99.99) -> None:
        if not 50 <= percentile <= 100:
            raise DataError(f"percentile {percentile} is not within 50 … 100")
        super().__init__(tensor, per_channel)
        self.percentile = percentile

    def _unused(self) -> Self:
        return type(self)(self.tensor, self.per_channel, self.percentile)

    def _choose(self, index: int, q_min: int, q_max: int, symmetric: bool) -> Range:
        return percentile_range(self._histogram_row(index), self.percentile)


class MeanSquaredErrorObserver(HistogramObserver):
    """The range with the least expected squared error; errors of clipped values count ``clipping_weight`` times."""

    def __init__(self, tensor: str, per_channel: bool = False, clipping_weight: float = 1.0) -> None:
        if not (math.isfinite(clipping_weight) and clipping_weight > 0):
            raise DataError(f"the weight of clipping errors is {clipping_weight}; it has to be positive")
        super().__init__(tensor, per_channel)
        self.clipping_weight = clipping_weight

    def _unused(self) -> Self:
        return type(self)(self.tensor, self.per_channel, self.clipping_weight)

    def _choose(self, index: int, q_min: int, q_max: int, symmetric: bool) -> Range:
        return least_error_range(self._histogram_row(index), q_min, q_max, symmetric, self.clipping_weight)


class PowerOfTwoObserver(HistogramObserver):
    """A range whose scale is a power of two, for hardware that only shifts: of those near the extremes, the best."""

    def _choose(self, index: int, q_min: int, q_max: int, symmetric: bool) -> Range:
        return self._refined(index, super()._choose(index, q_min, q_max, symmetric), q_min, q_max, symmetric)

    def _refined(self, index: int, bounds: Range, q_min: int, q_max: int, symmetric: bool) -> Range:
        return power_of_two_range(self._histogram_row(index), bounds, q_min, q_max, symmetric)


def make_observer(
    name: str, tensor: str, per_channel: bool = False, percentile: float = 99.99, clipping_weight: float = 1.0
) -> Observer:
    """An observer of the tensor called ``tensor``.

    Args:
        name: ``min-max``, ``percentile``, ``mean-squared-error`` or ``power-of-two``.
        tensor: for messages.
        per_channel: one range per entry of the last axis.
        percentile: percent of the values to keep on either side, for ``percentile``.
        clipping_weight: how many times the errors of clipped values count, for ``mean-squared-error``.

    Raises:
        DataError: no observer has that name, or an option is out of bounds.
    """
    if name == "min-max":
        return MinMaxObserver(tensor, per_channel)
    if name == "percentile":
        return PercentileObserver(tensor, per_channel, percentile)
    if name == "mean-squared-error":
        return MeanSquaredErrorObserver(tensor, per_channel, clipping_weight)
    if name == "power-of-two":
        return PowerOfTwoObserver(tensor, per_channel)
    raise DataError(f"unknown observer {name!r}: use one of {', '.join(OBSERVERS)}")


def _extremes(rows: npt.NDArray[np.float32]) -> tuple[Floats, Floats]:
    if rows.shape[1] == 1:  # Much faster than along an axis.
        return np.array([rows.min()], np.float64), np.array([rows.max()], np.float64)
    return rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64)


def _sampling_step(positions: int, channels: int) -> int:
    """The smallest step with few enough values that meets all rows, columns and channels of the tensor alike."""
    step = max(1, math.ceil(positions * channels / _VALUES_PER_CALL))
    while math.gcd(step, positions) != 1:
        step += 1
    return step
