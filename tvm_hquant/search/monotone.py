"""Precision that only grows from input to output, in conversions that lose nothing.

Source: Algorithm 2 of D. Cheng, W. Chen, "Quantization in Layer's Input is Matter" (arXiv 2202.05137): where no conversion
between layers rounds, all their errors ε_i are 0 (Problem 3). The paper prescribes how many layers get each level. Without
levels the cheapest plan is wanted that keeps a budget, which is not in the paper. Plans are then ranked by the sum of the
layers' largest errors (:func:`~tvm_hquant.search.surrogate.largest_error`), since this algorithm knows nothing else of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tvm_hquant.errors import SearchError
from tvm_hquant.precision import Precision, parse_precision
from tvm_hquant.search.problem import CostModel, SearchProblem, SearchResult
from tvm_hquant.search.surrogate import check_levels, first_within_budget, largest_error, one_plan

_PRICES = np.geomspace(1e-4, 1e4, 65)
"""Of the largest error, over the mean cost for it: for each the plan of least cost and price together is tried."""


@dataclass(frozen=True)
class MonotoneStrategy:
    """Algorithm 2."""

    @property
    def name(self) -> str:
        return "monotone"

    def search(self, problem: SearchProblem) -> SearchResult:
        """Levels by falling error in execution order, or the cheapest such plan for the budget.

        A layer that may not have its turn's precision gets the next one up, and so does what follows. Where layers that may
        have one precision only leave no plan for a budget, they stand apart: precision grows over the others.

        Raises:
            SearchError: the prescribed levels cannot stand in this order, or a conversion between them loses something.
        """
        if problem.levels is not None:
            slots = check_levels(problem)[::-1]
            for low, high in pairwise(slots):
                if not is_lossless(parse_precision(low), parse_precision(high)):
                    raise SearchError(
                        f"from {low} to {high} something is lost: monotone wants levels of one lossless chain"
                    )
            plan = dict(zip(problem.candidates, slots, strict=True))
            wrong = [layer for layer, p in plan.items() if p not in problem.candidates[layer]]
            if wrong:
                raise SearchError(f"monotone would give layer {wrong[0]} {plan[wrong[0]]}, which it may not have")
            return one_plan(problem, plan, lambda _layer: "its place in execution order")
        plans = monotone_plans(problem.candidates, problem.costs)
        if not plans:
            without_choice = {layer: own[0] for layer, own in problem.candidates.items() if len(own) == 1}
            plans = monotone_plans(problem.candidates, problem.costs, without_choice)
        if not plans:
            raise SearchError("no plan is monotone: the layers' candidates do not share a lossless chain")
        return first_within_budget(problem, plans, lambda _layer: "its place in execution order")


def is_lossless(low: Precision, high: Precision) -> bool:
    """Whether what is stored for a layer in ``low`` is read in ``high`` without loss (but for float32's own rounding)."""
    if high.name == "float32" or low.name == high.name:
        return True
    reads = (
        (low.arithmetic, low.activation_bits, low.symmetric),
        (high.arithmetic, high.activation_bits, high.symmetric),
    )
    return low.is_integer and reads[0] == reads[1] and low.weight_bits <= high.weight_bits


def monotone_plans(
    candidates: Mapping[str, Sequence[str]], costs: CostModel, apart: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """Plans whose precision only grows, the cheapest first, each with a smaller sum of largest errors than all before.

    ``apart`` are layers whose precision has no part in that.

    Of every chain of lossless conversions all plans with at most one step, and plans with any number of steps: for many prices
    of the error that of least cost and price together, conversions left aside.
    """
    layers, fixed = tuple(candidates), apart or {}
    candidates = {layer: own for layer, own in candidates.items() if layer not in fixed}
    names = list(dict.fromkeys(p for own in candidates.values() for p in own))
    errors = {name: largest_error(parse_precision(name)) for name in names}
    found: dict[tuple[tuple[str, str], ...], None] = {}
    for chain in lossless_chains(names):
        for low, high in ((low, high) for n, low in enumerate(chain) for high in chain[n:]):
            for boundary in range(len(candidates) + 1 if low != high else 1):
                plan = _one_step(candidates, low, high, boundary)
                if plan is not None:
                    found[tuple(plan.items())] = None
        for price in _prices(candidates, costs, chain, errors):
            plan = _cheapest(candidates, costs, chain, errors, price)
            if plan is not None:
                found[tuple(plan.items())] = None
    ranked: list[tuple[float, float, dict[str, str]]] = []
    for own in found:
        chosen = {**dict(own), **fixed}
        whole = {layer: chosen[layer] for layer in layers}
        ranked.append((costs.total(whole), sum(errors[p] for _, p in own), whole))
    kept: list[dict[str, str]] = []
    least = math.inf
    for _, error, whole in sorted(ranked, key=lambda entry: entry[:2]):
        if error < least:
            kept.append(whole)
            least = error
    return kept


def lossless_chains(names: Iterable[str]) -> list[list[str]]:
    """The longest lists of precisions in which every conversion from one to a later one loses nothing, errors falling."""
    chains: dict[object, list[str]] = {}
    exact: list[str] = []
    for name in sorted(dict.fromkeys(names), key=lambda name: -largest_error(parse_precision(name))):
        precision = parse_precision(name)
        if name == "float32":
            exact.append(name)
            continue
        reads = (precision.activation_bits, precision.symmetric) if precision.is_integer else name
        chain = chains.setdefault(reads, [])
        if not chain or is_lossless(parse_precision(chain[-1]), precision):
            chain.append(name)
    return [[*chain, *exact] for chain in chains.values()] or [exact]


def _one_step(candidates: Mapping[str, Sequence[str]], low: str, high: str, boundary: int) -> dict[str, str] | None:
    plan: dict[str, str] = {}
    current = low
    for number, (layer, own) in enumerate(candidates.items()):
        if number >= boundary or low not in own:
            current = high
        if current not in own:
            return None
        plan[layer] = current
    return plan


def _prices(
    candidates: Mapping[str, Sequence[str]], costs: CostModel, chain: Sequence[str], errors: Mapping[str, float]
) -> list[float]:
    """Prices of the error around what it costs on average to have all layers in the last of a chain, not in the first."""
    if len(chain) < 3:
        return []
    added = [
        costs.layers[layer, chain[-1]] - costs.layers[layer, chain[0]]
        for layer, own in candidates.items()
        if chain[0] in own and chain[-1] in own
    ]
    mean = sum(added) / (len(added) or 1) / (errors[chain[0]] - errors[chain[-1]])
    return (_PRICES * mean).tolist() if mean > 0 else []


def _cheapest(
    candidates: Mapping[str, Sequence[str]],
    costs: CostModel,
    chain: Sequence[str],
    errors: Mapping[str, float],
    price: float,
) -> dict[str, str] | None:
    """The plan along a chain whose sum of costs and of errors times the price is least, by dynamic programming over layers."""
    best = np.zeros(len(chain))
    choices: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = []
    for layer, own in candidates.items():
        value = [costs.layers[layer, p] + price * errors[p] if p in own else math.inf for p in chain]
        # The least of what may stand before each precision: itself or one that is not above it.
        before = np.array([int(np.argmin(best[: n + 1])) for n in range(len(chain))])
        choices.append(before)
        best = best[before] + np.array(value)
    level = int(np.argmin(best))
    if math.isinf(best[level]):
        return None
    plan: dict[str, str] = {}
    for layer, before in zip(reversed(list(candidates)), reversed(choices), strict=True):
        plan[layer] = chain[level]
        level = int(before[level])
    return {layer: plan[layer] for layer in candidates}
