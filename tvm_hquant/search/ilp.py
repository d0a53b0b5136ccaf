"""Ours: an integer program over measured sensitivities, corrected by joint evaluations until the budget holds.

1. *Sensitivities*: the loss of the network with one layer alone in a precision, for all of them (``problem.measure``).
2. *Sweep*: the integer program (:mod:`~tvm_hquant.search.integer_program`) for bounds on the sum of these losses from the
   smallest to the largest that matters. Its plans are evaluated jointly: they are the Pareto front.
3. *Correction*: layers interact, so sums of single losses are not joint losses. The layers are cut into groups, in execution
   order, and the joint losses l of all plans evaluated so far are fitted by

       Σ_g scale(g) · Σ_{layers in g} loss(layer)  ≈  l,   scale ≥ 0

   (least squares with weights 1/l, since small losses matter as much as large ones, drawn towards one common scale). With
   the corrected losses the sum is an estimate of the joint loss in the budget's own unit. The sweep is made once more, and the
   program is solved for the budget and for bounds around it; so it goes on while there are new plans.
4. *Check*: the plan has to keep the budget on samples that it was not chosen by, where there are some. Of the plans that keep
   it on the search samples the cheapest that also keeps it there is taken.
5. *Repair*: single layers are changed: cheaper ones while the budget holds, or, where no plan keeps it, more exact ones,
   those first that by the corrected losses give most for what they take.

Everything is deterministic: HiGHS is, and nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from tvm_hquant.errors import SearchError
from tvm_hquant.plan import LayerDecision
from tvm_hquant.search.integer_program import IntegerProgram
from tvm_hquant.search.problem import Assignment, LayerPrecision, SearchProblem, SearchResult, SearchStep

Floats = npt.NDArray[np.float64]
Plan = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class IntegerProgramStrategy:
    """Minimizes the cost subject to the budget.

    Attributes:
        sweep: plans of the first sweep.
        rounds: corrections at most.
        groups: of layers, each with a scale of its own.
        repairs: rounds of single changes at most; in each ``moves`` plans are evaluated.
    """

    sweep: int = 24
    rounds: int = 4
    groups: int = 4
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


class _Search:
    def __init__(self, strategy: IntegerProgramStrategy, problem: SearchProblem) -> None:
        self.strategy, self.problem = strategy, problem
        pairs = [(layer, p) for layer, precisions in problem.candidates.items() for p in precisions]
        measured = problem.measure(pairs)
        self.alone: dict[LayerPrecision, float] = {pair: max(0.0, measured[pair]) for pair in pairs}
        layers = list(problem.candidates)
        count = max(1, min(strategy.groups, len(layers)))
        self.group = {layer: number * count // len(layers) for number, layer in enumerate(layers)}
        self.scale: Floats = np.ones(count)
        self.joint: dict[Plan, float] = {}
        self.checked: dict[Plan, float] = {}

    def run(self) -> SearchResult:
        self._sweep(self.alone)
        for number in range(self.strategy.rounds):
            self._fit()
            if number == 0:
                self._sweep(self._corrected())
            if not self._solve_near_budget():
                break
        for _ in range(self.strategy.repairs):
            if not self._repair():
                break
        plan, loss = self._best()
        return SearchResult(self._decisions(dict(plan)), loss, self._keeps(plan), self._steps())

    # Plans.

    def _evaluate(self, plans: Sequence[Mapping[str, str] | None]) -> int:
        """Evaluates the plans that are new; how many there were."""
        new = [
            p for p in dict.fromkeys(tuple(plan.items()) for plan in plans if plan is not None) if p not in self.joint
        ]
        if new:
            self.joint.update(zip(new, self.problem.evaluate([dict(p) for p in new]), strict=True))
        return len(new)

    def _solve(self, bounds: Sequence[float], losses: Mapping[LayerPrecision, float]) -> list[dict[str, str] | None]:
        program = IntegerProgram(self.problem.candidates, self.problem.costs, losses, self.problem.levels)
        return [program.solve(bound) for bound in bounds]

    def _sweep(self, losses: Mapping[LayerPrecision, float]) -> None:
        """Plans for bounds from none down to the least possible, evenly in their logarithms."""
        cheapest = self._solve([math.inf], losses)[0]
        exact = {layer: self._most_exact(layer) for layer in self.problem.candidates}
        ends: list[Mapping[str, str] | None] = [cheapest] if self.problem.levels else [cheapest, exact]
        self._evaluate(ends)
        if cheapest is None:
            raise SearchError(
                f"no plan has the levels {dict(self.problem.levels or {})}: their counts have to fit the network's "
                f"{len(self.problem.candidates)} layers and what each of them may have"
            )
        largest = sum(losses[pair] for pair in cheapest.items())
        positive = [loss for loss in losses.values() if 0 < loss < math.inf]
        if not positive or largest <= 0:
            return
        smallest = max(min(positive), 1e-4 * min(largest, sum(positive)))
        largest = largest if math.isfinite(largest) else sum(positive)
        bounds = np.geomspace(largest, smallest, self.strategy.sweep + 2)[1:-1]
        self._evaluate(self._solve(bounds.tolist(), losses))

    def _solve_near_budget(self) -> int:
        budget = self.problem.budget
        if budget <= 0:
            return self._evaluate(self._solve([0.0], self._corrected()))
        return self._evaluate(self._solve([budget * f for f in (1.25, 1.0, 0.8, 0.6)], self._corrected()))

    # Correction.

    def _features(self, plan: Plan) -> Floats:
        values = np.zeros(len(self.scale))
        for pair in plan:
            values[self.group[pair[0]]] += self.alone[pair]
        return values

    def _fit(self) -> None:
        """Scales of the groups from all joint losses; losses of 0 and below say little and are left out."""
        rows = [(self._features(plan), loss) for plan, loss in self.joint.items() if 0 < loss < math.inf]
        rows = [(f, loss) for f, loss in rows if np.isfinite(f).all() and f.sum() > 0]
        if not rows:
            return
        features = np.array([f / loss for f, loss in rows])
        common = 1.0 / float(np.median(features.sum(axis=1)))
        # A pull of each scale towards the common one, as strong as one plan whose loss all groups share alike.
        share = features.mean(axis=0)
        pull = np.diag(np.where(share > 0, share, 1.0))
        matrix = np.vstack([features, pull])
        wanted = np.concatenate([np.ones(len(rows)), np.diag(pull) * common])
        self.scale = nnls(matrix, wanted)[0]

    def _corrected(self) -> dict[LayerPrecision, float]:
        return {pair: loss * float(self.scale[self.group[pair[0]]]) for pair, loss in self.alone.items()}

    # Check and repair.

    def _keeps(self, plan: Plan) -> bool:
        budget = self.problem.budget
        if self.joint[plan] > budget:
            return False
        if self.problem.check is None:
            return True
        if plan not in self.checked:
            self.checked[plan] = self.problem.check([dict(plan)])[0]
        return self.checked[plan] <= budget

    def _best(self) -> tuple[Plan, float]:
        for plan in sorted(self.joint, key=lambda p: (self._cost(p), self.joint[p])):
            if self._keeps(plan):
                return plan, self.joint[plan]
        # Nothing holds: the least excess, on whichever samples it is larger.
        plan = min(self.joint, key=lambda p: (max(self.joint[p], self.checked.get(p, -math.inf)), self._cost(p)))
        return plan, self.joint[plan]

    def _repair(self) -> int:
        """Evaluates the most promising single changes of the best plan; how many were new."""
        plan, loss = self._best()
        holds = self._keeps(plan)
        losses, costs = self._corrected(), self.problem.costs
        before = costs.predicted(dict(plan))
        moves: list[tuple[float, float, dict[str, str]]] = []
        for layer, precision in plan if self.problem.levels is None else ():
            for other in self.problem.candidates[layer]:
                changed = {**dict(plan), layer: other}
                saved = before - costs.predicted(changed)
                added = losses[layer, other] - losses[layer, precision]
                if other == precision or tuple(changed.items()) in self.joint:
                    continue
                if holds and saved > 0 and loss + added <= 1.25 * self.problem.budget:
                    moves.append((-saved, added, changed))
                if not holds and added < 0:
                    moves.append((added / max(-saved, 1e-3 * abs(before) / len(plan)), added, changed))
        moves.sort(key=lambda move: move[:2])
        return self._evaluate([changed for _, _, changed in moves[: self.strategy.moves]])

    # Results.

    def _cost(self, plan: Plan) -> float:
        return self.problem.costs.total(dict(plan))

    def _most_exact(self, layer: str) -> str:
        return min(reversed(self.problem.candidates[layer]), key=lambda p: self.alone[layer, p])

    def _steps(self) -> tuple[SearchStep, ...]:
        candidates = self.problem.candidates
        return tuple(
            SearchStep(sum(p != candidates[layer][0] for layer, p in plan), loss, self._cost(plan))
            for plan, loss in self.joint.items()
        )

    def _decisions(self, plan: Assignment) -> dict[str, LayerDecision]:
        decisions = {}
        for layer, precision in plan.items():
            cheapest = min(self.problem.candidates[layer], key=lambda p: self.problem.costs.layers[layer, p])
            detail = f"alone it loses {self.alone[layer, precision]:.3g}"
            if precision == cheapest:
                decisions[layer] = LayerDecision(precision, "within budget", detail)
                continue
            detail += f", {self.alone[layer, cheapest]:.3g} in {cheapest}"
            gains = self.alone[layer, precision] < self.alone[layer, cheapest]
            decisions[layer] = LayerDecision(precision, "sensitive" if gains else "cast cost", detail)
        return decisions
