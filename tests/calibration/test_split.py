"""The split between samples that fit a plan and samples that check it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant.calibration import (
    DataSource,
    count_shared_samples,
    first_samples,
    open_data,
    split_calibration,
    two_fold,
)
from tvm_hquant.errors import DataError

SIGNATURE = {"x": ((1, 1), "float32")}


def source_of(values: list[int]) -> DataSource:
    return open_data({"x": np.array(values, np.float32)[:, np.newaxis], "labels": np.abs(values)}, SIGNATURE)


def values_of(source: DataSource) -> list[int]:
    return [int(sample.inputs["x"][0, 0]) for sample in source]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda v: len(set(v)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_split_is_disjoint_and_complete(values: list[int], fraction: float, seed: int) -> None:
    """No sample is lost or used twice, no repeated sample leaks, and neither part is empty."""
    split = split_calibration(source_of(values), fraction, seed)
    calibration, evaluation = values_of(split.calibration), values_of(split.evaluation)
    assert Counter(calibration) + Counter(evaluation) == Counter(values)
    assert not set(calibration) & set(evaluation)
    assert calibration
    assert evaluation
    assert (split.calibration.count, split.evaluation.count) == (len(calibration), len(evaluation))
    assert count_shared_samples(split.calibration, split.evaluation) == 0
    again = split_calibration(source_of(values), fraction, seed)
    assert again.evaluation.indices == split.evaluation.indices


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 200), fraction=st.floats(0.05, 0.95))
def test_split_keeps_the_fraction(count: int, fraction: float) -> None:
    """Without repeated samples the parts have the sizes that were asked for."""
    split = split_calibration(source_of(list(range(count))), fraction, 1)
    assert abs(split.evaluation.count - min(max(fraction * count, 1), count - 1)) <= 0.5


def test_seeds_give_different_splits_and_labels_stay() -> None:
    """The seed matters, and every sample keeps its label."""
    source = source_of(list(range(40)))
    splits = [two_fold(source, seed) for seed in (0, 1)]
    assert splits[0].evaluation.indices != splits[1].evaluation.indices
    assert splits[0].evaluation.count == 20
    assert all(sample.label == int(sample.inputs["x"][0, 0]) for sample in splits[0].evaluation)
    assert str(splits[0]) == "20 samples for calibration, 20 for evaluation"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_fractions_outside_are_refused(fraction: float) -> None:
    """A fraction that leaves a part empty is a mistake."""
    with pytest.raises(DataError, match="between 0 and 1"):
        split_calibration(source_of([1, 2, 3]), fraction)


def test_one_repeated_sample_cannot_be_split() -> None:
    """Copies of one sample would stand on both sides."""
    with pytest.raises(DataError, match="1 different sample"):
        split_calibration(source_of([5, 5, 5]))


def test_shared_samples_are_counted() -> None:
    """The count is of evaluation samples, repeated ones included, whatever their labels."""
    assert count_shared_samples(source_of([1, 2, 3]), source_of([3, 4, 3, 5, 1])) == 3
    assert count_shared_samples(source_of([1, 2, 3]), source_of([-1, -2])) == 0


def test_first_samples() -> None:
    """The first samples in order; asking for more than there are, or none, is an error."""
    assert values_of(first_samples(source_of([7, 8, 9]), 2)) == [7, 8]
    lazy = open_data([np.array([float(i)]) for i in range(3)], SIGNATURE)
    assert values_of(first_samples(lazy, 3)) == [0, 1, 2]
    for count in (0, 4):
        with pytest.raises(DataError, match=f"{count} samples were asked for"):
            first_samples(lazy, count)
