"""Hierarchical quantization: low precision everywhere, then the layers that lose most get 16 bits.

Source: X. Mao, "Hierarchical Quantization Algorithm for Deep Learning Network Models", section 3.2: (1) measure what each
layer loses when it alone is quantized, (2) quantize the layers with large losses in 16 bits instead, again until the
loss is small enough, (3) connect the layers.

Differences to the paper, and why: layers are ranked by the loss that 16 bits remove per cycle that they cost, so that
cheap sensitive layers (depthwise ones, the first one) come before expensive ones and most of the work stays in 8 bits;
the number of promoted layers is found by bisection over that ranking instead of one layer at a time (a dozen joint
evaluations instead of one per layer); which 16-bit precision a layer gets is decided per layer, the cheapest that removes
most of its loss; and layers whose 16 bits are not enough go on to the most exact precision that the target has.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm_hquant.plan import LayerDecision
from tvm_hquant.search.problem import Assignment, SearchProblem, SearchResult, SearchStep, total_cost


@dataclass(frozen=True)
class HierarchicalStrategy:
    """Promotes the layers where 16 bits remove most loss for their cost, until the budget holds.

    Attributes:
        removed_loss: a 16-bit precision is good enough for a layer when it removes this fraction of the layer's loss.
    """

    removed_loss: float = 0.9

    @property
    def name(self) -> str:
        return "hierarchical"

    def search(self, problem: SearchProblem) -> SearchResult:
        """The assignment that keeps the budget with the fewest promotions along the ranking.

        If none does, the one with the smallest loss, with ``within_budget`` False.
        """
        return _Search(problem, self.removed_loss).run()


class _Search:
    def __init__(self, problem: SearchProblem, removed_loss: float) -> None:
        self.problem = problem
        self.removed_loss = removed_loss
        self.base = {layer: candidates[0] for layer, candidates in problem.candidates.items()}
        self.losses = dict(problem.measure(list(self.base.items())))
        self.target: dict[str, str] = {}
        self.ranking: list[str] = []
        self.steps: list[SearchStep] = []
        self.evaluated: dict[tuple[int, bool], float] = {}

    def run(self) -> SearchResult:
        count, exact = self._fewest_promotions()
        assignment = self._assignment(count, exact)
        loss = self.evaluated[count, exact]
        decisions = {layer: self._decision(layer, precision) for layer, precision in assignment.items()}
        return SearchResult(decisions, loss, loss <= self.problem.budget, tuple(self.steps))

    def _fewest_promotions(self) -> tuple[int, bool]:
        if self._loss(0, False) <= self.problem.budget:
            return 0, False
        self._rank()
        everything, exact = len(self.ranking), False
        if everything == 0:
            return 0, False
        if self._loss(everything, False) > self.problem.budget:
            exact = True
            if self._loss(everything, True) > self.problem.budget:
                return min(self.evaluated, key=lambda key: (self.evaluated[key], key))
        failing, holding = 0, everything
        while holding - failing > 1:
            # Losses fall steeply with the first promotions, so the middle is taken on a logarithmic scale.
            middle = max(failing + 1, min(holding - 1, round(((failing + 1) * (holding + 1)) ** 0.5) - 1))
            if self._loss(middle, exact) <= self.problem.budget:
                holding = middle
            else:
                failing = middle
        return holding, exact

    def _rank(self) -> None:
        """Measures what promotions would remove, and orders the layers by it, the most worthwhile first."""
        pairs = [(layer, p) for layer, candidates in self.problem.candidates.items() for p in candidates[1:]]
        self.losses.update(self.problem.measure(pairs))
        self.target = {layer: self._promotion(layer) for layer in self.base}
        worth = {layer: self._worth(layer) for layer, target in self.target.items() if target != self.base[layer]}
        self.ranking = sorted(worth, key=lambda name: (-worth[name], name))

    def _worth(self, layer: str) -> float:
        """Loss that a promotion removes, per cycle that it costs."""
        base, target = self.base[layer], self.target[layer]
        costs = self.problem.costs
        # A promotion that costs nothing is worth most; a small share of the layer's cost stands in for nothing.
        extra = max(costs[layer, target] - costs[layer, base], 0.01 * costs[layer, base])
        return (self.losses[layer, base] - self.losses[layer, target]) / extra

    def _promotion(self, layer: str) -> str:
        """The cheapest precision that removes most of the layer's loss, else the one that removes most."""
        candidates = self.problem.candidates[layer]
        allowed = (1.0 - self.removed_loss) * self.losses[layer, candidates[0]]
        for precision in sorted(candidates[1:], key=lambda p: self.problem.costs[layer, p]):
            if self.losses[layer, precision] <= allowed:
                return precision
        return min(candidates, key=lambda p: self.losses[layer, p])

    def _loss(self, count: int, exact: bool) -> float:
        key = (count, exact)
        if key not in self.evaluated:
            assignment = self._assignment(count, exact)
            self.evaluated[key] = self.problem.evaluate(assignment)
            self.steps.append(SearchStep(count, self.evaluated[key], total_cost(self.problem, assignment)))
        return self.evaluated[key]

    def _assignment(self, count: int, exact: bool) -> Assignment:
        """The first ``count`` layers of the ranking promoted; with ``exact`` to their most exact precision."""
        promoted = dict(self.base)
        for layer in self.ranking[:count]:
            promoted[layer] = self.problem.candidates[layer][-1] if exact else self.target[layer]
        return promoted

    def _decision(self, layer: str, precision: str) -> LayerDecision:
        base = self.base[layer]
        measured = f"alone it loses {self.losses[layer, base]:.3g} in {base}"
        if precision == base:
            return LayerDecision(precision, "within budget", measured)
        return LayerDecision(precision, "sensitive", f"{measured}, {self.losses[layer, precision]:.3g} in {precision}")
