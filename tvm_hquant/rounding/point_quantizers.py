"""The quantizers that a sum of low-bit tensors can be made of: each makes one point of what the points before it left.

All work on matrices: a row for each output channel, float64, with one step size for each row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.calibration.input_moments import InputMoments
from tvm_hquant.numerics import limited_scales, smallest_scale, weight_code_limit
from tvm_hquant.rounding.output_error import closest_codes, regularized
from tvm_hquant.rounding.power_of_two import power_of_two_codes

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

_STEP_PARTS = np.linspace(0.2, 1.0, 33)
"""Step sizes that are tried, over the one that reaches the largest weight of a row: it comes last and wins ties."""


class PointQuantizer(ABC):
    """Rounds the rows of a matrix, and says what an error in them weighs.

    Attributes:
        has_free_steps: whether a step size may be any number, so that the steps of several points can be fitted together.
        refinements: how often all points of a sum are rounded again, at most, each to what the others leave.
    """

    has_free_steps: bool = True
    refinements: int = 4

    @abstractmethod
    def codes(self, rows: Doubles, steps: Doubles, bits: int) -> Doubles:
        """Integers for rows [out, columns] with steps [out]."""

    def inner(self, a: Doubles, b: Doubles) -> Doubles:
        """[out]: the inner product of the rows of ``a`` and ``b`` in which errors are measured."""
        return np.asarray(np.sum(a * b, axis=1), np.float64)

    def point(self, rows: Doubles, bits: int, smallest: float | None, tied: bool) -> tuple[Doubles, Doubles]:
        """Codes [out, columns] and steps [out] of one point: for each row the step with the least error among 33.

        Args:
            rows: [out, columns].
            bits: 2 to 8.
            smallest: no step is less; 2⁻²⁴ of the largest step if None.
            tied: all rows have the same step.
        """
        largest = np.abs(rows).max(axis=1, initial=0.0) / weight_code_limit(bits)
        if tied:
            largest = np.full_like(largest, largest.max(initial=0.0))
        smallest = smallest_scale(largest) if smallest is None else smallest
        best = np.full(len(rows), np.inf)
        codes, steps = np.zeros_like(rows), limited_scales(largest, smallest).astype(np.float64)
        for part in _STEP_PARTS:
            tried = limited_scales(largest * part, smallest).astype(np.float64)
            rounded = self._quick_codes(rows, tried, bits)
            rest = rows - tried[:, None] * rounded
            error = pooled(np.sum(rest**2, axis=1), tied)
            better = error <= best
            best = np.where(better, error, best)
            codes[better] = rounded[better]
            steps = np.where(better, tried, steps)
        return codes, steps

    def _quick_codes(self, rows: Doubles, steps: Doubles, bits: int) -> Doubles:
        """Codes by which steps are compared."""
        return self.codes(rows, steps, bits)


class NearestQuantizer(PointQuantizer):
    """Each weight to the nearest code, ties to even."""

    def codes(self, rows: Doubles, steps: Doubles, bits: int) -> Doubles:
        limit = weight_code_limit(bits)
        return np.asarray(np.clip(np.rint(rows / steps[:, None]), -limit, limit), np.float64)


class FloorQuantizer(PointQuantizer):
    """⌊v/α⌋, the quantizer of Zharikov and Sedova, "Post Training Quantization. Flexible continuous modification"."""

    def codes(self, rows: Doubles, steps: Doubles, bits: int) -> Doubles:
        limit = weight_code_limit(bits)
        return np.asarray(np.clip(np.floor(rows / steps[:, None]), -limit, limit), np.float64)


class PowerOfTwoQuantizer(PointQuantizer):
    """Steps that are powers of two (:mod:`tvm_hquant.rounding.power_of_two`)."""

    has_free_steps = False

    def codes(self, rows: Doubles, steps: Doubles, bits: int) -> Doubles:
        limit = weight_code_limit(bits)
        return np.asarray(np.clip(np.rint(rows / steps[:, None]), -limit, limit), np.float64)

    def point(self, rows: Doubles, bits: int, smallest: float | None, tied: bool) -> tuple[Doubles, Doubles]:
        return power_of_two_codes(rows, bits, tied)


@dataclass(frozen=True, eq=False)
class OutputErrorQuantizer(NearestQuantizer):
    """Codes for the least error of the layer's output (:mod:`tvm_hquant.rounding.output_error`).

    Steps are compared by the error of rounding to nearest, since the search for codes is dear; for the same reason there is
    one refinement.
    """

    moments: InputMoments
    refinements: int = 1

    def codes(self, rows: Doubles, steps: Doubles, bits: int) -> Doubles:
        targets = self._by_group(rows / steps[:, None])
        codes = np.empty_like(targets)
        for block, covariance in self._blocks:
            codes[:, :, block] = closest_codes(targets[:, :, block], covariance, weight_code_limit(bits))
        return codes.reshape(rows.shape)

    def inner(self, a: Doubles, b: Doubles) -> Doubles:
        left, right = self._by_group(a), self._by_group(b)
        total = np.zeros(left.shape[:2])
        for block, covariance in self._blocks:
            total += np.sum((left[:, :, block] @ covariance) * right[:, :, block], axis=2)
        return total.reshape(-1)

    def point(self, rows: Doubles, bits: int, smallest: float | None, tied: bool) -> tuple[Doubles, Doubles]:
        _, steps = super().point(rows, bits, smallest, tied)
        return self.codes(rows, steps, bits), steps

    def _quick_codes(self, rows: Doubles, steps: Doubles, bits: int) -> Doubles:
        return super().codes(rows, steps, bits)

    def _by_group(self, rows: Doubles) -> Doubles:
        groups = len(self.moments.means)
        return rows.reshape(groups, len(rows) // groups, -1)

    @cached_property
    def _blocks(self) -> tuple[tuple[slice, Doubles], ...]:
        """Columns that are correlated with each other, with their covariance [groups, block, block]."""
        blocks, start = [], 0
        for covariance in self.moments.covariances:
            stop = start + covariance.shape[1]
            blocks.append((slice(start, stop), regularized(covariance, self.moments.count)))
            start = stop
        return tuple(blocks)


def pooled(values: Doubles, tied: bool) -> Doubles:
    """[out, …]: where rows share their steps, each row has the sum over all rows."""
    return np.broadcast_to(values.sum(axis=0, keepdims=True), values.shape) if tied else values
