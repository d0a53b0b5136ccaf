"""Where a front has gaps, and which of many plans would fill them.

Front points are pairs (cost, loss), the cheapest first, losses falling. Losses are compared by their logarithms: a plan that
loses half as much is as much better at 10⁻⁴ as at 10⁻¹.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tvm_hquant.search.problem import Assignment, CostModel

_LAST_STEP = 0.1
"""A loss of 0 counts as this part of the loss of the point before it."""
_COST_FLOOR = 0.005
"""Relative width in cost that every plan is taken to fill at least."""
_BEYOND = 1.1
"""A plan beyond the last point is taken to reach up to this times its cost."""
_MOST_BOUNDS = 3


class Promise(NamedTuple):
    """A plan with its cost, and the loss that is expected of it."""

    plan: tuple[tuple[str, str], ...]
    cost: float
    loss: float


def bounds_in_gaps(losses: Sequence[float], step: float, count: int) -> list[float]:
    """Bounds on the loss between neighbouring points of a front whose losses differ by more than ``step``, relatively.

    One to three for each gap, in the ``count`` largest gaps, evenly in their logarithms; the largest bound first.
    """
    gaps: list[tuple[float, float]] = []
    for before, after in pairwise(losses):
        if before <= 0 or not math.isfinite(after):
            continue
        upper = before if math.isfinite(before) else 10.0 * after
        ratio = math.log(upper / max(after, _LAST_STEP * upper)) if upper > after else 0.0
        if ratio > step:
            gaps.append((ratio, upper))
    gaps.sort(key=lambda gap: (-gap[0], -gap[1]))
    bounds: list[float] = []
    for ratio, upper in gaps[:count]:
        parts = min(_MOST_BOUNDS, max(1, round(ratio / step) - 1))
        bounds += [upper * math.exp(-ratio * (n + 1) / (parts + 1)) for n in range(parts)]
    return sorted(bounds, reverse=True)


def coarse_to_fine(bounds: Sequence[float]) -> list[float]:
    """The same bounds in the order of the van der Corput sequence: the first few of them are spread over the whole range."""
    digits = max(len(bounds) - 1, 1).bit_length()
    order = sorted(range(len(bounds)), key=lambda n: int(f"{n:0{digits}b}"[::-1], 2))
    return [bounds[n] for n in order]


def most_promising(
    front: Sequence[tuple[float, float]], plans: Sequence[Promise], count: int, step: float
) -> list[Promise]:
    """Those plans that leave the front furthest behind, at most ``count``, the best first.

    A plan is better than the front by the relative distance of its loss to that of the best point which costs no more, over
    the costs up to the next point. Those that are chosen count as part of the front for the next ones; a plan that is not
    better by half a ``step`` is not chosen.
    """
    usable = [plan for plan in plans if 0 < plan.loss < math.inf and plan.cost > 0]
    points = [point for point in front if point[0] > 0]
    if not usable or not points:
        return []
    costs = np.array([plan.cost for plan in usable])
    losses = np.log([plan.loss for plan in usable])
    chosen: list[Promise] = []
    while len(chosen) < count:
        lead, width = _lead(points, costs, losses)
        value = np.where(lead > step / 2, lead * (_COST_FLOOR + width), 0.0)
        best = int(np.argmax(value))
        if value[best] <= 0:
            break
        chosen.append(usable[best])
        points = _with_point(points, (usable[best].cost, usable[best].loss))
    return chosen


def _lead(
    points: Sequence[tuple[float, float]], costs: npt.NDArray[np.float64], losses: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """How far plans are below the front in the logarithm of the loss, and how far the next point is in that of the cost."""
    of_points = np.array([cost for cost, _ in points])
    smallest = np.log(np.maximum([loss for _, loss in points], np.finfo(np.float64).tiny))
    before = np.searchsorted(of_points, costs * (1 + 1e-9), side="right")
    reached = np.concatenate([[np.inf], smallest])[before]
    next_cost = np.where(before < len(of_points), of_points[np.minimum(before, len(of_points) - 1)], _BEYOND * costs)
    return np.minimum(reached - losses, 50.0), np.log(next_cost / costs)


def _with_point(points: Sequence[tuple[float, float]], new: tuple[float, float]) -> list[tuple[float, float]]:
    kept = [point for point in points if point[0] < new[0] or point[1] < new[1]]
    return sorted([*kept, new])


class SingleChanges:
    """Plans that differ from a given one in one layer, with what that adds to the cost."""

    def __init__(self, candidates: Mapping[str, tuple[str, ...]], costs: CostModel) -> None:
        self._candidates, self._costs = candidates, costs
        self._pairs: dict[str, list[tuple[str, str]]] = {}
        for pair in costs.pairs:
            for layer in pair:
                self._pairs.setdefault(layer, []).append(pair)

    def of(self, plan: Assignment) -> list[tuple[str, str, float]]:
        """(layer, other precision, cost added by the model of the costs)."""
        layers = self._costs.layers
        return [
            (layer, other, layers[layer, other] - layers[layer, own] + self._of_pairs(plan, layer, other))
            for layer, own in plan.items()
            for other in self._candidates[layer]
            if other != own
        ]

    def _of_pairs(self, plan: Assignment, layer: str, other: str) -> float:
        added = 0.0
        for first, second in self._pairs.get(layer, ()):
            extra = self._costs.pairs[first, second]
            added -= extra.get((plan[first], plan[second]), 0.0)
            added += extra.get((other, plan[second]) if first == layer else (plan[first], other), 0.0)
        return added
