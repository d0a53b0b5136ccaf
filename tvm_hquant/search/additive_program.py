"""The precisions of least cost under a bound on the sum of losses, where costs add up over layers, too.

That is a multiple-choice knapsack. It is solved exactly by dynamic programming over layers: a state is the cost and the loss of
the layers so far, and only states are kept that no other one dominates and that may still lead to a better plan than the best
known one. What the layers that follow cost at least is their linear relaxation (E. Zemel 1980; D. Pisinger, European Journal of
Operational Research 83, 1995, bounds states likewise): the lower hull of each layer's precisions, steps of all layers in the
order of what they cost for the loss that they remove. For networks of a dozen layers this takes a tenth of the time of a solver
for general integer programs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_GAP = 1e-9
"""Plans that are better by less than this part of the cost are not looked for."""
_MOST_STATES = 20_000


class TooManyStatesError(Exception):
    """So many plans of some layers may lead to the best one that another method is better."""


class AdditiveProgram:
    """Layers with what each costs and loses in each of its precisions; solved for any number of bounds.

    Args:
        choices: for each layer the costs and losses of its precisions, float64 [precisions] each; infinite losses are never
            chosen.
    """

    def __init__(self, choices: Sequence[tuple[Floats, Floats]]) -> None:
        usable = [_undominated(costs, losses) for costs, losses in choices]
        # Large steps first: what is left to the relaxation are small ones, for which it is nearly exact.
        ranges = [float(np.ptp(own[usable[n]])) if len(usable[n]) else 0.0 for n, (own, _) in enumerate(choices)]
        self._order = sorted(range(len(choices)), key=lambda n: -ranges[n])
        self._numbers = [usable[n] for n in self._order]
        self._costs = [choices[n][0][usable[n]] for n in self._order]
        self._losses = [choices[n][1][usable[n]] for n in self._order]
        self._is_possible = all(len(numbers) for numbers in self._numbers)
        self._relaxations = self._of_suffixes() if self._is_possible else []

    def solve(self, bound: float) -> list[int] | None:
        """For each layer the number of its precision, so that losses add up to at most ``bound``; None if that cannot be.

        Raises:
            TooManyStatesError: the program is too large for this method.
        """
        if not self._is_possible or sum(float(losses[-1]) for losses in self._losses) > bound:
            return None
        best = self._rounded(bound)
        least = sum(float(costs[n]) for costs, n in zip(self._costs, best, strict=True))
        cost, loss = np.zeros(1), np.zeros(1)
        steps: list[tuple[Integers, Integers]] = []
        for layer, (costs, losses) in enumerate(zip(self._costs, self._losses, strict=True)):
            parents, picks = np.divmod(np.arange(len(cost) * len(costs)), len(costs))
            cost, loss = cost[parents] + costs[picks], loss[parents] + losses[picks]
            promising = cost + self._least_cost(layer + 1, bound - loss) < least - _GAP * abs(least)
            order = np.flatnonzero(promising & (loss <= bound))
            order = order[np.lexsort((loss[order], cost[order]))]
            smallest = np.minimum.accumulate(np.concatenate([[np.inf], loss[order]]))
            order = order[loss[order] < smallest[:-1]]
            if len(order) > _MOST_STATES:
                raise TooManyStatesError
            cost, loss = cost[order], loss[order]
            steps.append((parents[order], picks[order]))
        if len(cost):
            state = 0
            for layer in range(len(steps) - 1, -1, -1):
                parents, picks = steps[layer]
                best[layer], state = int(picks[state]), int(parents[state])
        found = [0] * len(best)
        for number, position in enumerate(self._order):
            found[position] = int(self._numbers[number][best[number]])
        return found

    def _of_suffixes(self) -> list[tuple[Floats, Floats]]:
        """For the layers from each one on: losses, rising, and the least costs of the relaxation at these."""
        layers, gains, prices = _hull_steps(self._costs, self._losses)
        found: list[tuple[Floats, Floats]] = []
        for first in range(len(self._costs) + 1):
            behind = layers >= first
            start = (
                sum((own[0] for own in self._costs[first:]), 0.0),
                sum((own[0] for own in self._losses[first:]), 0.0),
            )
            costs = start[0] + np.concatenate([[0.0], np.cumsum((gains * prices)[behind])])
            losses = start[1] - np.concatenate([[0.0], np.cumsum(gains[behind])])
            found.append((losses[::-1], costs[::-1]))
        return found

    def _least_cost(self, first: int, bounds: Floats) -> Floats:
        """What the layers from ``first`` on cost at least for bounds on their losses; infinite where these cannot be kept."""
        losses, costs = self._relaxations[first]
        # Differences of sums: what is short by their rounding may be enough.
        slack = 1e-12 * (abs(float(losses[-1])) + np.abs(bounds).max(initial=0.0))
        return np.where(bounds < losses[0] - slack, np.inf, np.interp(bounds, losses, costs))

    def _rounded(self, bound: float) -> list[int]:
        """A plan that keeps the bound: steps of the relaxation until it does, then single steps back that still keep it."""
        chosen = [0] * len(self._costs)
        total = sum(float(losses[0]) for losses in self._losses)
        for layer in _hull_steps(self._costs, self._losses)[0].tolist():
            if total <= bound:
                break
            before = self._losses[layer][chosen[layer]]
            chosen[layer] = _next_on_hull(self._costs[layer], self._losses[layer], chosen[layer])
            total += float(self._losses[layer][chosen[layer]] - before)
        if total > bound:  # By rounding alone: the least losses keep it.
            chosen = [len(losses) - 1 for losses in self._losses]
            total = sum(float(losses[-1]) for losses in self._losses)
        for layer, (costs, losses) in enumerate(zip(self._costs, self._losses, strict=True)):
            for cheaper in range(chosen[layer]):
                changed = total - float(losses[chosen[layer]]) + float(losses[cheaper])
                if changed <= bound and costs[cheaper] < costs[chosen[layer]]:
                    total, chosen[layer] = changed, cheaper
                    break
        exact = math.fsum(float(losses[n]) for losses, n in zip(self._losses, chosen, strict=True))
        return chosen if exact <= bound else [len(losses) - 1 for losses in self._losses]


def _undominated(costs: Floats, losses: Floats) -> Integers:
    """Precisions by rising cost and falling loss; of equal ones the first."""
    order = np.lexsort((losses, costs))
    order = order[np.isfinite(losses[order])]
    smallest = np.minimum.accumulate(np.concatenate([[np.inf], losses[order]]))
    return order[losses[order] < smallest[:-1]]


def _next_on_hull(costs: Floats, losses: Floats, start: int) -> int:
    """The precision that costs least, from one on, for the loss that it removes; the furthest of equal ones."""
    prices = (costs[start + 1 :] - costs[start]) / (losses[start] - losses[start + 1 :])
    return start + 1 + int(len(prices) - 1 - np.argmin(prices[::-1]))


def _hull_steps(costs: Sequence[Floats], losses: Sequence[Floats]) -> tuple[Integers, Floats, Floats]:
    """All steps along the layers' lower hulls, the cheapest first: layer, loss removed, and cost for each unit of that."""
    steps: list[tuple[float, int, float]] = []
    for layer, (own, lost) in enumerate(zip(costs, losses, strict=True)):
        at = 0
        while at < len(own) - 1:
            to = _next_on_hull(own, lost, at)
            gain = float(lost[at] - lost[to])
            steps.append((float(own[to] - own[at]) / gain, layer, gain))
            at = to
    steps.sort(key=lambda step: step[:2])
    return (
        np.array([layer for _, layer, _ in steps], np.int64),
        np.array([gain for _, _, gain in steps]),
        np.array([price for price, _, _ in steps]),
    )


def choices_of(
    candidates: Mapping[str, tuple[str, ...]],
    costs: Mapping[tuple[str, str], float],
    losses: Mapping[tuple[str, str], float],
) -> list[tuple[Floats, Floats]]:
    """Costs and losses of every layer's precisions."""
    return [
        (np.array([costs[layer, p] for p in own]), np.array([losses[layer, p] for p in own]))
        for layer, own in candidates.items()
    ]
