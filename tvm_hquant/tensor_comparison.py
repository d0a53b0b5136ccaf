"""How the tensors of a compiled module are compared with what they must be: bit for bit, or by limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tvm_hquant import numerics

Array = npt.NDArray[Any]


class ExpectedTensor(Protocol):
    """What a tensor must be."""

    def differences(self, actual: Array) -> tuple[int, float]:
        """How many elements are not what they must be, and by how much at most."""


@dataclass(frozen=True, eq=False)
class ExactValues:
    """These bits."""

    values: Array

    def differences(self, actual: Array) -> tuple[int, float]:
        return differences(actual, self.values)


@dataclass(frozen=True, eq=False)
class WithinLimits:
    """Values of a float storage between limits."""

    limits: numerics.ValueLimits
    storage: str

    def differences(self, actual: Array) -> tuple[int, float]:
        return numerics.beyond_limits(actual, self.limits, self.storage)


def differences(actual: Array, expected: Array) -> tuple[int, float]:
    """How many elements differ in their bits (all NaN count as one value), and by how much at most."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return max(actual.size, 1), float("inf")
    both_nan = np.isnan(actual) & np.isnan(expected) if actual.dtype.kind == "f" else np.zeros(actual.shape, bool)
    bits = f"u{actual.dtype.itemsize}"
    different = (np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)) & ~both_nan
    count = int(different.sum())
    if count == 0:
        return 0, 0.0
    with np.errstate(invalid="ignore"):
        gaps = np.abs(actual[different].astype(np.float64) - expected[different].astype(np.float64))
    return count, float(np.nan_to_num(gaps, nan=np.inf).max())
