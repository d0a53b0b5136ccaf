"""What plans lose on samples is what metrics say, and the upper bound that a budget has to hold for is one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.search.test_expected_drop import drawn, scores_of
from tvm_hquant.search.joint_losses import PlanScores
from tvm_hquant.simulator.metrics import METRICS, MetricAccumulator, Score


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
    assert np.mean(np.sqrt(parts)) ** 2 == pytest.approx(scores.smooth_loss())
    assert parts[0] != parts[1]


def test_smooth_loss_by_hand() -> None:
    """Roots 1, 1 and 4: one sample with two thirds of the divergence has no more than two thirds of the roots to say."""
    divergence = MetricAccumulator(METRICS["kl"]).with_scores([Score(0.0, 1.0), Score(0.0, 1.0), Score(0.0, 16.0)])
    scores = PlanScores((divergence,), divergence)
    assert scores.smooth_loss() == pytest.approx(4.0)
    assert scores.divergence == pytest.approx(6.0)
    assert scores.smooth_loss([0, 2]) == pytest.approx(6.25)


def test_smooth_losses_of_independent_errors_add_up() -> None:
    """As divergences do: two noises together lose what they lose apart."""
    logits, _ = drawn(4000, 1.0, 0)
    random = np.random.default_rng(1)
    first, second = (size * random.normal(size=logits.shape) for size in (0.05, 0.08))

    def smooth_loss(noises: np.ndarray) -> float:
        kl = METRICS["kl"]
        scores = MetricAccumulator(kl).with_scores(
            kl.score((f,), (f + d,)) for f, d in zip(logits, noises, strict=True)
        )
        return PlanScores((scores,), scores).smooth_loss()

    assert smooth_loss(first + second) == pytest.approx(smooth_loss(first) + smooth_loss(second), rel=0.05)


def test_upper_bound_is_above_the_loss_and_shrinks_with_samples() -> None:
    """More samples make it tighter; the float model itself has none; an output with NaN has no bound."""
    few, many = plan_scores(0.5, 100), plan_scores(0.5, 1600)
    assert few.loss() < few.upper_bound()
    assert many.upper_bound() - many.loss() < few.upper_bound() - few.loss()
    assert few.upper_bound() == few.upper_bound()
    assert plan_scores(0.0).upper_bound() == 0.0
    assert plan_scores(np.nan).upper_bound() == np.inf


def test_no_change_seen_in_few_samples_is_no_proof() -> None:
    """Noise that changes no class of these samples may change others: the fewer samples, the more is allowed for."""
    bounds = [plan_scores(1e-3, count).upper_bound() for count in (5, 20, 80)]
    assert [plan_scores(1e-3, count).loss() for count in (5, 20, 80)] == [0.0, 0.0, 0.0]
    assert bounds[0] > 0.02
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[2] < 0.01
    agreement = MetricAccumulator(METRICS["agreement"]).with_scores([Score(1.0, 1.0)] * 50)
    smooth = MetricAccumulator(METRICS["kl"]).with_scores([Score(0.0, 1e-6)] * 50)
    assert PlanScores((agreement,), smooth).upper_bound() == pytest.approx(1 - 0.1 ** (1 / 50))


@pytest.mark.parametrize("metric", ["kl", "mse", "sqnr", "top1", "agreement"])
def test_one_sample_proves_nothing(metric: str) -> None:
    """Whatever the metric, a budget is not surely kept for one sample that keeps it."""
    scores = plan_scores(0.1, 1) if metric == "top1" else measured_in(metric, 1)
    assert scores.upper_bound() > scores.loss()
    assert scores.upper_bound() >= 0.1


def test_upper_bound_in_decibels() -> None:
    """Noise over signal has an error that is a factor; the float model's own outputs are the end of the scale."""
    few, many = measured_in("sqnr", 20), measured_in("sqnr", 500)
    assert 0 < many.upper_bound() - many.loss() < few.upper_bound() - few.loss() < 10
    assert measured_in("sqnr", 20, 0.0).upper_bound() == 0.0


def measured_in(name: str, count: int, size: float = 0.1) -> PlanScores:
    """Scores in a metric without labels."""
    logits, _ = drawn(count, 1.0, 0)
    noises = size * np.random.default_rng(1).normal(size=logits.shape)
    metric = METRICS[name]
    scores = MetricAccumulator(metric).with_scores(
        metric.score((f,), (f + d,)) for f, d in zip(logits, noises, strict=True)
    )
    return PlanScores((scores,), scores)


def test_upper_bound_mostly_holds() -> None:
    """The half point that is to be expected from many samples is below the bound of 50 in nine of ten draws."""
    truth = plan_scores(0.2, 4000, 100).loss()
    held = [plan_scores(0.2, 50, seed).upper_bound() >= truth for seed in range(40)]
    assert sum(held) >= 34
