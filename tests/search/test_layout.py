"""Layouts from gradients do what the paper's algorithms say: by hand, by brute force, and on a small network."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planned_models import random_samples, shared_session
from tests.search.synthetic import SyntheticNetwork, precisions
from tvm_hquant.calibration.data import open_data
from tvm_hquant.cost.predicted import weight_bytes
from tvm_hquant.errors import SearchError
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantizer import DataRoles, Options, Quantizer
from tvm_hquant.search.layout import (
    AfterStorageStrategy,
    GradientStrategy,
    HessianStrategy,
    LayoutData,
    combined,
    squared_perturbation,
)
from tvm_hquant.search.problem import SearchProblem
from tvm_hquant.search.registry import StrategyContext, StrategySettings, make_strategy
from tvm_hquant.search.surrogate import largest_error, search_by_prediction, with_levels
from tvm_hquant.simulator.metrics import METRICS

NAMES = ("a8w8", "bfloat16", "float32")
COSTS = {"a8w4": 0.5, "a8w8": 1.0, "bfloat16": 2.0, "float32": 4.0, "w8": 4.0}


def network(names: dict[str, tuple[str, ...]], sensitivities: dict[str, float]) -> SyntheticNetwork:
    """Layers whose losses are a factor of the layer times the error of the precision."""
    losses = {n: {p: sensitivities[n] * largest_error(parse_precision(p)) for p in own} for n, own in names.items()}
    return SyntheticNetwork(losses, {n: {p: COSTS[p] for p in own} for n, own in names.items()})


def predicted(of: SyntheticNetwork) -> dict[tuple[str, str], float]:
    return {(layer, p): loss for layer, own in of.losses.items() for p, loss in own.items()}


def test_errors_order_the_precisions() -> None:
    """Levels are sorted by the largest error that they bring in."""
    order = ["float32", "a16w16", "float16", "bfloat16", "w8", "a16w8", "a8w8", "int8", "a8w7", "a8w4", "a8w2"]
    errors = [largest_error(parse_precision(name)) for name in order]
    assert errors == sorted(errors)


def test_levels_go_by_rank() -> None:
    """Algorithm 1 by hand: the most sensitive layer gets the level with the smallest error."""
    of = network(dict.fromkeys("abcd", NAMES), {"a": 2.0, "b": 9.0, "c": 0.5, "d": 1.0})
    problem = of.problem(1.0, levels={"a8w8": 2, "bfloat16": 1, "float32": 1})
    found = search_by_prediction(problem, predicted(of), lambda _layer: "")
    assert precisions(found) == {"a": "bfloat16", "b": "float32", "c": "a8w8", "d": "a8w8"}
    assert len(of.evaluated) == 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    st.data(),
)
def test_levels_under_restrictions_are_optimal(sensitivities: list[float], data: st.DataObject) -> None:
    """Layers that may not have every level: the least sum, by trying all orders."""
    names = [f"layer{i}" for i in range(len(sensitivities))]
    own = {n: tuple(p for p in NAMES if p == "float32" or data.draw(st.booleans())) for n in names}
    levels = [data.draw(st.sampled_from(NAMES)) for _ in names]
    of = network(own, dict(zip(names, sensitivities, strict=True)))
    problem = of.problem(1.0, levels={p: levels.count(p) for p in set(levels)})
    table = predicted(of)
    sums = [
        sum(table[pair] for pair in zip(names, order, strict=True))
        for order in permutations(levels)
        if all(p in own[n] for n, p in zip(names, order, strict=True))
    ]
    if not sums:
        with pytest.raises(SearchError, match="no plan has the levels"):
            with_levels(problem, table)
        return
    plan = with_levels(problem, table)
    assert sorted(plan.values()) == sorted(levels)
    np.testing.assert_allclose(sum(table[pair] for pair in plan.items()), min(sums), rtol=1e-12)


def test_levels_have_to_be_as_many_as_layers() -> None:
    of = network({"a": NAMES, "b": NAMES}, {"a": 1.0, "b": 1.0})
    with pytest.raises(SearchError, match="for 3 layers, the network has 2"):
        with_levels(of.problem(1.0, levels={"float32": 3}), predicted(of))


def test_budget_ties_single_layers_and_budgets_that_cannot_be_met() -> None:
    """Without levels: the cheapest plan for the budget where predictions are right, deterministic under ties."""
    of = network(dict.fromkeys("abc", NAMES), dict.fromkeys("abc", 1.0))
    budget = 2.8 * largest_error(parse_precision("a8w8"))
    first = search_by_prediction(of.problem(budget), predicted(of), lambda _layer: "")
    assert first.within_budget
    assert first == search_by_prediction(of.problem(budget), predicted(of), lambda _layer: "")
    assert sorted(precisions(first).values()) == ["a8w8", "a8w8", "bfloat16"]
    alone = network({"a": NAMES}, {"a": 1.0})
    assert precisions(search_by_prediction(alone.problem(1.0), predicted(alone), lambda _layer: "")) == {"a": "a8w8"}
    nothing = search_by_prediction(of.problem(-1.0), predicted(of), lambda _layer: "")
    assert not nothing.within_budget
    assert set(precisions(nothing).values()) == {"float32"}


def test_weights_and_inputs_with_levels_of_their_own() -> None:
    """Algorithm 3's second branch meets precisions that exist, else the more exact of the two."""
    candidates = ("a8w8", "a8w4", "bfloat16", "float32", "w4", "w8")
    assert combined("a8w8", "a8w4", candidates) == "a8w4"
    assert combined("float32", "a8w4", candidates) == "w4"
    assert combined("a8w8", "bfloat16", candidates) == "bfloat16"
    with pytest.raises(SearchError):
        combined("a8w8", "a8w4", ("float16",))


def _small_problem(levels: dict[str, int] | None) -> SearchProblem:
    session = shared_session("residual")
    names = [layer.name for layer in session.graph.anchors]
    of = network(dict.fromkeys(names, ("a8w4", "a8w8", "bfloat16", "float32")), dict.fromkeys(names, 1.0))
    return of.problem(1.0, levels=levels)


def test_strategies_on_a_network() -> None:
    """Each ranks layers by what the paper says, and gives the same plan again; labels are not needed."""
    session = shared_session("residual")
    data = LayoutData(session, open_data(random_samples(session, 3, seed=5), session.signature))
    problem = _small_problem({"a8w8": 1, "bfloat16": 1, "float32": 1})

    gradient = GradientStrategy(data)
    norms = gradient.norms()
    by_norm = sorted(norms, key=lambda name: norms[name])
    assert precisions(gradient.search(problem)) == dict(zip(by_norm, ("a8w8", "bfloat16", "float32"), strict=True))

    storage = AfterStorageStrategy(data, stored_bits=4)
    of_inputs, of_weights = storage.norms()
    by_sum = sorted(of_inputs, key=lambda name: of_inputs[name] + of_weights[name])
    found = storage.search(problem)
    assert precisions(found) == dict(zip(by_sum, ("a8w8", "bfloat16", "float32"), strict=True))
    assert {d.stored_bits for d in found.decisions.values()} == {4}
    assert min(of_weights.values()) > 0
    apart = AfterStorageStrategy(data, stored_bits=4, shared=False)
    assert apart.search(problem) == apart.search(problem)
    assert apart.search(_small_problem(None)).within_budget

    hessian = HessianStrategy(data, draws=2, seed=3)
    assert hessian.search(problem) == HessianStrategy(data, draws=2, seed=3).search(problem)
    layer = session.graph.anchors[0]
    assert squared_perturbation(layer, parse_precision("float32")) == 0.0
    errors = [squared_perturbation(layer, parse_precision(p)) for p in ("float16", "bfloat16", "a8w8", "a8w4")]
    assert errors == sorted(errors)
    ranked = make_strategy(
        "hierarchical", StrategyContext(session, data.samples, settings=StrategySettings("gradient"))
    )
    by_gradient = ranked.search(_small_problem(None))
    assert by_gradient.within_budget
    assert all("its gradient predicts" in decision.detail for decision in by_gradient.decisions.values())
    for name in ("gradient", "monotone", "after-storage", "hawq-v2"):
        assert make_strategy(name, StrategyContext(session, data.samples)).name == name


def test_joint_losses_are_those_of_the_weights_as_stored() -> None:
    """What a search after storage evaluates is the program of the plan that it gives, rounding for storage included, where the
    user fixed a layer's precision too."""
    session = shared_session("residual")
    samples = open_data(random_samples(session, 6, seed=5), session.signature)
    fixed = {"head": "bfloat16"}
    options = Options("kl", 10.0, ("bfloat16", "float32"), fixed, baselines=False, objective="macs")
    quantizer = Quantizer(session, DataRoles(samples, samples, samples, 0), options)
    found = quantizer.search(AfterStorageStrategy(LayoutData(session, samples), stored_bits=3))
    plan = quantizer.plan(found.decisions)
    evaluated = quantizer.archive.find({n: d.precision for n, d in found.decisions.items()}, 3)
    assert evaluated is not None
    stored = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    [score] = session.evaluate([stored], samples, METRICS["kl"], "measuring")
    assert evaluated.expected == score.loss > 0
    as_computed = session.program({name: parse_precision(d.precision) for name, d in found.decisions.items()})
    assert (
        as_computed.digest
        != stored.digest
        == session.program({name: parse_precision(d.precision) for name, d in found.decisions.items()}, 3).digest
    )


def test_size_is_that_of_the_weights_as_stored() -> None:
    """A float layer whose weights are stored in 3 bits does not take the bytes of floats in the file, so not in the search."""
    session = shared_session("residual")
    samples = open_data(random_samples(session, 6, seed=5), session.signature)
    options = Options("kl", 10.0, ("a8w8", "float32"), baselines=False, objective="size")
    quantizer = Quantizer(session, DataRoles(samples, samples, samples, 0), options)
    found = quantizer.search(AfterStorageStrategy(LayoutData(session, samples), stored_bits=3))
    plan = quantizer.plan(found.decisions)
    stored = sum(weight_bytes(layer, plan.layers[layer.name].weight_precision) for layer in session.graph.anchors)
    evaluated = quantizer.archive.find({n: d.precision for n, d in found.decisions.items()}, 3)
    assert evaluated is not None
    assert evaluated.cost == stored
    assert stored < sum(weight_bytes(layer, parse_precision("a8w8")) for layer in session.graph.anchors)
