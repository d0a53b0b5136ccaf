"""Why each layer of a plan has its precision: what changing that layer alone would do to the cost of the plan.

* ``within budget``: the layer costs no more than in any other precision that it may have, or one that would save something
  loses no more; no budget has kept it from becoming cheaper.
* ``sensitive``: a precision that loses more would make the plan cheaper. The search has kept to this one for the budget.
* ``cast cost``: by itself the layer would be cheaper in another precision, but in this plan conversions would cost more.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm_hquant.plan import LayerDecision
from tvm_hquant.search.front_filling import SingleChanges
from tvm_hquant.search.problem import Assignment, LayerPrecision, SearchProblem

_SAME = 1e-9
"""Costs that differ by less than this part of the plan's are equal."""


def explained(
    problem: SearchProblem,
    plan: Assignment,
    losses: Mapping[LayerPrecision, float] | None = None,
    source: str = "alone it loses",
    notes: Mapping[str, str] | None = None,
) -> dict[str, LayerDecision]:
    """Decisions for all layers of a plan, with reasons.

    Args:
        losses: of the layers alone, where they are known.
        source: what says so, before the number in the detail.
        notes: more about layers, to be read before that.
    """
    known, costs = losses or {}, problem.costs
    total = costs.predicted(plan)
    saving: dict[str, dict[str, float]] = {layer: {} for layer in plan}
    for layer, other, added in SingleChanges(problem.candidates, costs).of(plan):
        if -added > _SAME * abs(total):
            saving[layer][other] = -added / total if total > 0 else 0.0
    return {
        layer: _decision(problem, known, layer, precision, saving[layer], source, (notes or {}).get(layer, ""))
        for layer, precision in plan.items()
    }


def _decision(
    problem: SearchProblem,
    losses: Mapping[LayerPrecision, float],
    layer: str,
    precision: str,
    saving: Mapping[str, float],
    source: str,
    note: str,
) -> LayerDecision:
    own = losses.get((layer, precision))
    detail = [note] if note else []
    worse = {p: part for p, part in saving.items() if own is None or losses.get((layer, p), own) > own}
    if worse:
        other = max(worse, key=lambda p: worse[p])
        if own is not None:
            detail.append(f"{source} {losses[layer, other]:.3g} in {other}, {own:.3g} in {precision}")
        detail.append(f"{other} would save {worse[other]:.2%} of the cost")
        return LayerDecision(precision, "sensitive", "; ".join(detail))
    if own is not None:
        detail.append(f"{source} {own:.3g} in {precision}")
    costs = problem.costs.layers
    cheapest = min(problem.candidates[layer], key=lambda p: costs[layer, p])
    if not saving and costs[layer, cheapest] < costs[layer, precision] * (1 - _SAME):
        detail.append(f"{cheapest} would be cheaper, but for conversions")
        return LayerDecision(precision, "cast cost", "; ".join(detail))
    return LayerDecision(precision, "within budget", "; ".join(detail))
