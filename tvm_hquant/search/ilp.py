"""Ours: an integer program over measured sensitivities, corrected by joint evaluations, along the whole Pareto front.

1. *Sensitivities*: the smooth loss of the network with one layer alone in a precision, for all of them. For a front they
   are measured on the search samples: those of few calibration samples would be off by a third or a half, and so would
   the plans. A plan in which one layer alone is quantized is a point of the front as well; before them stand those with one
   precision everywhere, so that a search that is stopped early has a front to show.
2. *Sweep*: the integer program (:mod:`~tvm_hquant.search.integer_program`) for bounds on the sum of these losses from the
   largest to the smallest, the coarsest steps first. Its plans are evaluated jointly.
3. *Filling*: the joint losses correct the model of the loss (:mod:`~tvm_hquant.search.loss_model`). Then the program is
   solved for bounds between neighbouring points of the front whose losses differ by more than a tenth, and single layers
   of points are changed. Of all plans found so, those are evaluated that by the model leave the front furthest behind, some
   at a time, until none is expected to or as many were evaluated as are allowed.
4. *Budget*: the bound for the budget, which may be in any unit, is read off the losses and smooth losses of all plans; the
   program is solved for it and for bounds around it. Then single layers are changed while that helps (*repair*): cheaper
   ones, or, where no plan keeps the budget, more exact ones.
5. *Check*: the cheapest plan is taken that keeps the budget on the samples that plans are chosen by, on samples that were
   kept back, and with 90 % confidence on all.

Where one plan is wanted and no front, 2 and 3 look only at what is near the budget, sensitivities are those of the calibration
samples, and if the cheapest plan keeps the budget nothing else is looked at.

Everything is deterministic: HiGHS is, and nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from tvm_hquant.errors import SearchError
from tvm_hquant.search.front_filling import Promise, SingleChanges, bounds_in_gaps, coarse_to_fine, most_promising
from tvm_hquant.search.integer_program import IntegerProgram
from tvm_hquant.search.loss_model import LossModel
from tvm_hquant.search.problem import Assignment, SearchProblem, SearchResult, SearchStep
from tvm_hquant.search.reasons import explained
from tvm_hquant.search.surrogate import spelled_levels

Plan = tuple[tuple[str, str], ...]

_GAPS = 32
"""Gaps of the front that the program is solved for at once."""
_FOR_ONE_PLAN = 24
"""Joint evaluations while one plan is looked for, at most."""
_NEAR = 1.5
"""Where one plan is wanted, losses within this factor of the budget are near it."""


@dataclass(frozen=True)
class IntegerProgramStrategy:
    """Minimizes the cost subject to the budget.

    Attributes:
        front: whether the whole front is wanted, or one plan for the budget.
        sweep: plans of the first sweep.
        batch: plans that are evaluated before the model is corrected again.
        allowance: joint evaluations at most while the front is filled; None: 100 and 6 for each layer, but with those of
            single layers no more than three quarters of what greedy search makes; 24 at least, and for one plan.
        step: relative distance of the losses of neighbouring points below which nothing is put between them.
        repairs: rounds of single changes at most; in each ``moves`` plans are evaluated.
    """

    front: bool = True
    sweep: int = 24
    batch: int = 12
    allowance: int | None = None
    step: float = 0.1
    repairs: int = 4
    moves: int = 6

    @property
    def name(self) -> str:
        return "ilp"

    @property
    def checks_plans(self) -> bool:
        return True

    def search(self, problem: SearchProblem) -> SearchResult:
        """The cheapest plan found that keeps the budget on the search samples and, where there are some, the check samples.

        If none does, the plan that misses it least, with ``within_budget`` False.

        Raises:
            SearchError: no plan has the prescribed levels.
        """
        return _Search(self, problem).run()


@dataclass(frozen=True)
class _Point:
    """A plan that was evaluated: what it costs, its smooth loss, and its loss in the budget's unit."""

    plan: Plan
    cost: float
    smooth: float
    loss: float


class _Search:
    def __init__(self, strategy: IntegerProgramStrategy, problem: SearchProblem) -> None:
        self.strategy, self.problem = strategy, problem
        self.points: dict[Plan, _Point] = {}
        self.checked: dict[Plan, float] = {}
        default = _allowance_for_front(problem) if strategy.front else _FOR_ONE_PLAN
        self.allowance = default if strategy.allowance is None else strategy.allowance
        self.model = LossModel.of({})
        self.changes = SingleChanges(problem.candidates, problem.costs)

    def run(self) -> SearchResult:
        if not self._cheapest_suffices():
            self._evaluate_uniform()
            self._measure()
            self._sweep()
            while self._fill():
                pass
            for _ in range(self.strategy.repairs):
                if not self._solve_near_budget() and not self._repair():
                    break
        best = self._best()
        decisions = explained(self.problem, dict(best.plan), self.model.alone)
        return SearchResult(decisions, best.loss, self._keeps(best), self._steps())

    # Plans.

    def _evaluate(self, plans: Iterable[Assignment | None]) -> int:
        """Evaluates the plans that are new; how many there were."""
        new = [
            p for p in dict.fromkeys(tuple(plan.items()) for plan in plans if plan is not None) if p not in self.points
        ]
        if new:
            assignments = [dict(plan) for plan in new]
            losses = self.problem.evaluate(assignments)
            smooth = self.problem.smooth(assignments) if self.problem.smooth is not None else losses
            for plan, assignment, loss, value in zip(new, assignments, losses, smooth, strict=True):
                self.points[plan] = _Point(plan, self.problem.costs.total(assignment), value, loss)
        return len(new)

    def _solve(self, bounds: Sequence[float]) -> list[dict[str, str] | None]:
        problem = self.problem
        program = IntegerProgram(problem.candidates, problem.costs, self.model.losses, problem.levels)
        return program.solve_all(bounds)

    def _cheapest_suffices(self) -> bool:
        """Whether one plan is wanted and the cheapest one keeps the budget."""
        problem = self.problem
        if self.strategy.front or problem.levels is not None:
            return False
        nothing = dict.fromkeys(problem.costs.layers, 0.0)
        cheapest = IntegerProgram(problem.candidates, problem.costs, nothing).solve(math.inf)
        self._evaluate([cheapest])
        return any(self._keeps(point) for point in self.points.values())

    def _evaluate_uniform(self) -> None:
        """For a front: each precision in all layers that may have it, the most exact one in the others."""
        candidates = self.problem.candidates
        if self.strategy.front and self.problem.levels is None:
            precisions = dict.fromkeys(precision for own in candidates.values() for precision in own)
            self._evaluate(
                {layer: precision if precision in own else own[-1] for layer, own in candidates.items()}
                for precision in precisions
            )

    def _measure(self) -> None:
        problem = self.problem
        pairs = [(layer, p) for layer, precisions in problem.candidates.items() for p in precisions]
        measure = problem.measure
        if self.strategy.front and problem.measure_on_search is not None:
            measure = problem.measure_on_search
        self.model = LossModel.of(measure(pairs))
        if measure is not problem.measure and problem.measured_plans is not None and problem.levels is None:
            # What was measured are plans too, where layers may have what stood before and behind the measured one.
            self.allowance += self._evaluate(
                plan
                for plan in problem.measured_plans(pairs)
                if all(precision in problem.candidates[layer] for layer, precision in plan.items())
            )

    def _sweep(self) -> None:
        """Plans for bounds from none down to the least possible, evenly in their logarithms."""
        problem, losses = self.problem, self.model.losses
        cheapest = self._solve([math.inf])[0]
        exact = {layer: self._most_exact(layer) for layer in problem.candidates}
        self._evaluate([cheapest] if problem.levels else [cheapest, exact])
        if cheapest is None:
            raise SearchError(
                f"no plan has the levels {spelled_levels(problem.levels or {})}: their counts have to fit the network's "
                f"{len(problem.candidates)} layers and what each of them may have"
            )
        largest = self.model.predict(cheapest)
        positive = [loss for loss in losses.values() if 0 < loss < math.inf]
        if not positive or largest <= 0:
            return
        smallest = max(min(positive), 1e-5 * min(largest, sum(positive)))
        largest = largest if math.isfinite(largest) else sum(positive)
        bounds = np.geomspace(largest, smallest, self.strategy.sweep + 2)[1:-1].tolist()
        self._evaluate(self._solve(coarse_to_fine(bounds)))

    # Filling the front.

    def _fill(self) -> int:
        """Evaluates the plans that promise most beyond the front; how many."""
        left = min(self.strategy.batch, self.allowance - len(self.points))
        if left <= 0:
            return 0
        self._fit()
        front = self._front()
        near = self._smooth_budget()
        promised: dict[Plan, Promise] = {}
        for plan in self._solve(bounds_in_gaps([point.smooth for point in front], self.strategy.step, _GAPS)):
            if plan is not None:
                items = tuple(plan.items())
                promised[items] = Promise(items, self.problem.costs.total(plan), self.model.predict(plan))
        for point in front:
            for promise in self._changes(point):
                known = promised.get(promise.plan)
                if known is None or promise.loss < known.loss:
                    promised[promise.plan] = promise
        new = [promise for promise in promised.values() if promise.plan not in self.points]
        if not self.strategy.front:
            new = [promise for promise in new if near / _NEAR <= promise.loss <= near * _NEAR]
        chosen = most_promising([(p.cost, p.smooth) for p in front], new, left, self.strategy.step)
        return self._evaluate(dict(promise.plan) for promise in chosen)

    def _front(self) -> list[_Point]:
        """Points that no other one dominates in cost and smooth loss, the cheapest first."""
        front: list[_Point] = []
        for point in sorted(self.points.values(), key=lambda p: (p.cost, p.smooth)):
            if not front or point.smooth < front[-1].smooth:
                front.append(point)
        return front

    def _changes(self, point: _Point) -> list[Promise]:
        """Plans that differ from a point in one layer; none where levels are prescribed."""
        losses, plan = self.model.losses, dict(point.plan)
        if self.problem.levels is not None:
            return []
        return [
            Promise(
                tuple({**plan, layer: other}.items()),
                point.cost + added,
                point.smooth + losses[layer, other] - losses[layer, plan[layer]],
            )
            for layer, other, added in self.changes.of(plan)
        ]

    def _fit(self) -> None:
        plans = [dict(plan) for plan in self.points]
        self.model = self.model.fitted(plans, [point.smooth for point in self.points.values()])

    # The budget.

    def _solve_near_budget(self) -> int:
        """Plans for the budget and bounds around it; how many are new."""
        self._fit()
        bound = self._smooth_budget()
        return self._evaluate(self._solve([bound * f for f in ((1.15, 1.0, 0.87, 0.7) if bound > 0 else (0.0,))]))

    def _smooth_budget(self) -> float:
        """The smooth loss at which the budget is reached, by isotonic regression over all points."""
        known = [(p.smooth, p.loss) for p in self.points.values() if 0 < p.smooth < math.inf and math.isfinite(p.loss)]
        if not known:
            return max(0.0, self.problem.budget)
        known.sort()
        smooth, loss = np.array(known).T
        rising = isotonic_regression(loss).x
        budget = self.problem.budget
        if rising[0] > budget:
            return 0.0 if budget <= 0 else float(smooth[0] * budget / rising[0])
        last = int(np.searchsorted(rising, budget, side="right")) - 1
        if last == len(rising) - 1 or rising[last + 1] == rising[last]:
            return float(smooth[last])
        part = (budget - rising[last]) / (rising[last + 1] - rising[last])
        return float(smooth[last] * (smooth[last + 1] / smooth[last]) ** part)

    def _keeps(self, point: _Point) -> bool:
        budget = self.problem.budget
        if point.loss > budget:
            return False
        if self.problem.check is None:
            return True
        if point.plan not in self.checked:
            self.checked[point.plan] = self.problem.check([dict(point.plan)])[0]
        return self.checked[point.plan] <= budget

    def _best(self) -> _Point:
        for point in sorted(self.points.values(), key=lambda p: (p.cost, p.loss)):
            if self._keeps(point):
                return point
        # Nothing holds: the least excess, on whichever samples it is larger.
        return min(
            self.points.values(), key=lambda p: (max(p.loss, self.checked.get(p.plan, -math.inf)), p.smooth, p.cost)
        )

    def _repair(self) -> int:
        """Evaluates the most promising single changes of the best plan; how many were new."""
        best = self._best()
        holds, bound = self._keeps(best), 1.1 * self._smooth_budget()
        moves: list[tuple[float, float, Plan]] = []
        for plan, cost, smooth in self._changes(best):
            if plan in self.points:
                continue
            saved, removed = best.cost - cost, best.smooth - smooth
            if holds and saved > 0 and smooth <= bound:
                moves.append((-saved, smooth, plan))
            if not holds and removed > 0:
                moves.append((-removed / max(-saved, 1e-3 * abs(best.cost) / len(plan)), smooth, plan))
        moves.sort(key=lambda move: move[:2])
        return self._evaluate(dict(plan) for _, _, plan in moves[: self.strategy.moves])

    # Results.

    def _most_exact(self, layer: str) -> str:
        return min(reversed(self.problem.candidates[layer]), key=lambda p: self.model.alone[layer, p])

    def _steps(self) -> tuple[SearchStep, ...]:
        candidates = self.problem.candidates
        return tuple(
            SearchStep(sum(p != candidates[layer][0] for layer, p in point.plan), point.loss, point.cost)
            for point in self.points.values()
        )


def _allowance_for_front(problem: SearchProblem) -> int:
    choices = [len(own) for own in problem.candidates.values()]
    alone = sum(choices) - len(choices)
    steps = [sum(count > step for count in choices) for step in range(1, max(choices, default=1))]
    greedy = sum(layers * (layers + 1) // 2 for layers in steps)
    return max(_FOR_ONE_PLAN, min(100 + 6 * len(choices), greedy * 3 // 4 - alone))
