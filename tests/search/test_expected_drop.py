"""The search must not follow chance: protects how a drop is expected from few samples."""

from __future__ import annotations

import pytest

from tvm_hquant.search.expected_drop import TYPICAL_LOSS, ExpectedDrop
from tvm_hquant.simulator.metrics import METRICS, MetricAccumulator, Score


def scores(
    right_before: list[int], right_after: list[int], same: list[int]
) -> tuple[MetricAccumulator, MetricAccumulator]:
    """Top-1 and agreement accumulators."""
    pairs = [Score(float(a), float(b)) for a, b in zip(right_before, right_after, strict=True)]
    agreement = [Score(1.0, float(s)) for s in same]
    return (
        MetricAccumulator(METRICS["top1"]).with_scores(pairs),
        MetricAccumulator(METRICS["agreement"]).with_scores(agreement),
    )


def test_nothing_changed_means_no_drop() -> None:
    """A plan that changes no class loses nothing, whatever was seen before."""
    expected = ExpectedDrop()
    expected.of(*scores([1] * 100, [0] * 100, [0] * 100))
    assert expected.of(*scores([1] * 100, [1] * 100, [1] * 100)) == 0.0


def test_lucky_changes_still_cost() -> None:
    """Ten changes of which none is a net loss are expected to lose about as much as changes typically do."""
    lucky = scores([1, 0] * 50, [1, 0] * 50, [0] * 10 + [1] * 90)
    drop = ExpectedDrop().of(*lucky)
    assert 0.5 * 0.1 * TYPICAL_LOSS < drop < 0.1 * TYPICAL_LOSS


def test_many_samples_outweigh_the_typical_value() -> None:
    """With thousands of changes the measured drop is what is expected."""
    before, after = [1] * 10_000, [0] * 4000 + [1] * 6000
    assert ExpectedDrop().of(*scores(before, after, after)) == pytest.approx(0.4, abs=0.01)


def test_drop_falls_with_the_changes() -> None:
    """Of two plans with the same net loss the one that changes less is expected to lose less."""
    expected = ExpectedDrop()
    many = expected.of(*scores([1] * 100, [0] * 2 + [1] * 98, [0] * 20 + [1] * 80))
    few = expected.of(*scores([1] * 100, [0] * 2 + [1] * 98, [0] * 4 + [1] * 96))
    assert few < many / 3
