"""Hierarchical quantization: low precision everywhere, then the layers that lose most get 16 bits.

Source: X. Mao, "Hierarchical Quantization Algorithm for Deep Learning Network Models", section 3.2: (1) measure what each
layer loses when it alone is quantized, (2) quantize the layers with large losses in 16 bits instead, again until the
loss is small enough, (3) connect the layers.

Differences to the paper, and why: what is ranked is not layers but promotions, by the loss that each removes per cycle
that it adds, so that cheap sensitive layers (depthwise ones, the first ones) come before expensive ones and most of the
work stays in 8 bits; a layer may be promoted again, to the most exact precision of the target in the end (of each layer's
precisions those on the convex hull of cost and loss count, as in the greedy solution of the multiple-choice knapsack
problem, E. Zemel 1980); and how many promotions it takes is found by bisection instead of one by one, with a dozen joint
evaluations instead of one per layer. Where a more exact precision costs no more than the one that the search would start from,
as measured times of small layers do, it starts from that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tvm_hquant.precision import parse_precision
from tvm_hquant.search.problem import Assignment, LayerPrecision, SearchProblem, SearchResult, SearchStep
from tvm_hquant.search.reasons import explained
from tvm_hquant.search.surrogate import largest_error


@dataclass(frozen=True)
class HierarchicalStrategy:
    """Makes the promotions that remove most loss for their cost, until the budget holds.

    Attributes:
        predict: what each layer loses in each precision, in place of measured losses: the paper's section 3 ranks layers by
            gradients and by the structure of the model, which here is what a promotion costs. None: losses are measured.
    """

    predict: Callable[[Sequence[LayerPrecision]], Mapping[LayerPrecision, float]] | None = None

    @property
    def name(self) -> str:
        return "hierarchical"

    def search(self, problem: SearchProblem) -> SearchResult:
        """The assignment that keeps the budget with the fewest promotions in the order of their worth.

        If none does, the one with the smallest loss, with ``within_budget`` False.
        """
        return _Search(problem, self.predict).run()


@dataclass(frozen=True)
class Promotion:
    """One step up of one layer. ``worth`` is the loss that it removes per cycle that it adds."""

    worth: float
    layer: str
    precision: str


def promotions_of(layer: str, points: list[tuple[str, float, float]]) -> list[Promotion]:
    """The promotions of one layer along the lower convex hull of its precisions.

    Args:
        layer: its name.
        points: (precision, cost, loss), the starting point first.

    Returns:
        Promotions in order, each worth no more than the one before.
    """
    precision, cost, loss = points[0]
    smallest = 0.01 * cost
    result: list[Promotion] = []
    remaining = points[1:]
    while True:
        # A promotion that costs nothing is worth most; a small share of the first cost stands in for nothing.
        steps = [((loss - l) / max(c - cost, smallest), c, p, l) for p, c, l in remaining if l < loss]
        if not steps:
            return result
        worth, cost, precision, loss = min(steps, key=lambda step: (-step[0], step[1], step[2]))
        result.append(Promotion(worth, layer, precision))


class _Search:
    def __init__(
        self,
        problem: SearchProblem,
        predict: Callable[[Sequence[LayerPrecision]], Mapping[LayerPrecision, float]] | None,
    ) -> None:
        self.problem = problem
        self.losses_of = predict or problem.measure
        self.source = "its gradient predicts" if predict else "alone it loses"
        costs = problem.costs.layers
        self.candidates = {
            layer: _from_cheapest({p: costs[layer, p] for p in precisions})
            for layer, precisions in problem.candidates.items()
        }
        self.base = {layer: precisions[0] for layer, precisions in self.candidates.items()}
        self.losses = dict(self.losses_of(list(self.base.items())))
        self.path: list[Promotion] = []
        self.steps: list[SearchStep] = []
        self.evaluated: dict[int, float] = {}

    def run(self) -> SearchResult:
        count = self._fewest_promotions()
        assignment, loss = self._assignment(count), self.evaluated[count]
        decisions = explained(replace(self.problem, candidates=self.candidates), assignment, self.losses, self.source)
        return SearchResult(decisions, loss, loss <= self.problem.budget, tuple(self.steps))

    def _fewest_promotions(self) -> int:
        budget = self.problem.budget
        if self._loss(0) <= budget:
            return 0
        self._find_path()
        if not self.path or self._loss(len(self.path)) > budget:
            return min(self.evaluated, key=lambda count: (self.evaluated[count], count))
        failing, holding = 0, len(self.path)
        while holding - failing > 1:
            # Losses fall steeply with the first promotions, so the middle is taken on a logarithmic scale.
            middle = max(failing + 1, min(holding - 1, round(((failing + 1) * (holding + 1)) ** 0.5) - 1))
            if self._loss(middle) <= budget:
                holding = middle
            else:
                failing = middle
        return holding

    def _find_path(self) -> None:
        """Asks what promotions remove, and orders all of them, the most worthwhile first."""
        candidates, costs = self.candidates, self.problem.costs.layers
        pairs = [(layer, p) for layer, precisions in candidates.items() for p in precisions[1:]]
        self.losses.update(self.losses_of(pairs))
        for layer, precisions in candidates.items():
            self.path += promotions_of(layer, [(p, costs[layer, p], self.losses[layer, p]) for p in precisions])
        # The sort is stable: promotions of one layer stay in their order.
        self.path.sort(key=lambda promotion: (-promotion.worth, promotion.layer))

    def _loss(self, count: int) -> float:
        if count not in self.evaluated:
            assignment = self._assignment(count)
            self.evaluated[count] = self.problem.evaluate([assignment])[0]
            promoted = sum(1 for layer, precision in assignment.items() if precision != self.base[layer])
            self.steps.append(SearchStep(promoted, self.evaluated[count], self.problem.costs.total(assignment)))
        return self.evaluated[count]

    def _assignment(self, count: int) -> Assignment:
        """The first ``count`` promotions made."""
        return {**self.base, **{p.layer: p.precision for p in self.path[:count]}}


def _from_cheapest(costs: Mapping[str, float]) -> tuple[str, ...]:
    """Of precisions with their costs those that a search which only promotes looks at, the one that it starts from first.

    It starts from the first one, or from a cheaper one whose rounding errors are no larger; only those of no larger errors are
    promotions.
    """
    errors = {precision: largest_error(parse_precision(precision)) for precision in costs}
    first = next(iter(costs))
    start = min((p for p in costs if errors[p] <= errors[first]), key=lambda p: (costs[p], errors[p]))
    return (start, *(p for p in costs if p != start and errors[p] <= errors[start]))
