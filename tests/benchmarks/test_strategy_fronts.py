"""Comparisons of fronts: protects what the tables of the documentation say about strategies and equal evaluations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.strategy_fronts import MeasuredPlan, StrategyFront, better_than, loss_ratio


def plan(cost: float, loss: float, number: int) -> MeasuredPlan:
    """A plan whose expected drop and divergence agree, measured on four held-out samples."""
    return MeasuredPlan({}, cost, loss, loss, [loss * f for f in (0.8, 1.2, 0.9, 1.1)], [0.0] * 4, number)


CHEAPEST = plan(0.4, 2.0, 1)
PLANS = [CHEAPEST, plan(0.8, 0.3, 2), plan(0.7, 0.2, 3), plan(0.5, 1.0, 4), plan(1.0, 0.05, 5)]


def test_a_front_is_what_was_known_by_then() -> None:
    """A plan counts from its own evaluation on, and no longer than until a better one is evaluated."""
    front = StrategyFront("network", "strategy", 2, 5, 1.0, True, 0, PLANS)
    assert [p.number for p in front.after(2)] == [1, 2]
    assert [p.number for p in front.after(3)] == [1, 3]
    assert [p.number for p in front.after(5)] == [1, 4, 3, 5]
    drop_only = replace(PLANS[1], expected=0.1)
    assert [p.number for p in replace(front, plans=[CHEAPEST, drop_only, PLANS[2]]).after(3)] == [1, 3, 2]


def test_losses_are_compared_over_all_costs() -> None:
    """Half the loss at every cost is the ratio 0.5; where a front has no plan, the cheapest one that all know stands in."""
    halved = [replace(p, smooth=p.smooth / 2, divergence=[v / 2 for v in p.divergence]) for p in PLANS[2:]]
    assert loss_ratio(PLANS, PLANS, CHEAPEST).estimate == pytest.approx(1.0)
    ratio = loss_ratio(halved, PLANS, CHEAPEST)
    assert 0.5 < ratio.estimate < 0.6, "the cheapest plan itself is nobody's to halve"
    assert ratio.low <= ratio.estimate <= ratio.high < 0.6
    nothing = loss_ratio([], PLANS, CHEAPEST)
    assert nothing.estimate > 2.0


def test_a_point_is_better_only_beyond_the_noise() -> None:
    """Equal points are not better; a tenth of the loss on every sample is."""
    assert not any(better_than(PLANS, PLANS, "divergence").surely)
    better = [replace(p, divergence=[v / 10 for v in p.divergence]) for p in PLANS]
    assert all(better_than(PLANS, better, "divergence").surely)
    assert better_than(PLANS[1:], [CHEAPEST], "divergence").among_all == [True], "ours has no plan as cheap"
