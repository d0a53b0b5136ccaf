"""What whole plans lose on the search samples, in the metric of the budget and in a smooth loss.

The *smooth* loss is made of the divergences d_i of the samples from the float model's output, or of their mean squared
errors where the budget counts errors of outputs (``mse``, ``sqnr``):

    (mean_i √d_i)²

Unlike a share of right classes or decibels it adds up over layers, as d does, being quadratic in the error of the output.
The mean of d itself rests on the few samples that the float model is in doubt about: (Σd)²/Σd² is a seventh to two thirds
of their number. √d has no such tail. From one half of the samples the mean of the roots tells the mean divergence on the
other half better than that mean does: its own variance is a third less, on each of ten networks, as if there were half as
many samples again (plans that lose 0.0003 to 0.1 nats; in logarithms, a factor common to all plans and a trend taken out).

Of the samples some can be *kept back*: scores are known for all of them, but what plans are chosen by leaves these out, so
that they can say whether a plan keeps the budget on samples that had no part in its choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_hquant.calibration.samples import DataSource, count_samples
from tvm_hquant.calibration.split import split_calibration
from tvm_hquant.precision import parse_precision
from tvm_hquant.search.expected_drop import SCORES, drop_upper_bound, expected_drop
from tvm_hquant.search.problem import Assignment, LayerPrecision
from tvm_hquant.sensitivity.single_layers import SingleLayerPlans
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.metrics import METRICS, Metric, MetricAccumulator
from tvm_hquant.simulator.program import Program
from tvm_hquant.statistics import Interval, proportion_upper_bound

_KEPT_BACK = 1 / 3
CONFIDENCE = 0.9
"""With which a budget has to hold on what is not seen."""


def smooth_metric(metric: Metric) -> Metric:
    """What the smooth loss is measured by where the budget is in ``metric``."""
    return METRICS["mse" if metric.name in ("mse", "sqnr") else "kl"]


def scored_by(metric: Metric) -> tuple[Metric, ...]:
    """What :func:`expected_loss` needs to know of a plan, the metric itself first."""
    return SCORES if metric.name == "top1" else (metric,)


def expected_loss(scores: Sequence[MetricAccumulator]) -> float:
    """In the unit of a metric, from the scores that :func:`scored_by` names: for top-1 the expected drop, else as measured."""
    return expected_drop(*scores) if scores[0].metric.name == "top1" else scores[0].loss


@dataclass(frozen=True)
class PlanScores:
    """Scores of one plan on all search samples: of the metrics that its loss is made of, and of the smooth loss."""

    own: tuple[MetricAccumulator, ...]
    smooth: MetricAccumulator

    def loss(self, samples: Sequence[int] | None = None) -> float:
        """In the unit of the budget; for top-1 the expected drop. On all samples, or on some by position."""
        return expected_loss((self if samples is None else self.part(samples)).own)

    def smooth_loss(self, samples: Sequence[int] | None = None) -> float:
        """The square of the mean root, on all samples or on some by position."""
        values = (self if samples is None else self.part(samples)).smooth.table[:, 1].tolist()
        return (math.fsum(map(math.sqrt, values)) / len(values)) ** 2

    def part(self, samples: Sequence[int]) -> PlanScores:
        """Scores on some samples, by position."""
        return PlanScores(tuple(scores.of(samples) for scores in self.own), self.smooth.of(samples))

    @property
    def divergence(self) -> float:
        """The mean of what the smooth loss is made of."""
        return self.smooth.loss

    def upper_bound(self, seed: int = 0) -> float:
        """What :meth:`loss` is below with 90 % confidence; infinite where an output is not finite."""
        own = self.own
        if not all(np.isfinite(scores.table).all() for scores in own):
            return math.inf
        if own[0].metric.name == "top1":
            bound = drop_upper_bound(own[1].table, own[2].table, CONFIDENCE, seed)
        else:
            bound = own[0].loss_upper_bound(CONFIDENCE, seed)
        return max(self.loss(), bound)

    @property
    def interval(self) -> Interval:
        """What was measured, with its 95 % interval."""
        return self.own[0].loss_interval()


def score_programs(
    session: QuantizationSession, programs: Sequence[Program], samples: DataSource, metric: Metric, label: str
) -> list[PlanScores]:
    """What plans score on samples; ``label`` says in a few words what for."""
    metrics = [*scored_by(metric), smooth_metric(metric)]
    found = session.evaluate_metrics(programs, samples, metrics, label)
    return [PlanScores(tuple(own[:-1]), own[-1]) for own in found]


class JointLosses:
    """Scores plans on the search samples, each at most once.

    Args:
        session: the calibrated model.
        samples: to score on.
        metric: of the budget.
        seed: of the choice of samples that are kept back, and of resampling.
        keep_back: whether to keep a third of the samples back; there have to be three.
        front: whether a whole front is wanted. Smooth losses then are those of all samples, since what counts is how plans
            compare; whether one keeps the budget is still said by samples whose own losses had no part in its choice.
    """

    def __init__(
        self,
        session: QuantizationSession,
        samples: DataSource,
        metric: Metric,
        seed: int = 0,
        keep_back: bool = False,
        front: bool = False,
    ) -> None:
        self._session, self._samples, self._seed = session, samples, seed
        self._metric = metric
        self._known: dict[str, PlanScores] = {}
        self._digests: dict[tuple[tuple[tuple[str, str], ...], int | None], str] = {}
        self._chosen_by: tuple[int, ...] | None = None
        self._kept_back: tuple[int, ...] = ()
        if keep_back:
            parts = split_calibration(samples, _KEPT_BACK, seed)
            self._chosen_by, self._kept_back = parts.calibration.indices, parts.evaluation.indices
        self._compared_by = None if front else self._chosen_by

    @property
    def digests(self) -> frozenset[str]:
        """Of all programs that were asked for."""
        return frozenset(self._known)

    def scores(self, assignments: Iterable[Assignment], stored_bits: int | None = None) -> list[PlanScores]:
        """Scores of plans; ``stored_bits`` are those of all weights in the artifact, where a precision has more."""
        plans = [(tuple(assignment.items()), stored_bits) for assignment in assignments]
        programs = {
            plan: self._session.program({name: parse_precision(p) for name, p in plan[0]}, stored_bits)
            for plan in dict.fromkeys(plans)
            if plan not in self._digests
        }
        self._digests.update((plan, program.digest) for plan, program in programs.items())
        new = {program.digest: program for program in programs.values() if program.digest not in self._known}
        if new:
            found = score_programs(self._session, list(new.values()), self._samples, self._metric, "searching")
            self._known.update(zip(new, found, strict=True))
        return [self._known[self._digests[plan]] for plan in plans]

    def losses(self, assignments: Sequence[Assignment], stored_bits: int | None = None) -> list[float]:
        """In the unit of the budget, on the samples that plans are chosen by."""
        return [scores.loss(self._chosen_by) for scores in self.scores(assignments, stored_bits)]

    def smooth_losses(self, assignments: Sequence[Assignment]) -> list[float]:
        """Smooth losses, on the samples that plans are chosen by, or for a front on all."""
        return [scores.smooth_loss(self._compared_by) for scores in self.scores(assignments)]

    def remark(self, budget: float) -> str:
        """What keeps any plan but the float model's from keeping a budget: too few samples; nothing else is said."""
        if self._metric.name != "agreement" or not 0 < budget < 1:
            return ""
        count = count_samples(self._samples)
        if proportion_upper_bound(0, count, CONFIDENCE) <= budget:
            return ""
        needed = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - budget))
        return (
            f"{count} search samples cannot show with {CONFIDENCE:.0%} confidence that no more than {budget:g} of all "
            f"predictions differ, even if none of theirs does: give {2 * needed} evaluation samples (half of them are searched "
            "with), allow more, or use the metric kl"
        )

    def of_layers(self, pairs: Sequence[LayerPrecision], plans: SingleLayerPlans) -> dict[LayerPrecision, float]:
        """What each layer loses in each precision by the smooth losses of these plans."""
        return plans.losses(pairs, self.smooth_losses)

    def checked_losses(self, assignments: Sequence[Assignment]) -> list[float]:
        """What plans lose at most: the larger of the loss on the samples kept back, and the upper bound on all samples.

        The float model itself loses nothing, however few samples there are.
        """
        found = self.scores(assignments)
        exact = self._session.float_program.digest
        return [
            0.0
            if self._digests[tuple(assignment.items()), None] == exact
            else max(scores.loss(self._kept_back) if self._kept_back else 0.0, scores.upper_bound(self._seed))
            for assignment, scores in zip(assignments, found, strict=True)
        ]
