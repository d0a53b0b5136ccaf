"""The number of weight terms per layer as a continuous knob between cost and loss.

Source: I. Zharikov, A. Sedova, "Post Training Quantization. Flexible continuous modification for SOTA post training
quantization methods to make them lossless": arg max F(Q(W, α)) subject to P ≤ P₀, with F the quality and P the complexity of
the model, over quantizers Q that are sums of low-bit tensors (:mod:`tvm_hquant.rounding.multipoint`, which also chooses the
step sizes α and, within a layer, the terms of each output channel).

The paper leaves open how terms are spread over layers. Here the loss of a layer is predicted by its squared rounding error
over its own size, of weights and activations together, and the choice is an integer program over the candidates: for a budget
on the loss the cheapest plan that keeps it (joint losses decide), for a limit P₀ the plan with the least predicted loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_hquant.errors import SearchError
from tvm_hquant.layers import Layer
from tvm_hquant.precision import parse_precision
from tvm_hquant.search.integer_program import IntegerProgram
from tvm_hquant.search.layout import squared_perturbation
from tvm_hquant.search.problem import CostModel, LayerPrecision, SearchProblem, SearchResult
from tvm_hquant.search.surrogate import activation_error, one_plan, search_by_prediction
from tvm_hquant.session import QuantizationSession


@dataclass(frozen=True, eq=False)
class MultipointStrategy:
    """Chooses among candidates such as ``a8w4``, ``a8w4x1.5``, ``a8w4x2``.

    ``complexity`` is P₀, in the unit of the problem's costs; None: as much as the budget on the loss asks for.
    """

    session: QuantizationSession
    complexity: float | None = None

    @property
    def name(self) -> str:
        return "multipoint"

    def search(self, problem: SearchProblem) -> SearchResult:
        """The cheapest plan for the budget, or the best within the complexity limit.

        Raises:
            SearchError: no plan is within the limit, or none has the prescribed levels.
        """
        layers = self.session.graph.by_name
        predicted = {
            (name, p): relative_error(layers[name], p) for name, own in problem.candidates.items() for p in own
        }

        def describe(layer: str) -> str:
            return f"relative squared error {predicted[layer, problem.candidates[layer][0]]:.2g} in the cheapest"

        if self.complexity is None:
            return search_by_prediction(problem, predicted, describe)
        return one_plan(problem, within_complexity(problem, predicted, self.complexity), describe)


def within_complexity(problem: SearchProblem, predicted: dict[LayerPrecision, float], limit: float) -> dict[str, str]:
    """The plan with the least sum of predicted losses whose costs add up to at most ``limit``.

    Raises:
        SearchError: every plan costs more.
    """
    program = IntegerProgram(problem.candidates, CostModel(predicted), problem.costs.layers, problem.levels)
    plan = program.solve(limit)
    if plan is None:
        least = sum(min(problem.costs.layers[name, p] for p in own) for name, own in problem.candidates.items())
        raise SearchError(f"no plan costs at most {limit:g}: the cheapest costs {least:g}")
    return plan


def relative_error(layer: Layer, precision: str) -> float:
    """Squared error of weights over their squared size, plus the same of activations uniform in their range."""
    assert layer.weights is not None
    parsed = parse_precision(precision)
    size = float(np.sum(layer.weights.astype(np.float64) ** 2)) or 1.0
    return squared_perturbation(layer, parsed) / size + activation_error(parsed) ** 2
