"""The same precision for all layers, where each may have it."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_hquant.plan import LayerDecision
from tvm_hquant.search.problem import SearchProblem, SearchResult, SearchStep


@dataclass(frozen=True)
class UniformStrategy:
    """``precision`` everywhere; a layer that may not have it gets the most exact one that it may have."""

    precision: str

    @property
    def name(self) -> str:
        return f"uniform {self.precision}"

    def search(self, problem: SearchProblem) -> SearchResult:
        """The uniform assignment, evaluated once."""
        decisions = {
            layer: LayerDecision(self.precision, "chosen by the user")
            if self.precision in candidates
            else LayerDecision(candidates[-1], "no kernel", f"{self.precision} is not among its precisions")
            for layer, candidates in problem.candidates.items()
        }
        assignment = {layer: d.precision for layer, d in decisions.items()}
        loss = problem.evaluate([assignment])[0]
        step = SearchStep(0, loss, problem.costs.total(assignment))
        return SearchResult(decisions, loss, loss <= problem.budget, (step,))
