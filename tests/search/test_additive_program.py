"""Plans for costs that add up are optimal: against brute force, and against a solver for integer programs."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant.search import additive_program
from tvm_hquant.search.additive_program import AdditiveProgram, TooManyStatesError
from tvm_hquant.search.integer_program import IntegerProgram, _Model
from tvm_hquant.search.problem import CostModel

NAMES = ("a8w3", "a8w4", "a8w6", "a8w8", "float32")
BITS = dict(zip(NAMES, (3, 4, 6, 8, 32), strict=True))


@st.composite
def layers(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    """One to five layers of one to four precisions: whole numbers, so that there are ties, zeros and infinite losses."""
    costs = st.integers(0, 12)
    losses = st.one_of(st.integers(0, 12), st.just(math.inf))
    made = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 4))
        made.append(tuple(np.array([float(draw(of)) for _ in range(count)]) for of in (costs, losses)))
    return made  # type: ignore[return-value]


@given(layers(), st.integers(-1, 40))
@settings(max_examples=200, deadline=None)
def test_optimal_as_by_brute_force(choices: list[tuple[np.ndarray, np.ndarray]], bound: int) -> None:
    """The least cost of all plans that keep the bound, or none where none does."""
    found = AdditiveProgram(choices).solve(float(bound))
    totals = [
        sum(costs[n] for (costs, _), n in zip(choices, plan, strict=True))
        for plan in product(*(range(len(costs)) for costs, _ in choices))
        if sum(losses[n] for (_, losses), n in zip(choices, plan, strict=True)) <= bound
    ]
    if not totals:
        assert found is None
        return
    assert found is not None
    assert sum(losses[n] for (_, losses), n in zip(choices, found, strict=True)) <= bound
    assert sum(costs[n] for (costs, _), n in zip(choices, found, strict=True)) == min(totals)


def network(count: int, seed: int) -> IntegerProgram:
    """Layers of very different sizes, whose losses fall with the bits."""
    random = np.random.default_rng(seed)
    names = [f"layer{n}" for n in range(count)]
    size, sensitivity = random.lognormal(8, 1.2, count), random.lognormal(0, 1.5, count)
    costs = {(l, p): size[n] * BITS[p] / 8 + 100 for n, l in enumerate(names) for p in NAMES}
    losses = {
        (l, p): 0.0 if p == "float32" else sensitivity[n] * 4.0 ** -BITS[p] * random.lognormal(0, 0.2)
        for n, l in enumerate(names)
        for p in NAMES
    }
    return IntegerProgram(dict.fromkeys(names, NAMES), CostModel(costs), losses)


@pytest.mark.parametrize("count", [10, 54])
def test_same_costs_as_a_solver(count: int) -> None:
    """Over the whole range of bounds; plans may differ where costs are equal to a millionth."""
    program = network(count, count)
    largest = sum(program.losses[layer, NAMES[0]] for layer in program.candidates)
    bounds = [*np.geomspace(0.99 * largest, 1e-5 * largest, 12).tolist(), 0.0, math.inf]
    plans = program.solve_all(bounds)
    assert plans == [program.solve(bound) for bound in bounds]
    for bound, plan in zip(bounds, plans, strict=True):
        theirs = _Model(program, bound).solve()
        assert plan is not None
        assert theirs is not None
        assert sum(program.losses[pair] for pair in plan.items()) <= bound
        assert program.costs.total(plan) <= program.costs.total(theirs) * (1 + 1e-6)


def test_too_large_programs_are_left_to_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of states, there is an answer."""
    program = network(12, 1)
    assert program._additive is not None
    largest = sum(program.losses[layer, NAMES[0]] for layer in program.candidates)
    bounds = np.geomspace(0.99 * largest, 1e-5 * largest, 12).tolist()
    expected = [program.costs.total(program.solve(bound) or {}) for bound in bounds]
    monkeypatch.setattr(additive_program, "_MOST_STATES", 0)
    too_many = 0
    for bound in bounds:
        try:
            program._additive.solve(bound)
        except TooManyStatesError:
            too_many += 1
    assert too_many
    found = [program.costs.total(program.solve(bound) or {}) for bound in bounds]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
