"""What plans lose on samples is what metrics say, and the upper bound that a budget has to hold for is one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.search.test_expected_drop import drawn, scores_of
from tvm_hquant.search.joint_losses import PlanScores
from tvm_hquant.simulator.metrics import METRICS, MetricAccumulator


def plan_scores(noise: float, count: int = 150, seed: int = 0) -> PlanScores:
    """Scores of a classifier whose logits got noise."""
    logits, labels = drawn(count, 1.0, seed)
    noises = noise * np.random.default_rng(seed + 1).normal(size=logits.shape)
    divergence = MetricAccumulator(METRICS["kl"]).with_scores(
        METRICS["kl"].score((f,), (f + d,)) for f, d in zip(logits, noises, strict=True)
    )
    return PlanScores(tuple(scores_of(logits, noises, labels)), divergence)


def test_parts_and_the_whole() -> None:
    """All samples by position are all samples; a part has its own loss."""
    scores = plan_scores(0.5)
    assert scores.loss(range(150)) == scores.loss()
    assert scores.smooth_loss(range(150)) == scores.smooth_loss()
    parts = [scores.smooth_loss(range(start, start + 75)) for start in (0, 75)]
    assert np.mean(parts) == pytest.approx(scores.smooth_loss())
    assert parts[0] != parts[1]


def test_upper_bound_is_above_the_loss_and_shrinks_with_samples() -> None:
    """More samples make it tighter; the float model itself has none; an output with NaN has no bound."""
    few, many = plan_scores(0.5, 100), plan_scores(0.5, 1600)
    assert few.loss() < few.upper_bound()
    assert many.upper_bound() - many.loss() < few.upper_bound() - few.loss()
    assert few.upper_bound() == few.upper_bound()
    assert plan_scores(0.0).upper_bound() == 0.0
    assert plan_scores(np.nan).upper_bound() == np.inf


def test_upper_bound_mostly_holds() -> None:
    """The half point that is to be expected from many samples is below the bound of few in most draws."""
    truth = plan_scores(0.2, 4000, 100).loss()
    held = [plan_scores(0.2, 150, seed).upper_bound() >= truth for seed in range(12)]
    assert sum(held) >= 9
