"""Greedy search, its lazy form, and the one-shot search that it is compared with.

Source: Tsuji et al., "Greedy Search Algorithm for Mixed Precision in Post-Training Quantization of Convolutional Neural Network
Inspired by Submodular Optimization", ACML 2021. Algorithm 1 starts with all layers in a baseline precision; S are the layers
in the smaller one. It pushes into S, one after the other, the layer j that maximizes

    acc(S ∪ {j}) · (log params(S ∪ {j}))^β                                                              (Equation 2)

where params counts the parameters of the layers in S; N(N + 1)/2 evaluations. One-shot search (section 4.1) takes the order
of acc({j}) once and for all. β is 0, or tuned (section 4.1) so that in the first step the ratio of the largest to the smallest
value is the same for both factors: β = ln(max acc / min acc) / ln(max log params / min log params).

What the paper leaves open, and what is done here: ties go to the first layer; so does a step in which no objective is above 0
(no accuracy left), for which Algorithm 1 has no pick. With more than two candidates for a layer, the algorithm is run once
for every step of the ladder from the most exact precision down, each run starting from the cheapest plan within the budget of
the run before. The answer is the cheapest plan on the way that keeps the budget.

The lazy form (M. Minoux 1978) keeps the gains f(S ∪ {j}) − f(S) of earlier steps in a priority queue. If f were submodular
(Equation 3), a gain could only fall, so a layer whose gain, evaluated anew, is still the largest is the greedy pick. acc is
no submodular function; where a gain grows, the picks may differ. f(∅), whose log params(∅) is undefined, is set to
acc(∅)·(min log params({j}))^β.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tvm_hquant.search.problem import Assignment, SearchProblem, SearchResult, SearchStep
from tvm_hquant.search.reasons import explained


@dataclass(frozen=True)
class Descent:
    """Layers in the order in which they got the smaller precision, the losses after each, and β of the objective."""

    order: tuple[str, ...]
    losses: tuple[float, ...]
    beta: float


@dataclass(frozen=True)
class GreedyStrategy:
    """Algorithm 1. ``beta`` None: tuned. ``lazy``: with a priority queue of stale gains."""

    beta: float | None = 0.0
    lazy: bool = False

    @property
    def name(self) -> str:
        return "lazy-greedy" if self.lazy else "greedy"

    def search(self, problem: SearchProblem) -> SearchResult:
        """The cheapest plan on the greedy path that keeps the budget; the one with the smallest loss where none does."""
        descend = lazy_descent if self.lazy else greedy_descent
        return _down_the_ladder(problem, lambda stage: descend(stage, self.beta))


@dataclass(frozen=True)
class OneShotStrategy:
    """The order of the first step of Algorithm 1 with β = 0, never updated."""

    @property
    def name(self) -> str:
        return "one-shot"

    def search(self, problem: SearchProblem) -> SearchResult:
        """The cheapest plan in that order that keeps the budget; the one with the smallest loss where none does."""
        return _down_the_ladder(problem, one_shot_descent)


@dataclass(eq=False)
class DescentStage:
    """One run: which layers may go from ``base`` to ``lower``, and evaluation by the set S of those that went.

    ``evaluate`` gives losses of sets S; ``evaluated`` all of them so far, so that no set is asked for twice.
    """

    base: Assignment
    lower: Mapping[str, str]
    evaluate_plans: Callable[[Sequence[Assignment]], Sequence[float]]
    accuracy: float
    parameters: Mapping[str, int]
    evaluated: dict[frozenset[str], float] = field(default_factory=dict)

    def plan(self, chosen: frozenset[str]) -> dict[str, str]:
        """The assignment in which the layers in S have the smaller precision."""
        return {layer: self.lower[layer] if layer in chosen else p for layer, p in self.base.items()}

    def evaluate(self, sets: Sequence[frozenset[str]]) -> list[float]:
        """Losses of sets."""
        new = [chosen for chosen in dict.fromkeys(sets) if chosen not in self.evaluated]
        if new:
            self.evaluated.update(zip(new, self.evaluate_plans([self.plan(s) for s in new]), strict=True))
        return [self.evaluated[chosen] for chosen in sets]

    def log_parameters(self, chosen: frozenset[str]) -> float:
        """log params(S); 0 where S has one parameter or none."""
        return math.log(max(1, sum(self.parameters.get(layer, 1) for layer in chosen)))

    def objective(self, chosen: frozenset[str], loss: float, beta: float) -> float:
        """Equation 2."""
        accuracy = self.accuracy - loss
        return accuracy * self.log_parameters(chosen) ** beta if beta else accuracy


def tuned_beta(stage: DescentStage) -> float:
    """β by the first step of Algorithm 1; 0 where accuracies or sizes do not differ, or an accuracy is not positive."""
    alone = [frozenset([layer]) for layer in stage.lower]
    accuracies = [stage.accuracy - loss for loss in stage.evaluate(alone)]
    sizes = [stage.log_parameters(chosen) for chosen in alone]
    if not alone or min(accuracies) <= 0 or min(sizes) <= 0 or max(sizes) == min(sizes):
        return 0.0
    return math.log(max(accuracies) / min(accuracies)) / math.log(max(sizes) / min(sizes))


def greedy_descent(stage: DescentStage, beta: float | None) -> Descent:
    """Algorithm 1."""
    beta = tuned_beta(stage) if beta is None else beta
    chosen: frozenset[str] = frozenset()
    order: list[str] = []
    losses: list[float] = []
    while len(order) < len(stage.lower):
        left = [layer for layer in stage.lower if layer not in chosen]
        found = stage.evaluate([chosen | {layer} for layer in left])
        best, largest = 0, 0.0
        for number, (layer, loss) in enumerate(zip(left, found, strict=True)):
            value = stage.objective(chosen | {layer}, loss, beta)
            if largest < value:
                best, largest = number, value
        chosen |= {left[best]}
        order.append(left[best])
        losses.append(found[best])
    return Descent(tuple(order), tuple(losses), beta)


def lazy_descent(stage: DescentStage, beta: float | None) -> Descent:
    """Algorithm 1 with stale gains."""
    beta = tuned_beta(stage) if beta is None else beta
    layers = list(stage.lower)
    if not layers:
        return Descent((), (), beta)
    alone = [frozenset([layer]) for layer in layers]
    start = stage.evaluate([frozenset(), *alone])
    smallest = min(stage.log_parameters(chosen) for chosen in alone)
    value = (stage.accuracy - start[0]) * (smallest**beta if beta else 1.0)
    gains = [stage.objective(s, loss, beta) - value for s, loss in zip(alone, start[1:], strict=True)]
    # (−gain, position, size of S for which it was computed): ties go to the first layer.
    queue = [(-gain, number, 0) for number, gain in enumerate(gains)]
    heapq.heapify(queue)
    chosen: frozenset[str] = frozenset()
    order: list[str] = []
    losses: list[float] = []
    while queue:
        _, number, size = heapq.heappop(queue)
        with_it = chosen | {layers[number]}
        loss = stage.evaluate([with_it])[0]
        objective = stage.objective(with_it, loss, beta)
        if size != len(order):
            entry = (value - objective, number, len(order))
            if queue and queue[0] < entry:
                heapq.heappush(queue, entry)
                continue
        chosen, value = with_it, objective
        order.append(layers[number])
        losses.append(loss)
    return Descent(tuple(order), tuple(losses), beta)


def one_shot_descent(stage: DescentStage) -> Descent:
    """The layers by their accuracy alone, best first, with the loss after each."""
    alone = stage.evaluate([frozenset([layer]) for layer in stage.lower])
    ranked = sorted(zip(alone, range(len(alone)), stage.lower, strict=True))
    order = tuple(layer for _, _, layer in ranked)
    losses = stage.evaluate([frozenset(order[: count + 1]) for count in range(len(order))])
    return Descent(order, tuple(losses), 0.0)


def _down_the_ladder(problem: SearchProblem, descend: Callable[[DescentStage], Descent]) -> SearchResult:
    ladders = {layer: _ladder(problem, layer) for layer in problem.candidates}
    plan = {layer: ladder[0] for layer, ladder in ladders.items()}
    visited: list[tuple[dict[str, str], float]] = [(plan, problem.evaluate([plan])[0])]
    for step in range(1, max((len(ladder) for ladder in ladders.values()), default=1)):
        lower = {
            layer: ladder[step]
            for layer, ladder in ladders.items()
            if step < len(ladder) and plan[layer] == ladder[step - 1]
        }
        stage = DescentStage(plan, lower, problem.evaluate, problem.accuracy, problem.parameters)
        stage.evaluated[frozenset()] = next(loss for visited_plan, loss in visited if visited_plan == plan)
        descent = descend(stage)
        for count, loss in enumerate(descent.losses, 1):
            visited.append((stage.plan(frozenset(descent.order[:count])), loss))
        plan, _ = _best(problem, visited)
    return _result(problem, visited)


def _ladder(problem: SearchProblem, layer: str) -> list[str]:
    """The most exact precision, then the cheaper ones, each cheaper than the one before."""
    *others, exact = problem.candidates[layer]
    costs = problem.costs.layers
    ladder = [exact]
    for precision in sorted(others, key=lambda p: -costs[layer, p]):
        if costs[layer, precision] < costs[layer, ladder[-1]]:
            ladder.append(precision)
    return ladder


def _best(problem: SearchProblem, visited: Sequence[tuple[dict[str, str], float]]) -> tuple[dict[str, str], float]:
    within = [(problem.costs.total(plan), loss, n) for n, (plan, loss) in enumerate(visited) if loss <= problem.budget]
    if within:
        return visited[min(within)[2]]
    return min(visited, key=lambda entry: entry[1])


def _result(problem: SearchProblem, visited: Sequence[tuple[dict[str, str], float]]) -> SearchResult:
    plan, loss = _best(problem, visited)
    steps = tuple(
        SearchStep(sum(p != problem.candidates[layer][0] for layer, p in one.items()), l, problem.costs.total(one))
        for one, l in visited
    )
    return SearchResult(explained(problem, plan), loss, loss <= problem.budget, steps)
