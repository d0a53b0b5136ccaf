"""Means of the channels of tensors, over all positions and samples."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import numpy.typing as npt


class ChannelMeans:
    """Sums channels of the tensors called ``names``, in memory that does not depend on the number of samples."""

    def __init__(self, names: Set[str]) -> None:
        self._names = frozenset(names)
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}

    def observe(self, name: str, values: npt.NDArray[Any]) -> None:
        """Takes in a tensor whose last axis is the channel; others than ``names`` are left out."""
        if name not in self._names:
            return
        rows = values.reshape(-1, values.shape[-1])
        # A product with ones is much faster than a sum along an axis of small rows.
        total = (np.ones((1, len(rows)), np.float32) @ rows.astype(np.float32, copy=False))[0].astype(np.float64)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def means(self) -> dict[str, npt.NDArray[np.float64]]:
        """float64 [channels] for every tensor that was observed."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}
