"""Algorithm 2 does what the paper says, and finds steps where they pay: by hand and by brute force."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from tests.search.synthetic import precisions
from tests.search.test_layout import COSTS, network
from tvm_hquant.errors import SearchError
from tvm_hquant.precision import parse_precision
from tvm_hquant.search.monotone import MonotoneStrategy, is_lossless, lossless_chains, monotone_plans
from tvm_hquant.search.problem import CostModel
from tvm_hquant.search.surrogate import largest_error


def test_monotone_precision_only_grows() -> None:
    """Algorithm 2 by hand: levels in execution order, and the longest cheap beginning that keeps a budget."""
    of = network(dict.fromkeys("abcd", ("a8w4", "a8w8", "float32")), {"a": 1.0, "b": 1.0, "c": 5.0, "d": 50.0})
    found = MonotoneStrategy().search(of.problem(1.0, levels={"float32": 1, "a8w4": 2, "a8w8": 1}))
    assert list(precisions(found).values()) == ["a8w4", "a8w4", "a8w8", "float32"]
    budget = of.loss({"a": "a8w8", "b": "a8w8", "c": "a8w8", "d": "float32"})
    found = MonotoneStrategy().search(of.problem(budget))
    assert list(precisions(found).values()) == ["a8w8", "a8w8", "a8w8", "float32"]
    assert found.within_budget
    forbidden = network(
        {"a": ("a8w8", "float32"), "b": ("float32",), "c": ("a8w8", "float32")}, dict.fromkeys("abc", 1.0)
    )
    found = MonotoneStrategy().search(forbidden.problem(1.0))
    assert list(precisions(found).values()) == ["a8w8", "float32", "float32"]
    with pytest.raises(SearchError, match="layer b a8w8, which it may not have"):
        MonotoneStrategy().search(forbidden.problem(1.0, levels={"a8w8": 2, "float32": 1}))


def test_lossless_conversions() -> None:
    """What a conversion loses decides where monotone may step up."""
    steps = [("a8w8", "float32"), ("bfloat16", "float32"), ("a8w4", "a8w8"), ("float16", "float16")]
    lossy = [
        ("float32", "bfloat16"),
        ("bfloat16", "float16"),
        ("a8w8", "int8"),
        ("a8w8", "bfloat16"),
        ("a8w8", "a16w8"),
    ]
    assert all(is_lossless(parse_precision(a), parse_precision(b)) for a, b in steps)
    assert not any(is_lossless(parse_precision(a), parse_precision(b)) for a, b in lossy)


def test_chains() -> None:
    """Everything that reads the same codes, with more and more weight bits; float32 takes all."""
    names = ("a8w8", "float32", "a8w4", "int8", "bfloat16", "a16w8", "a8w6", "a16w16")
    chains = [["a8w4", "a8w6", "a8w8", "float32"], ["int8", "float32"], ["a16w8", "a16w16", "float32"]]
    assert sorted(lossless_chains(names)) == sorted([*chains, ["bfloat16", "float32"]])
    assert lossless_chains(["a8w8", "a8w4"]) == [["a8w4", "a8w8"]]
    assert lossless_chains(["float32"]) == [["float32"]]


def test_several_steps_up() -> None:
    """Layers that are the more expensive the earlier they stand: the cheapest plan for a loss steps up twice."""
    layers = "abcdef"
    errors = {p: largest_error(parse_precision(p)) for p in ("a8w4", "a8w8", "float32")}
    table = {(layer, p): COSTS[p] * 4.0**-n for n, layer in enumerate(layers) for p in errors}
    plans = monotone_plans(dict.fromkeys(layers, tuple(errors)), CostModel(table))
    cost = [sum(table[pair] for pair in plan.items()) for plan in plans]
    error = [sum(errors[p] for p in plan.values()) for plan in plans]
    assert cost == sorted(cost)
    assert error == sorted(error, reverse=True)
    assert any(len(set(plan.values())) == 3 for plan in plans)
    for plan in plans:
        assert all(is_lossless(parse_precision(a), parse_precision(b)) for a, b in pairwise(plan.values()))
    # Of all plans that only grow none is on the lower hull and missing.
    every = [
        dict(zip(layers, chosen, strict=True))
        for chosen in product(errors, repeat=len(layers))
        if all(errors[a] >= errors[b] for a, b in pairwise(chosen))
    ]
    for price in (1e-3, 0.3, 1.0, 30.0, 1e3):
        totals = [sum(table[l, p] + price * errors[p] for l, p in plan.items()) for plan in every]
        assert min(c + price * e for c, e in zip(cost, error, strict=True)) <= min(totals) * 1.05


def test_a_budget_that_two_steps_keep_cheapest() -> None:
    """More than one step up keeps a budget for less than any plan with one."""
    layers = "abcdef"
    of = network(dict.fromkeys(layers, ("a8w4", "a8w8", "float32")), dict.fromkeys(layers, 1.0))
    of.model = CostModel({(l, p): cost * 4.0 ** -layers.index(l) for (l, p), cost in of.model.layers.items()})
    budget = of.loss(dict(zip(layers, ["a8w4", *["a8w8"] * 3, *["float32"] * 2], strict=True)))
    found = MonotoneStrategy().search(of.problem(budget))
    assert found.within_budget
    one_step = [
        dict(zip(layers, [low] * n + [high] * (len(layers) - n), strict=True))
        for low, high in (("a8w4", "a8w8"), ("a8w4", "float32"), ("a8w8", "float32"))
        for n in range(len(layers) + 1)
    ]
    cheapest = min(of.model.total(plan) for plan in one_step if of.loss(plan) <= budget)
    assert of.model.total(precisions(found)) < cheapest
