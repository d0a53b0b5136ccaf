"""Networks whose joint loss is known, for tests of searches against brute force."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from tvm_hquant.search.problem import Assignment, CostModel, SearchProblem, SearchResult

LayerTable = Mapping[str, Mapping[str, float]]


class SyntheticNetwork:
    """Losses and costs by layer and precision; ``interaction`` makes of the sum of losses the joint one.

    Notes which assignments were evaluated, on search and on check samples.
    """

    def __init__(
        self,
        losses: LayerTable,
        costs: LayerTable,
        pairs: Mapping[tuple[str, str], Mapping[tuple[str, str], float]] | None = None,
        interaction: Callable[[Assignment, float], float] = lambda _assignment, total: total,
        check_factor: float | None = None,
    ) -> None:
        self.losses, self.costs, self.interaction, self.check_factor = losses, costs, interaction, check_factor
        table = {(layer, p): cost for layer, own in costs.items() for p, cost in own.items()}
        self.model = CostModel(table, pairs or {})
        self.evaluated: list[dict[str, str]] = []
        self.checked: list[dict[str, str]] = []

    def loss(self, assignment: Assignment) -> float:
        """The joint loss."""
        return self.interaction(assignment, sum(self.losses[layer][p] for layer, p in assignment.items()))

    def evaluate(self, assignments: Sequence[Assignment]) -> list[float]:
        self.evaluated += map(dict, assignments)
        return [self.loss(a) for a in assignments]

    def check(self, assignments: Sequence[Assignment]) -> list[float]:
        assert self.check_factor is not None
        self.checked += map(dict, assignments)
        return [self.loss(a) * self.check_factor for a in assignments]

    def problem(
        self, budget: float, accuracy: float = 1.0, parameters: Mapping[str, int] | None = None,
        levels: Mapping[str, int] | None = None,
    ) -> SearchProblem:  # fmt: skip
        candidates = {layer: tuple(own) for layer, own in self.losses.items()}
        return SearchProblem(
            candidates,
            lambda pairs: {(layer, p): self.losses[layer][p] for layer, p in pairs},
            self.model,
            self.evaluate,
            budget,
            None if self.check_factor is None else self.check,
            accuracy,
            parameters or dict.fromkeys(candidates, 100),
            levels,
        )

    def assignments(self) -> list[dict[str, str]]:
        """All that there are."""
        return [dict(zip(self.losses, choice, strict=True)) for choice in product(*self.losses.values())]

    def least_cost(self, budget: float) -> float | None:
        """By trying all assignments."""
        return min((self.model.total(a) for a in self.assignments() if self.loss(a) <= budget), default=None)


def precisions(result: SearchResult) -> dict[str, str]:
    """Precision by layer."""
    return {layer: decision.precision for layer, decision in result.decisions.items()}
