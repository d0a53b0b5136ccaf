"""The integer program finds what brute force finds, and the search around it keeps the budget where it can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.synthetic import SyntheticNetwork, precisions
from tvm_hquant.errors import SearchError
from tvm_hquant.search.ilp import IntegerProgramStrategy
from tvm_hquant.search.integer_program import IntegerProgram
from tvm_hquant.search.problem import CostModel, LayerPrecision
from tvm_hquant.sensitivity.single_layers import SingleLayerPlans

NAMES = ("a8w4", "a8w8", "float32")


@st.composite
def networks(draw: st.DrawFn) -> SyntheticNetwork:
    """One to five layers in a chain, with whole losses and costs, and conversions between neighbours."""
    count = draw(st.integers(1, 5))
    layers = [f"layer{i}" for i in range(count)]
    number = st.integers(0, 30)
    losses = {layer: {p: float(draw(number)) for p in NAMES[:2]} | {"float32": 0.0} for layer in layers}
    costs = {layer: {p: float(draw(number)) for p in NAMES} for layer in layers}
    pairs = {
        pair: {(p, q): float(draw(number)) for p in NAMES for q in NAMES if (p == "float32") != (q == "float32")}
        for pair in pairwise(layers)
    }
    return SyntheticNetwork(losses, costs, pairs)


@given(networks(), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_optimal_as_by_brute_force(network: SyntheticNetwork, budget: int) -> None:
    """No assignment at all that keeps the bound is cheaper, with what conversions cost in the balance."""
    problem = network.problem(float(budget))
    losses = {(layer, p): loss for layer, own in network.losses.items() for p, loss in own.items()}
    found = IntegerProgram(problem.candidates, problem.costs, losses).solve(budget + 0.5)
    least = network.least_cost(budget + 0.5)
    assert found is not None
    assert network.loss(found) <= budget + 0.5
    assert network.model.total(found) == pytest.approx(least)


@given(networks(), st.integers(1, 100))
@settings(max_examples=40, deadline=None)
def test_search_of_an_additive_network_is_optimal(network: SyntheticNetwork, budget: int) -> None:
    """Where losses add up, the whole search gives the cheapest plan of all, and has evaluated it."""
    result = IntegerProgramStrategy().search(network.problem(budget + 0.5))
    assert result.within_budget
    assert result.loss == network.loss(precisions(result)) <= budget + 0.5
    assert precisions(result) in network.evaluated
    assert network.model.total(precisions(result)) == pytest.approx(network.least_cost(budget + 0.5), rel=1e-6)


def chain(count: int, low: float = 4.0, middle: float = 1.0) -> SyntheticNetwork:
    """Equal layers without conversions."""
    layers = [f"layer{i}" for i in range(count)]
    losses = {layer: {"a8w4": low, "a8w8": middle, "float32": 0.0} for layer in layers}
    costs = {layer: {"a8w4": 1.0, "a8w8": 2.0, "float32": 8.0} for layer in layers}
    return SyntheticNetwork(losses, costs)


@pytest.mark.parametrize("front", [False, True])
def test_interactions_are_learned(front: bool) -> None:
    """Joint losses three times their sum, worse in the first half: the budget holds, and at nearly the least cost."""

    def interact(assignment: dict[str, str], _total: float) -> float:
        first = sum(chained.losses[layer][p] for layer, p in list(assignment.items())[:4])
        second = sum(chained.losses[layer][p] for layer, p in list(assignment.items())[4:])
        return 6 * first + 2 * second

    chained = chain(8)
    network = SyntheticNetwork(chained.losses, chained.costs, interaction=interact)
    result = IntegerProgramStrategy(front).search(network.problem(40.0))
    assert result.within_budget
    assert network.model.total(precisions(result)) <= 1.05 * network.least_cost(40.0)
    assert len(network.evaluated) < (120 if front else 60) < len(network.assignments())


def test_the_cheapest_plan_is_enough_where_it_keeps_the_budget() -> None:
    """One plan is wanted, and all layers may be narrow: a single evaluation, and no layer is measured."""
    network = chain(6)
    problem = replace(network.problem(24.0), measure=lambda pairs: pytest.fail(f"measured {pairs}"))
    result = IntegerProgramStrategy(front=False).search(problem)
    assert precisions(result) == dict.fromkeys(network.losses, "a8w4")
    assert len(network.evaluated) == 1


@given(networks())
@settings(max_examples=20, deadline=None)
def test_front_of_an_additive_network(network: SyntheticNetwork) -> None:
    """Of all plans there are, none is cheaper than the front by more than the step in loss that it leaves out."""
    strategy = IntegerProgramStrategy()
    result = strategy.search(network.problem(0.0))
    found = [(step.cost, step.loss) for step in result.steps]
    for plan in network.assignments():
        cost, loss = network.model.total(plan), network.loss(plan)
        assert any(c <= cost + 1e-6 and s <= max(1.2 * loss, 1e-6) for c, s in found), plan


def test_the_budget_may_be_in_another_unit_than_the_smooth_loss() -> None:
    """The budget counts the square root of what adds up, as shares of changed classes do."""
    network = chain(6)
    result = IntegerProgramStrategy(front=False).search(
        replace(
            network.problem(3.5),
            evaluate=lambda plans: [math.sqrt(network.loss(plan)) for plan in plans],
            smooth=network.evaluate,
        )
    )
    assert result.within_budget
    assert network.model.total(precisions(result)) == network.least_cost(3.5**2)


def test_plans_have_to_hold_on_samples_that_they_were_not_chosen_by() -> None:
    """On the check samples everything loses half as much again: the plan is one that keeps the budget there too."""
    chained = chain(5)
    network = SyntheticNetwork(chained.losses, chained.costs, check_factor=1.5)
    result = IntegerProgramStrategy().search(network.problem(9.0))
    assert result.within_budget
    assert 1.5 * network.loss(precisions(result)) <= 9.0
    assert len(network.checked) < len(network.evaluated), "check samples are used sparingly"


def test_impossible_budget_gives_the_least_loss() -> None:
    """The best plan that was found is returned and does not claim to keep the budget."""
    losses = {f"layer{i}": {"a8w4": 5.0 + i, "a8w8": 2.0} for i in range(4)}
    costs = {layer: {"a8w4": 1.0, "a8w8": 2.0} for layer in losses}
    result = IntegerProgramStrategy().search(SyntheticNetwork(losses, costs).problem(3.0))
    assert not result.within_budget
    assert precisions(result) == dict.fromkeys(losses, "a8w8")
    assert result.loss == 8.0


def test_one_layer_and_none() -> None:
    """Networks of one layer, of one layer without a choice, and without layers."""
    for budget, expected in ((5.0, "a8w4"), (2.0, "a8w8"), (0.5, "float32")):
        assert precisions(IntegerProgramStrategy().search(chain(1).problem(budget))) == {"layer0": expected}
    fixed = SyntheticNetwork({"only": {"float32": 0.0}}, {"only": {"float32": 3.0}})
    assert precisions(IntegerProgramStrategy().search(fixed.problem(0.0))) == {"only": "float32"}
    empty = IntegerProgramStrategy().search(SyntheticNetwork({}, {}).problem(1.0))
    assert (empty.decisions, empty.within_budget) == ({}, True)


def test_layers_without_a_choice_keep_theirs() -> None:
    """What the spec forbids or a user fixed is never changed, whatever it costs or loses."""
    chained = chain(4)
    losses = {**chained.losses, "fixed": {"float32": 0.0}, "forced": {"a8w4": 3.0}}
    costs = {**chained.costs, "fixed": {"float32": 100.0}, "forced": {"a8w4": 1.0}}
    network = SyntheticNetwork(losses, costs)
    found = precisions(IntegerProgramStrategy().search(network.problem(8.0)))
    assert (found["fixed"], found["forced"]) == ("float32", "a8w4")
    assert network.model.total(found) == network.least_cost(8.0)


def test_ties_are_broken_the_same_way_every_time() -> None:
    """Six layers of which any three may be narrow: one search and another give the same plan and ask the same questions."""
    first, second = chain(6), chain(6)
    results = [IntegerProgramStrategy().search(network.problem(15.5)) for network in (first, second)]
    assert results[0] == results[1]
    assert first.evaluated == second.evaluated
    assert first.model.total(precisions(results[0])) == first.least_cost(15.5)


def test_of_equal_costs_the_smaller_loss() -> None:
    """Precision that costs nothing is taken."""
    network = SyntheticNetwork({"a": {"a8w4": 5.0, "a8w8": 1.0}}, {"a": {"a8w4": 2.0, "a8w8": 2.0}})
    assert precisions(IntegerProgramStrategy().search(network.problem(10.0))) == {"a": "a8w8"}


def test_prescribed_levels() -> None:
    """As many layers as asked for get each precision, the least sensitive ones the narrow one."""
    losses = {f"layer{i}": {"a8w4": float(i), "float32": 0.0} for i in range(5)}
    costs = {layer: {"a8w4": 1.0, "float32": 4.0} for layer in losses}
    result = IntegerProgramStrategy().search(
        SyntheticNetwork(losses, costs).problem(3.5, levels={"a8w4": 3, "float32": 2})
    )
    assert precisions(result) == {f"layer{i}": "a8w4" if i < 3 else "float32" for i in range(5)}


def test_prescribed_levels_hold_for_every_plan() -> None:
    """The plans by which single layers are measured do not have the levels: however cheap, none may be the answer."""
    losses = {f"layer{i}": {"a8w4": float(i), "float32": 0.0} for i in range(5)}
    costs = {layer: {"a8w4": 4.0, "float32": 1.0} for layer in losses}
    network = SyntheticNetwork(losses, costs)
    problem = network.problem(100.0, levels={"a8w4": 3, "float32": 2})
    measured = replace(
        problem,
        measure_on_search=lambda pairs: problem.measure(pairs),
        measured_plans=SingleLayerPlans(list(losses)).plans,
    )
    IntegerProgramStrategy().search(measured)
    assert network.evaluated
    assert all(list(plan.values()).count("a8w4") == 3 for plan in network.evaluated)


def test_what_cannot_be_computed_is_not_chosen() -> None:
    """A layer that gives NaN in a precision has an infinite loss there."""
    losses = {"a": {"float16": math.inf, "float32": 0.0}, "b": {"float16": 0.1, "float32": 0.0}}
    costs = {layer: {"float16": 1.0, "float32": 2.0} for layer in losses}
    result = IntegerProgramStrategy().search(SyntheticNetwork(losses, costs).problem(1.0))
    assert precisions(result) == {"a": "float32", "b": "float16"}


def test_levels_that_do_not_fit_are_refused() -> None:
    """More layers asked for than there are: no plan has them."""
    with pytest.raises(SearchError, match="levels"):
        IntegerProgramStrategy().search(chain(2).problem(3.5, levels={"a8w4": 3}))


def test_the_solver_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The standard output is the user's. HiGHS 1.12, which SciPy 1.17 has inside, wrote a line while it solved this program."""
    random = np.random.default_rng(2)
    layers = [f"layer{i}" for i in range(int(random.integers(5, 55)))]
    names = tuple("abcdef")[: int(random.integers(2, 7))]
    of_precision = dict(zip(names, np.sort(random.uniform(0.3, 4, len(names))).tolist(), strict=True))
    costs, losses = {}, {}
    for layer in layers:
        size = 10 ** random.uniform(0, 2.5)
        costs.update({(layer, p): float(of_precision[p] * size * random.uniform(0.9, 1.1)) for p in names})
    for layer in layers:
        losses.update({(layer, p): float(10 ** random.normal(-3, 1.2) * 0.1**i) for i, p in enumerate(names)})
    pairs = {
        pair: {(p, q): float(random.uniform(0, 3)) for p in names for q in names if p != q and random.random() < 0.6}
        for pair in pairwise(layers)
    }
    program = IntegerProgram(dict.fromkeys(layers, names), CostModel(costs, pairs), losses)
    largest = sum(max(losses[layer, p] for p in names) for layer in layers)
    assert program.solve(0.01 * largest) is not None
    written = capfd.readouterr()
    assert written.out == written.err == ""


def test_plans_that_measuring_evaluates_are_points() -> None:
    """For a front they cost nothing more; those with a precision that a search may not choose are no plans of it."""
    network = chain(4)
    layers = list(network.losses)
    may = {**dict.fromkeys(layers, "a8w8"), layers[0]: "a8w4"}
    may_not = {**may, layers[3]: "bfloat16"}
    measured = network.problem(2.5)
    again = dict(measured.measure([(layer, p) for layer, own in network.losses.items() for p in own]))
    problem = replace(measured, measure_on_search=lambda _pairs: again, measured_plans=lambda _pairs: [may, may_not])
    IntegerProgramStrategy(front=True).search(problem)
    assert may in network.evaluated
    assert may_not not in network.evaluated
    network.evaluated.clear()
    IntegerProgramStrategy(front=False).search(problem)
    assert network.evaluated[0] != may


def test_a_front_that_is_stopped_early_has_plans_everywhere() -> None:
    """One precision everywhere comes first, before layers are measured; the next few plans lie all along the front."""
    network = chain(6)
    evaluated_before: list[int] = []

    def measure(pairs: Sequence[LayerPrecision]) -> dict[LayerPrecision, float]:
        evaluated_before.append(len(network.evaluated))
        return {(layer, p): network.losses[layer][p] for layer, p in pairs}

    problem = replace(network.problem(2.5), measure=measure)
    IntegerProgramStrategy(front=True).search(problem)
    names = list(network.losses["layer0"])
    assert network.evaluated[: len(names)] == [dict.fromkeys(network.losses, name) for name in names]
    assert evaluated_before[0] == len(names)
    costs = [problem.costs.total(plan) for plan in network.evaluated]
    first = costs[len(names) : len(names) + 4]
    third = (max(costs) - min(costs)) / 3
    assert min(first) < min(costs) + third
    assert max(first) > min(costs) + 2 * third
