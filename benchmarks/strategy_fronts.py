"""Fronts of search strategies, as measured on samples that no search has seen, and comparisons of two."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tvm_hquant.statistics import Interval

SAME_COST = 1.005
"""Plans of no more than this times a cost are as cheap, where gaps between points are not to count."""
_COSTS = 41
_RESAMPLES = 1000
_SMALLEST = 1e-9
"""Divergences below this count as this."""

Floats = npt.NDArray[np.float64]
Plan = TypeVar("Plan")


@dataclass(frozen=True)
class MeasuredPlan:
    """One point of a front.

    ``cost`` is relative to 8 bits everywhere, ``expected`` the loss that the search went by, ``smooth`` the smooth loss on
    the search samples (:mod:`tvm_hquant.search.joint_losses`); on each held-out sample, ``divergence`` is that from the float
    model in nats, ``top1_lost`` 1 if quantization made it wrong, −1 if right. ``number`` is how many evaluations the search
    had made with this one; 0 where a file does not say.
    """

    assignment: dict[str, str]
    cost: float
    expected: float
    smooth: float
    divergence: list[float]
    top1_lost: list[float]
    number: int = 0


@dataclass(frozen=True)
class StrategyFront:
    """What one strategy found on one network. ``chosen`` is the position of the plan that it chose for the budget.

    ``plans`` holds more than the front: those that were on it while the search went on (:meth:`after`).
    """

    network: str
    strategy: str
    layers: int
    evaluations: int
    seconds: float
    within_budget: bool
    chosen: int
    plans: list[MeasuredPlan]

    def after(self, evaluations: int) -> list[MeasuredPlan]:
        """The front after so many evaluations: plans that none other dominates in cost and expected drop, or in cost and
        divergence, on the search samples; the cheapest first."""
        known = [plan for plan in self.plans if plan.number <= evaluations]
        both = [
            *undominated(known, lambda plan: (plan.cost, plan.expected)),
            *undominated(known, lambda plan: (plan.cost, plan.smooth)),
        ]
        found = {id(plan): plan for plan in both}
        return sorted(found.values(), key=lambda plan: (plan.cost, plan.smooth))


def read_front(path: Path) -> StrategyFront:
    """What :mod:`benchmarks.search_strategies` wrote."""
    document = json.loads(path.read_text())
    return StrategyFront(**{**document, "plans": [MeasuredPlan(**plan) for plan in document["plans"]]})


def undominated(plans: Sequence[Plan], of: Callable[[Plan], tuple[float, float]]) -> list[Plan]:
    """The plans that no other one undercuts in cost and loss, which ``of`` gives; the cheapest first."""
    found: list[Plan] = []
    for plan in sorted(plans, key=of):
        if not found or of(plan)[1] < of(found[-1])[1]:
            found.append(plan)
    return found


@dataclass(frozen=True)
class EqualFronts:
    """Two fronts after as many ``evaluations`` as the strategy makes that makes fewer, and the cheapest plan of a network."""

    evaluations: int
    ours: list[MeasuredPlan]
    theirs: list[MeasuredPlan]
    cheapest: MeasuredPlan


def equal_evaluations(ours: StrategyFront, front: StrategyFront, all_fronts: Iterable[StrategyFront]) -> EqualFronts:
    """Ours and another front after equal evaluations; the cheapest plan is that of all fronts."""
    evaluations = min(front.evaluations, ours.evaluations)
    cheapest = min((plan for one in all_fronts for plan in one.plans), key=lambda plan: (plan.cost, plan.smooth))
    return EqualFronts(evaluations, ours.after(evaluations), front.after(evaluations), cheapest)


def loss_ratio(plans: Sequence[MeasuredPlan], others: Sequence[MeasuredPlan], cheapest: MeasuredPlan) -> Interval:
    """How many times the divergence of a front is that of another on the held-out samples, with its 95 % interval.

    The geometric mean over costs from that of ``cheapest`` to that of 8 bits everywhere, evenly in their logarithms. At each
    cost stands the plan of at most that cost that diverges least on the search samples. ``cheapest``, the plan of the
    cheapest precision in every layer, belongs to both fronts: it takes no search. The interval is bootstrapped over samples.
    """
    costs = np.geomspace(cheapest.cost, max(1.0, cheapest.cost), _COSTS)
    own, other = (_at_costs([*front, cheapest], costs) for front in (plans, others))

    def ratio(samples: npt.NDArray[np.int64]) -> float:
        means = (np.maximum(table[:, samples].mean(axis=1), _SMALLEST) for table in (own, other))
        first, second = (np.log(values).mean() for values in means)
        return float(np.exp(first - second))

    count = own.shape[1]
    random = np.random.default_rng(0)
    drawn = [ratio(samples) for samples in random.integers(0, count, (_RESAMPLES, count))]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(ratio(np.arange(count)), float(low), float(high))


def _at_costs(plans: Sequence[MeasuredPlan], costs: Floats) -> Floats:
    """Divergences [costs, samples] of the best plans of at most each cost."""
    best = [min((p for p in plans if p.cost <= c * (1 + 1e-9)), key=lambda p: (p.smooth, p.cost)) for c in costs]
    return np.array([plan.divergence for plan in best])


@dataclass(frozen=True)
class Verdicts:
    """For each point of a front whether ours is surely worse there: by its own interval, and by that of all points at once."""

    surely: list[bool]
    among_all: list[bool]


def better_than(
    ours: Sequence[MeasuredPlan], plans: Sequence[MeasuredPlan], loss: str, same_cost: float = 1 + 1e-9
) -> Verdicts:
    """Where a front loses less than ours at the same cost; points that ours has no plan as cheap as count as better.

    Plans of ours of up to ``same_cost`` times the cost stand against a point.

    Differences are means over the held-out samples. Their intervals are bootstrapped over samples (basic bootstrap of the
    studentized mean, Davison and Hinkley, *Bootstrap Methods and their Application*, 1997, section 5.2, with the standard
    error of the sample kept); for all points at once by the largest of the studentized means in every resample (Westfall and
    Young, *Resampling-Based Multiple Testing*, 1993, section 2.4).
    """
    by = "smooth" if loss == "divergence" else "expected"
    differences: dict[int, Floats] = {}
    for i, plan in enumerate(plans):
        affordable = [own for own in ours if own.cost <= plan.cost * same_cost]
        if affordable:
            best = min(affordable, key=lambda own: (float(getattr(own, by)), own.cost))
            differences[i] = np.array(getattr(best, loss)) - np.array(getattr(plan, loss))
    surely, among_all = ([i not in differences for i in range(len(plans))] for _ in range(2))
    varied = [i for i, values in differences.items() if values.std() > 0]
    if varied:
        table = np.stack([differences[i] for i in varied], axis=1)
        count = len(table)
        error = table.std(axis=0, ddof=1) / np.sqrt(count)
        random = np.random.default_rng(0)
        drawn = np.stack([table[random.integers(0, count, count)].mean(axis=0) for _ in range(2000)])
        deviations = (drawn - table.mean(axis=0)) / error
        means = table.mean(axis=0) / error
        own, joint = (np.quantile(values, 0.975, axis=0) for values in (deviations, deviations.max(axis=1)))
        for column, i in enumerate(varied):
            surely[i], among_all[i] = bool(means[column] > own[column]), bool(means[column] > joint)
    return Verdicts(surely, among_all)
