"""What a search strategy is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm_hquant.plan import LayerDecision

LayerPrecision = tuple[str, str]
"""Name of a layer and of a precision."""

Assignment = Mapping[str, str]
"""The precision's name for every layer with weights."""


@dataclass(frozen=True)
class SearchProblem:
    """A choice of precision per layer with weights.

    Attributes:
        candidates: for each layer the precisions that it may have, the cheapest first. The last one is the most exact.
        measure: loss of the whole network when one layer alone has a precision, for all the given (layer, precision),
            lower is better. Measured on calibration samples; asking for many at once is cheaper, asking again is free.
        costs: predicted cost of a layer in a precision, in cycles, by (layer, precision).
        evaluate: true joint loss of an assignment on the search samples, in the unit of ``budget``.
        budget: the largest loss allowed.
    """

    candidates: Mapping[str, tuple[str, ...]]
    measure: Callable[[Sequence[LayerPrecision]], Mapping[LayerPrecision, float]]
    costs: Mapping[LayerPrecision, float]
    evaluate: Callable[[Assignment], float]
    budget: float


@dataclass(frozen=True)
class SearchStep:
    """One joint evaluation: how many layers were promoted, the loss and the predicted cost."""

    promoted: int
    loss: float
    cost: float


@dataclass(frozen=True)
class SearchResult:
    """The decisions for all layers with weights.

    ``loss`` is the joint loss on the search samples; ``within_budget`` says whether it keeps the budget. ``steps`` lists all
    evaluations in order.
    """

    decisions: Mapping[str, LayerDecision]
    loss: float
    within_budget: bool
    steps: tuple[SearchStep, ...]


class SearchStrategy(Protocol):
    """Decides precisions."""

    @property
    def name(self) -> str: ...

    def search(self, problem: SearchProblem) -> SearchResult:
        """The best assignment that was found."""


def total_cost(problem: SearchProblem, assignment: Assignment) -> float:
    """Predicted cost of an assignment, in cycles."""
    return sum(problem.costs[layer, precision] for layer, precision in assignment.items())
