"""The search promotes as few layers as it can: protects this against brute force, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant.search.hierarchical import HierarchicalStrategy
from tvm_hquant.search.problem import Assignment, CostModel, SearchProblem, SearchResult
from tvm_hquant.search.uniform import UniformStrategy

LOW, HIGH, EXACT = "a8w8", "a16w8", "float32"
COST = {LOW: 1.0, HIGH: 2.0, EXACT: 4.0}


class AdditiveModel:
    """A network whose joint loss is the sum of what its layers lose; notes what is measured and evaluated.

    ``sizes`` multiplies the costs of a layer; 1 if not given.
    """

    def __init__(self, losses: Mapping[str, Mapping[str, float]], sizes: Mapping[str, float] | None = None) -> None:
        self.losses = losses
        self.sizes = sizes or {}
        self.evaluated: list[dict[str, str]] = []
        self.measured: list[tuple[str, str]] = []

    def loss(self, assignments: Sequence[Assignment]) -> list[float]:
        self.evaluated += map(dict, assignments)
        return [sum(self.losses[layer][p] for layer, p in assignment.items()) for assignment in assignments]

    def measure(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        self.measured += pairs
        return {(layer, p): self.losses[layer][p] for layer, p in pairs}

    def problem(self, budget: float) -> SearchProblem:
        candidates = {layer: tuple(own) for layer, own in self.losses.items()}
        costs = {(layer, p): COST[p] * self.sizes.get(layer, 1.0) for layer, own in self.losses.items() for p in own}
        return SearchProblem(candidates, self.measure, CostModel(costs), self.loss, budget)


def model_of(*losses: tuple[float, float]) -> AdditiveModel:
    """Layers a, b, c… that lose so much in 8 and in 16 bits, and nothing in float32."""
    return AdditiveModel(
        {chr(ord("a") + i): {LOW: low, HIGH: high, EXACT: 0.0} for i, (low, high) in enumerate(losses)}
    )


def precisions(result: SearchResult) -> dict[str, str]:
    """Precision by layer."""
    return {layer: decision.precision for layer, decision in result.decisions.items()}


def promoted(result: SearchResult) -> int:
    """How many layers are not in the lowest precision."""
    return sum(p != LOW for p in precisions(result).values())


def fewest_promotions(model: AdditiveModel, budget: float) -> int:
    """By trying all assignments of all precisions."""
    assignments = (dict(zip(model.losses, choice, strict=True)) for choice in product(COST, repeat=len(model.losses)))
    return min(
        sum(p != LOW for p in assignment.values())
        for assignment in assignments
        if sum(model.losses[layer][p] for layer, p in assignment.items()) <= budget
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 120))
@settings(max_examples=60, deadline=None)
def test_fewest_promotions_as_by_brute_force(low: list[int], budget: int) -> None:
    """With losses that add up and 16 bits that remove them, no assignment at all promotes fewer layers."""
    model = model_of(*((float(loss), 0.0) for loss in low))
    result = HierarchicalStrategy().search(model.problem(float(budget)))
    assert result.within_budget
    assert result.loss == sum(model.losses[layer][p] for layer, p in precisions(result).items()) <= budget
    assert promoted(result) == fewest_promotions(model, float(budget))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=6), st.integers(0, 120))
@settings(max_examples=60, deadline=None)
def test_a_budget_that_can_be_kept_is_kept(losses: list[tuple[int, int]], budget: int) -> None:
    """Also where 16 bits remove little, or make it worse: float32 is the way out, so every budget ≥ 0 can be kept."""
    model = model_of(*((float(low), float(high)) for low, high in losses))
    result = HierarchicalStrategy().search(model.problem(float(budget)))
    assert result.within_budget
    assert result.loss <= budget
    assert model.evaluated[-1] is not None
    assert precisions(result) in model.evaluated, "the result itself was evaluated, not inferred"


def test_impossible_budget_gives_the_smallest_loss() -> None:
    """The best plan that was found is returned, and does not claim to keep the budget."""
    model = AdditiveModel({name: {LOW: 9.0, HIGH: 2.0} for name in "abc"})
    result = HierarchicalStrategy().search(model.problem(5.0))
    assert not result.within_budget
    assert precisions(result) == dict.fromkeys("abc", HIGH)
    assert result.loss == 6.0 == min(step.loss for step in result.steps)


def test_a_layer_with_one_candidate_is_left_alone() -> None:
    """What the user fixed, or the target forces, is never promoted, whatever it loses."""
    model = AdditiveModel({"fixed": {LOW: 100.0}, "free": {LOW: 1.0, HIGH: 0.0}})
    result = HierarchicalStrategy().search(model.problem(50.0))
    assert precisions(result) == {"fixed": LOW, "free": HIGH}
    assert not result.within_budget
    alone = HierarchicalStrategy().search(AdditiveModel({"fixed": {LOW: 1.0}}).problem(0.5))
    assert (precisions(alone), alone.within_budget) == ({"fixed": LOW}, False)


def test_no_layers_at_all() -> None:
    """A network without weights is within any budget that its loss keeps."""
    result = HierarchicalStrategy().search(AdditiveModel({}).problem(0.0))
    assert (result.decisions, result.loss, result.within_budget) == ({}, 0, True)


def test_the_most_sensitive_layers_go_first() -> None:
    """Step 1 of the paper: the ranking by the loss of each layer alone decides who is promoted, and the reasons say so."""
    result = HierarchicalStrategy().search(model_of((1.0, 0.0), (30.0, 0.0), (2.0, 0.0), (20.0, 0.0)).problem(4.0))
    assert precisions(result) == {"a": LOW, "b": HIGH, "c": LOW, "d": HIGH}
    reasons = {layer: decision.reason for layer, decision in result.decisions.items()}
    assert reasons == {"a": "within budget", "b": "sensitive", "c": "within budget", "d": "sensitive"}
    assert result.decisions["b"].detail == ("alone it loses 30 in a8w8, 0 in a16w8; a8w8 would save 16.67% of the cost")


def test_cheap_layers_are_promoted_before_expensive_ones() -> None:
    """A depthwise layer that loses half as much at a hundredth of the cost comes first: most work stays in 8 bits."""
    losses = {"large": {LOW: 4.0, HIGH: 0.0}, "small": {LOW: 2.0, HIGH: 0.0}}
    model = AdditiveModel(losses, {"large": 100.0, "small": 1.0})
    assert precisions(HierarchicalStrategy().search(model.problem(4.0))) == {"large": LOW, "small": HIGH}
    equal = AdditiveModel(losses)
    assert precisions(HierarchicalStrategy().search(equal.problem(4.0))) == {"large": HIGH, "small": LOW}


def test_a_precision_that_is_exact_and_cheap_is_where_the_search_starts() -> None:
    """A single layer that is fastest in float32, by measured times, is left there; narrower weights are no such start."""
    losses = {"only": {LOW: 1.0, "a8w4": 5.0, EXACT: 0.0}}
    costs = {("only", LOW): 2.0, ("only", "a8w4"): 1.0, ("only", EXACT): 1.5}
    model = AdditiveModel(losses)
    candidates = {"only": (LOW, "a8w4", EXACT)}

    def search(costs: Mapping[tuple[str, str], float]) -> SearchResult:
        return HierarchicalStrategy().search(
            SearchProblem(candidates, model.measure, CostModel(costs), model.loss, 3.0)
        )

    result = search(costs)
    assert precisions(result) == {"only": EXACT}
    assert result.decisions["only"].reason == "within budget", "it costs nothing, so it is not for being sensitive"
    assert {p for _, p in model.measured} == {EXACT}
    assert precisions(search({**costs, ("only", EXACT): 2.5})) == {"only": LOW}


def test_nothing_but_the_lowest_precision_is_measured_where_that_is_enough() -> None:
    """The common case is cheap: 8 bits everywhere keep the budget, so no promotion is ever looked at."""
    model = model_of((1.0, 0.0), (2.0, 0.0))
    result = HierarchicalStrategy().search(model.problem(3.0))
    assert (promoted(result), result.loss) == (0, 3.0)
    assert {p for _, p in model.measured} == {LOW}
    assert len(model.evaluated) == 1


def test_each_layer_gets_the_precision_that_is_worth_its_cost() -> None:
    """16 bits where they remove most of a layer's loss, the exact precision where only that does, or where it must be."""
    for budget, expected in ((5.0, HIGH), (4.0, EXACT)):
        result = HierarchicalStrategy().search(model_of((40.0, 5.0), (40.0, 30.0)).problem(budget))
        assert precisions(result) == {"a": expected, "b": EXACT}


def test_few_evaluations() -> None:
    """A joint evaluation runs the network over all search samples: their number grows with the logarithm of the layers."""
    model = model_of(*((float(i % 97 + 1), 0.0) for i in range(26)))
    result = HierarchicalStrategy().search(model.problem(200.0))
    assert result.within_budget
    assert len(model.evaluated) == len(result.steps) <= 12
    assert len({tuple(sorted(a.items())) for a in model.evaluated}) == len(model.evaluated), (
        "nothing is evaluated twice"
    )


@pytest.mark.parametrize("budget", [0.0, 17.0, 60.0])
def test_deterministic(budget: float) -> None:
    """Equal losses are ranked by name: a search gives the same plan again."""
    losses = [(5.0, 1.0)] * 6 + [(9.0, 9.0)] * 3
    first, second = (HierarchicalStrategy().search(model_of(*losses).problem(budget)) for _ in range(2))
    assert first == second
    shuffled = AdditiveModel(dict(reversed(list(model_of(*losses).losses.items()))))
    assert precisions(HierarchicalStrategy().search(shuffled.problem(budget))) == precisions(first)


def test_uniform_falls_back_to_the_most_exact_candidate() -> None:
    """A layer that may not have the wanted precision says so; why, those know who gave it its candidates."""
    model = AdditiveModel({"a": {LOW: 1.0, EXACT: 0.0}, "b": {HIGH: 2.0, EXACT: 0.0}})
    result = UniformStrategy(LOW).search(model.problem(1.0))
    assert precisions(result) == {"a": LOW, "b": EXACT}
    assert result.decisions["b"].reason == "no kernel"
    assert (result.loss, result.within_budget) == (1.0, True)
    assert result.steps[0].cost == COST[LOW] + COST[EXACT]
