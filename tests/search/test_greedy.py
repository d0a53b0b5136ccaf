"""Greedy searches pick what Algorithm 1 picks: protects this against cases solved by hand and by brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.synthetic import SyntheticNetwork, precisions
from tvm_hquant.search.greedy import (
    Descent,
    DescentStage,
    GreedyStrategy,
    OneShotStrategy,
    greedy_descent,
    lazy_descent,
    one_shot_descent,
    tuned_beta,
)
from tvm_hquant.search.problem import Assignment

LOW, BASE = "a8w4", "a8w8"


def network(losses: dict[str, float], interaction: dict[frozenset[str], float] | None = None) -> SyntheticNetwork:
    """Layers that lose so much in the smaller precision; ``interaction`` adds losses where all of a set are in it."""

    def joint(assignment: Assignment, total: float) -> float:
        low = {layer for layer, p in assignment.items() if p == LOW}
        return total + sum(extra for together, extra in (interaction or {}).items() if together <= low)

    table = {layer: {LOW: loss, BASE: 0.0} for layer, loss in losses.items()}
    return SyntheticNetwork(table, {layer: {LOW: 1.0, BASE: 2.0} for layer in losses}, interaction=joint)


def stage(of: SyntheticNetwork, parameters: dict[str, int] | None = None, accuracy: float = 1.0) -> DescentStage:
    """Every layer may go from the baseline to the smaller precision."""
    sizes = parameters or dict.fromkeys(of.losses, 100)
    return DescentStage(dict.fromkeys(of.losses, BASE), dict.fromkeys(of.losses, LOW), of.evaluate, accuracy, sizes)


def by_definition(of: SyntheticNetwork, sizes: dict[str, int], beta: float) -> list[str]:
    """Algorithm 1, line by line."""
    chosen: list[str] = []
    for _ in of.losses:
        largest, picked = 0.0, ""
        for layer in of.losses:
            if layer not in chosen:
                low = {*chosen, layer}
                accuracy = 1.0 - of.loss({name: LOW if name in low else BASE for name in of.losses})
                value = accuracy * math.log(sum(sizes[name] for name in low)) ** beta
                if largest < value:
                    largest, picked = value, layer
        chosen.append(picked)
    return chosen


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(2, 5000)), min_size=1, max_size=5),
    st.dictionaries(st.frozensets(st.integers(0, 4), min_size=2, max_size=3), st.integers(0, 20), max_size=4),
    st.sampled_from([0.0, 0.02, 0.5]),
)
@settings(max_examples=60, deadline=None)
def test_greedy_is_algorithm_1(layers: list[tuple[int, int]], together: dict[frozenset[int], int], beta: float) -> None:
    """Also where layers interact, and with ties: pick by pick, with N(N + 1)/2 evaluations."""
    of = network(
        {f"{i}": 0.001 * loss for i, (loss, _) in enumerate(layers)},
        {frozenset(map(str, s)): 0.001 * extra for s, extra in together.items()},
    )
    sizes = {f"{i}": size for i, (_, size) in enumerate(layers)}
    descent = greedy_descent(stage(of, sizes), beta)
    assert list(descent.order) == by_definition(of, sizes, beta)
    assert len(of.evaluated) == len(layers) * (len(layers) + 1) // 2
    for count, loss in enumerate(descent.losses, 1):
        low = set(descent.order[:count])
        assert loss == of.loss({name: LOW if name in low else BASE for name in of.losses})


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8, unique=True))
@settings(max_examples=40, deadline=None)
def test_lazy_picks_the_same_where_gains_only_fall(losses: list[int]) -> None:
    """Losses that add up are modular, so submodular: same picks, same losses, far fewer evaluations."""
    table = {f"{i}": 1e-5 * loss for i, loss in enumerate(losses)}
    exact, lazy = network(table), network(table)
    picks, lazy_picks = greedy_descent(stage(exact), 0.0), lazy_descent(stage(lazy), 0.0)
    assert lazy_picks.order == picks.order
    assert lazy_picks.losses == pytest.approx(picks.losses)
    assert len(lazy.evaluated) <= 2 * len(losses)


def test_lazy_may_differ_where_a_gain_grows() -> None:
    """b and c together lose less than alone: greedy sees it at once, a stale gain hides it. Both are told apart."""
    of = {"a": 0.01, "b": 0.02, "c": 0.03}
    together = {frozenset("ac"): -0.025}
    assert greedy_descent(stage(network(of, together)), 0.0).order == ("a", "c", "b")
    assert lazy_descent(stage(network(of, together)), 0.0).order == ("a", "b", "c")


def test_one_shot_never_looks_again() -> None:
    """Section 4.1: the order of the first step, though a and b together lose much."""
    of = {"a": 0.01, "b": 0.02, "c": 0.03}
    together = {frozenset("ab"): 0.5}
    assert one_shot_descent(stage(network(of, together))).order == ("a", "b", "c")
    assert greedy_descent(stage(network(of, together)), 0.0).order == ("a", "c", "b")


def test_beta_by_hand() -> None:
    """max acc / min acc = (max log params / min log params)^β."""
    of = network({"a": 0.1, "b": 0.2})
    sizes = {"a": 10, "b": 1000}
    beta = tuned_beta(stage(of, sizes))
    assert pytest.approx((math.log(1000) / math.log(10)) ** beta) == 0.9 / 0.8
    assert greedy_descent(stage(of, sizes), 0.0).order == ("a", "b")
    assert greedy_descent(stage(of, sizes), 2 * beta).order == ("b", "a"), "the larger layer is worth its loss"
    assert tuned_beta(stage(of, {"a": 7, "b": 7})) == 0.0
    assert tuned_beta(stage(network({"a": 2.0, "b": 0.1}), sizes)) == 0.0


@pytest.mark.parametrize(
    "strategy", [OneShotStrategy(), GreedyStrategy(), GreedyStrategy(None), GreedyStrategy(0.0, True)]
)
def test_cheapest_plan_within_the_budget(strategy: GreedyStrategy | OneShotStrategy) -> None:
    """As many layers as the budget bears; none but the exact plan for a budget of 0; the least loss for one below."""
    table = {"a": 0.03, "b": 0.01, "c": 0.02}
    for budget, low in ((1.0, "abc"), (0.035, "bc"), (0.01, "b"), (0.0, "")):
        result = strategy.search(network(table).problem(budget))
        assert precisions(result) == {layer: LOW if layer in low else BASE for layer in table}
        assert result.within_budget
    missed = strategy.search(network(table).problem(-1.0))
    assert (missed.within_budget, missed.loss) == (False, 0.0)


@pytest.mark.parametrize("strategy", [OneShotStrategy(), GreedyStrategy(), GreedyStrategy(0.0, True)])
def test_ladders_of_three_and_layers_without_a_choice(strategy: GreedyStrategy | OneShotStrategy) -> None:
    """From float32 to 8 bits, then on to 4 bits from the plan that kept the budget; a fixed layer stays."""
    losses = {
        "a": {"a8w4": 0.02, "a8w8": 0.0, "float32": 0.0},
        "b": {"a8w4": 0.5, "a8w8": 0.0, "float32": 0.0},
        "c": {"a8w4": 0.9, "a8w8": 0.9, "float32": 0.0},
        "fixed": {"float32": 0.0},
    }
    costs = {layer: {p: {"a8w4": 1.0, "a8w8": 2.0, "float32": 8.0}[p] for p in own} for layer, own in losses.items()}
    result = strategy.search(SyntheticNetwork(losses, costs).problem(0.1))
    assert precisions(result) == {"a": "a8w4", "b": "a8w8", "c": "float32", "fixed": "float32"}
    assert result.within_budget


def test_no_layers() -> None:
    """A network without weights."""
    result = GreedyStrategy().search(SyntheticNetwork({}, {}).problem(0.0))
    assert (result.decisions, result.within_budget) == ({}, True)
    assert greedy_descent(stage(SyntheticNetwork({}, {})), None) == Descent((), (), 0.0)
