"""Gaps of a front are found, and the plans chosen to fill them are those that leave it furthest behind."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_hquant.search.front_filling import Promise, SingleChanges, bounds_in_gaps, coarse_to_fine, most_promising
from tvm_hquant.search.problem import CostModel


def test_bounds_lie_in_the_gaps() -> None:
    """Between 1 and 0.5 and between 0.5 and 0.01, not between losses that differ by a twentieth."""
    bounds = bounds_in_gaps([1.0, 0.5, 0.475, 0.01], 0.1, 10)
    assert bounds == sorted(bounds, reverse=True)
    assert sum(0.5 < b < 1.0 for b in bounds) == 3
    assert sum(0.475 <= b <= 0.5 for b in bounds) == 0
    assert sum(0.01 < b < 0.475 for b in bounds) == 3
    assert bounds_in_gaps([1.0, 0.5, 0.475, 0.01], 0.1, 1) == pytest.approx([b for b in bounds if b < 0.475])


def test_bounds_of_fronts_without_a_gap() -> None:
    """No point, one point, equal points, and losses of 0 and infinity at the ends."""
    assert bounds_in_gaps([], 0.1, 10) == []
    assert bounds_in_gaps([1.0], 0.1, 10) == []
    assert bounds_in_gaps([0.0, 0.0], 0.1, 10) == []
    assert all(0 < b < 1 for b in bounds_in_gaps([1.0, 0.0], 0.1, 10))
    assert all(math.isfinite(b) for b in bounds_in_gaps([math.inf, 1.0], 0.1, 10))


@given(st.integers(1, 40), st.data())
def test_the_first_few_bounds_are_spread(count: int, data: st.DataObject) -> None:
    """Of n bounds the first k, in order, are no further apart than four times what k even steps would be."""
    bounds = coarse_to_fine([float(n) for n in range(count)])
    assert sorted(bounds) == [float(n) for n in range(count)]
    first = data.draw(st.integers(1, count))
    taken = sorted(bounds[:first])
    ends = [*taken, float(count)]
    assert taken[0] == 0.0
    assert max(b - a for a, b in pairwise(ends)) <= max(1.0, 4 * count / first)


def promise(name: str, cost: float, loss: float) -> Promise:
    return Promise(((name, "a8w8"),), cost, loss)


def test_the_plan_that_is_furthest_ahead_comes_first() -> None:
    """Half the loss of the point before it over a wide range of costs, rather than a tenth less; none that are behind."""
    front = [(1.0, 1.0), (4.0, 0.1)]
    plans = [
        promise("behind", 2.0, 1.2),
        promise("hardly", 1.5, 0.97),
        promise("half", 2.0, 0.5),
        promise("tenth", 1.5, 0.9),
        promise("beyond", 5.0, 0.05),
    ]
    chosen = most_promising(front, plans, 10, 0.1)
    assert [p.plan[0][0] for p in chosen] == ["half", "beyond", "tenth"]
    assert most_promising(front, plans, 1, 0.1) == [plans[2]]


def test_chosen_plans_count_for_the_next_ones() -> None:
    """A plan that is no better than a cheaper one that was just chosen is left out."""
    plans = [promise("a", 2.0, 0.5), promise("b", 2.1, 0.49), promise("c", 2.1, 0.6)]
    assert most_promising([(1.0, 1.0)], plans[:1] + plans[2:], 10, 0.1) == plans[:1]
    assert most_promising([(1.0, 1.0)], plans, 1, 0.1) == [plans[1]]


@given(st.data())
def test_changes_add_what_the_model_says(data: st.DataObject) -> None:
    """The cost of a changed plan is the model's, with conversions between neighbours."""
    precisions = ("a8w8", "float32")
    layers = [f"layer{n}" for n in range(4)]
    number = st.integers(0, 20)
    costs = CostModel(
        {(layer, p): float(data.draw(number)) for layer in layers for p in precisions},
        {
            pair: {(p, q): float(data.draw(number)) for p, q in product(precisions, repeat=2)}
            for pair in pairwise(layers)
        },
    )
    plan = {layer: data.draw(st.sampled_from(precisions)) for layer in layers}
    changes = SingleChanges(dict.fromkeys(layers, precisions), costs).of(plan)
    assert len(changes) == len(layers)
    for layer, other, added in changes:
        assert costs.predicted(plan) + added == pytest.approx(costs.predicted({**plan, layer: other}))
