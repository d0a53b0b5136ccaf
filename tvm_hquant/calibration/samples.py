"""What every data source gives: samples, one at a time, as often as asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

Signature = Mapping[str, tuple[Sequence[int], str]]
"""For every model input its shape, batch axis first, and its dtype: ``{"input": ((1, 3, 32, 32), "float32")}``."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample.

    Attributes:
        inputs: for each model input an array of the input's dtype and shape, with a batch axis of 1.
        label: class index, 0 or more; None where the data has no labels.
    """

    inputs: Mapping[str, Array]
    label: int | None = None

    def digest(self) -> bytes:
        """16 bytes that are equal for equal inputs, whatever the label."""
        state = hashlib.blake2b(digest_size=16)
        for name in sorted(self.inputs):
            array = self.inputs[name]
            state.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
            state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return state.digest()


@runtime_checkable
class DataSource(Protocol):
    """Samples that can be walked through any number of times, each time in the same order."""

    @property
    def name(self) -> str:
        """For messages and reports."""

    @property
    def count(self) -> int | None:
        """How many samples there are, None where only a walk can tell."""

    @property
    def has_labels(self) -> bool:
        """Whether samples carry labels."""

    def __iter__(self) -> Iterator[Sample]:
        """Walks through the samples.

        Raises:
            DataError: a sample does not fit the model, holds NaN or infinity, or cannot be read.
        """


def count_samples(source: DataSource) -> int:
    """How many samples a source has, by a walk through it where it does not know."""
    return sum(1 for _ in source) if source.count is None else source.count
