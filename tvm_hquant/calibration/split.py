"""Keeps the samples that fit a plan apart from those that check it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tvm_hquant.calibration.samples import DataSource, Sample, count_samples
from tvm_hquant.errors import DataError


@dataclass(frozen=True, eq=False)
class SubsetSource:
    """Some samples of a source, in its order. ``indices`` are ascending positions in it."""

    source: DataSource
    indices: tuple[int, ...]
    name: str

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def has_labels(self) -> bool:
        return self.source.has_labels

    def __iter__(self) -> Iterator[Sample]:
        wanted = iter(self.indices)
        position = next(wanted, None)
        if position is None:
            return
        for index, sample in enumerate(self.source):
            if index == position:
                yield sample
                position = next(wanted, None)
                if position is None:
                    return


class DataSplit(NamedTuple):
    """Two parts of one source that share no sample, not even a repeated one."""

    calibration: SubsetSource
    evaluation: SubsetSource

    def __str__(self) -> str:
        return f"{self.calibration.count} samples for calibration, {self.evaluation.count} for evaluation"


def split_calibration(source: DataSource, evaluation_fraction: float = 0.5, seed: int = 0) -> DataSplit:
    """Splits a source at random; equal samples stay on one side.

    Args:
        source: is walked through once.
        evaluation_fraction: share of the samples for the evaluation part, between 0 and 1. Both parts get at least one.
        seed: the same seed gives the same split of the same data.

    Raises:
        DataError: fewer than two different samples, or a fraction outside 0 … 1.
    """
    if not 0 < evaluation_fraction < 1:
        raise DataError(
            f"the fraction of samples for evaluation is {evaluation_fraction}; it has to lie between 0 and 1"
        )
    groups: dict[bytes, list[int]] = {}
    for index, sample in enumerate(source):
        groups.setdefault(sample.digest(), []).append(index)
    members = list(groups.values())
    if len(members) < 2:
        raise DataError(
            f"{source.name}: {len(members)} different sample(s) cannot be split into a part to calibrate with "
            "and a part to evaluate with; give more samples, or evaluation data of its own"
        )
    total = sum(map(len, members))
    wanted = evaluation_fraction * total
    evaluation: list[int] = []
    for position, group in enumerate(np.random.default_rng(seed).permutation(len(members))):
        candidates = members[int(group)]
        is_nearer = abs(len(evaluation) + len(candidates) - wanted) <= abs(len(evaluation) - wanted)
        if position < len(members) - 1 and (not evaluation or is_nearer):
            evaluation.extend(candidates)
    chosen = set(evaluation)
    return DataSplit(
        SubsetSource(source, tuple(i for i in range(total) if i not in chosen), f"{source.name} (calibration part)"),
        SubsetSource(source, tuple(sorted(evaluation)), f"{source.name} (evaluation part)"),
    )


def two_fold(source: DataSource, seed: int = 0) -> DataSplit:
    """Two halves, for choosing on one and checking on the other.

    Raises:
        DataError: fewer than two different samples.
    """
    return split_calibration(source, 0.5, seed)


def first_samples(source: DataSource, count: int) -> SubsetSource:
    """The first ``count`` samples of a source.

    Raises:
        DataError: ``count`` is not positive, or the source has fewer samples.
    """
    if count < 1:
        raise DataError(f"{source.name}: {count} samples were asked for; at least one is needed")
    available = source.count
    if available is None:
        available = sum(1 for _ in zip(range(count), source, strict=False))
    if available < count:
        raise DataError(f"{source.name}: {count} samples were asked for, but there are only {available}")
    return SubsetSource(source, tuple(range(count)), f"{source.name} (first {count})")


def random_samples(source: DataSource, count: int, seed: int = 0) -> SubsetSource:
    """At most ``count`` samples of a source, drawn at random: files are often sorted by class.

    Raises:
        DataError: ``count`` is not positive.
    """
    if count < 1:
        raise DataError(f"{source.name}: {count} samples were asked for; at least one is needed")
    available = count_samples(source)
    chosen = np.random.default_rng(seed).permutation(available)[:count]
    return SubsetSource(source, tuple(sorted(int(i) for i in chosen)), f"{source.name} ({len(chosen)} at random)")


def count_shared_samples(calibration: DataSource, evaluation: DataSource) -> int:
    """How many samples of ``evaluation`` also occur, with equal inputs, in ``calibration``. Walks through both once."""
    known = {sample.digest() for sample in calibration}
    return sum(sample.digest() in known for sample in evaluation)
