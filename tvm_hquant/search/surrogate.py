"""Searches that rank plans by a predicted loss that adds up over layers, and evaluate only few of them jointly.

With prescribed levels the plan with the least predicted loss is an assignment problem (by the rearrangement inequality it is
the sorted order where a layer's part is a factor of the layer times one of the precision); without them it is a knapsack:
the integer program of :mod:`tvm_hquant.search.integer_program` for falling bounds on the predicted loss, the loosest whose
plan keeps the budget found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from tvm_hquant.errors import SearchError
from tvm_hquant.precision import Arithmetic, Precision, parse_precision
from tvm_hquant.search.integer_program import IntegerProgram
from tvm_hquant.search.problem import Assignment, LayerPrecision, SearchProblem, SearchResult, SearchStep
from tvm_hquant.search.reasons import explained

_BOUND_PARTS = sorted(
    {*np.linspace(1.0, 0.0, 17)[1:-1].tolist(), *np.geomspace(1.0, 1e-5, 17)[1:].tolist()}, reverse=True
)
"""Bounds on the predicted loss that are tried, as parts of what there is to lose; few of their plans are evaluated."""
_HALF_LAST_PLACE = {"float16": 2.0**-12, "bfloat16": 2.0**-9, "float32": 2.0**-25}


def largest_error(precision: Precision) -> float:
    """The largest rounding error of a precision, of activations plus of weights, over the largest value of each."""
    return activation_error(precision) + weight_error(precision)


def activation_error(precision: Precision) -> float:
    """Half a step: of the range for codes (of twice the largest value for symmetric ones), else of a float's last place."""
    bits = precision.activation_bits
    if not precision.is_integer:
        name = precision.computed.name
        return _HALF_LAST_PLACE[name if name in _HALF_LAST_PLACE else "float32"]
    return float(0.5 / (2 ** (bits - 1) - 1) if precision.symmetric else 0.5 / (2**bits - 1))


def weight_error(precision: Precision) -> float:
    """Half a step of symmetric codes over the largest of them, or half a unit in a float's last place."""
    if precision.arithmetic is Arithmetic.FLOAT:
        return _HALF_LAST_PLACE[precision.name]
    return float(0.5 / (2 ** (precision.weight_bits - 1) - 1))


def with_levels(problem: SearchProblem, predicted: Mapping[LayerPrecision, float]) -> dict[str, str]:
    """The plan with the prescribed number of layers in each precision and the least sum of predicted losses.

    Layers beyond the prescribed counts are impossible: the counts have to add up to the number of layers.

    Raises:
        SearchError: no plan has the levels.
    """
    slots = check_levels(problem)
    layers = list(problem.candidates)
    matrix = np.full((len(layers), len(slots)), np.inf)
    for row, layer in enumerate(layers):
        for column, precision in enumerate(slots):
            if precision in problem.candidates[layer]:
                matrix[row, column] = predicted[layer, precision]
    try:
        rows, columns = linear_sum_assignment(matrix)
    except ValueError:
        raise SearchError(
            f"no plan has the levels {spelled_levels(problem.levels or {})}: not every layer may have one; 'hquant inspect' "
            "shows what each may have"
        ) from None
    plan = {layers[row]: slots[column] for row, column in zip(rows, columns, strict=True)}
    return {layer: plan[layer] for layer in layers}


def check_levels(problem: SearchProblem) -> list[str]:
    """The prescribed precisions, each as often as it is prescribed, those of the largest error last.

    Raises:
        SearchError: they are not as many as there are layers.
    """
    levels = problem.levels or {}
    if sum(levels.values()) != len(problem.candidates):
        raise SearchError(
            f"the levels {spelled_levels(levels)} are for {sum(levels.values())} layers, the network has "
            f"{len(problem.candidates)} with weights: their counts have to add up to that"
        )
    ordered = sorted(levels, key=lambda name: largest_error(parse_precision(name)))
    return [name for name in ordered for _ in range(levels[name])]


def spelled_levels(levels: Mapping[str, int]) -> str:
    """As on the command line."""
    return ",".join(f"{name}:{count}" for name, count in levels.items()) or "none"


def search_by_prediction(
    problem: SearchProblem, predicted: Mapping[LayerPrecision, float], describe: Callable[[str], str]
) -> SearchResult:
    """The cheapest plan by predicted losses that keeps the budget; the one with the smallest loss where none does.

    Args:
        problem: what is searched.
        predicted: for every layer and candidate a loss, not negative, in any unit.
        describe: says why of a layer, for its decision.

    Raises:
        SearchError: no plan has the prescribed levels.
    """
    if problem.levels is not None:
        return one_plan(problem, with_levels(problem, predicted), describe)
    plans: dict[tuple[tuple[str, str], ...], None] = {}
    program = IntegerProgram(problem.candidates, problem.costs, predicted)
    exact = {layer: min(reversed(c), key=lambda p: predicted[layer, p]) for layer, c in problem.candidates.items()}
    smallest = sum(predicted[pair] for pair in exact.items())
    cheapest = program.solve(math.inf)
    assert cheapest is not None
    largest = sum(predicted[pair] for pair in cheapest.items())
    plans[tuple(cheapest.items())] = None
    if largest > smallest:
        span = largest - smallest
        for found in program.solve_all([smallest + span * part for part in _BOUND_PARTS]):
            if found is not None:
                plans[tuple(found.items())] = None
    plans[tuple(exact.items())] = None
    return first_within_budget(problem, [dict(plan) for plan in plans], describe)


def first_within_budget(
    problem: SearchProblem, plans: Sequence[Assignment], describe: Callable[[str], str]
) -> SearchResult:
    """Of plans in the order of falling predicted loss the first that keeps the budget, by bisection."""
    losses: dict[int, float] = {}

    def loss(number: int) -> float:
        if number not in losses:
            losses[number] = problem.evaluate([plans[number]])[0]
        return losses[number]

    last = len(plans) - 1
    if loss(0) > problem.budget and loss(last) <= problem.budget:
        failing, holding = 0, last
        while holding - failing > 1:
            middle = (failing + holding) // 2
            if loss(middle) <= problem.budget:
                holding = middle
            else:
                failing = middle
    best = min(losses, key=lambda n: (losses[n] > problem.budget, n if losses[n] <= problem.budget else losses[n], n))
    return _result(problem, plans[best], losses[best], [(plans[n], value) for n, value in losses.items()], describe)


def one_plan(problem: SearchProblem, plan: Assignment, describe: Callable[[str], str]) -> SearchResult:
    """The result for one plan, evaluated once."""
    loss = problem.evaluate([plan])[0]
    return _result(problem, plan, loss, [(plan, loss)], describe)


def _result(
    problem: SearchProblem,
    plan: Assignment,
    loss: float,
    visited: Sequence[tuple[Assignment, float]],
    describe: Callable[[str], str],
) -> SearchResult:
    first = {layer: candidates[0] for layer, candidates in problem.candidates.items()}
    decisions = explained(problem, plan, notes={layer: describe(layer) for layer in plan})
    steps = tuple(
        SearchStep(sum(p != first[layer] for layer, p in one.items()), value, problem.costs.total(one))
        for one, value in visited
    )
    return SearchResult(decisions, loss, loss <= problem.budget, steps)
