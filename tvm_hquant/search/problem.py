"""What a search strategy is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from tvm_hquant.plan import LayerDecision

LayerPrecision = tuple[str, str]
"""Name of a layer and of a precision."""

Assignment = Mapping[str, str]
"""The precision's name for every layer with weights."""


@dataclass(frozen=True)
class CostModel:
    """What plans cost, in one unit: microseconds, bytes, or operations.

    Attributes:
        layers: cost of a layer in a precision while its neighbours are in their cheapest one, by (layer, precision).
        pairs: what two neighbours cost beyond that, mostly conversions between them, by (layer, layer) and by
            (precision, precision); what is not listed is 0.
        base: what every plan costs.
        exact: cost of an assignment; None: the sum of the three above is exact.
    """

    layers: Mapping[LayerPrecision, float]
    pairs: Mapping[tuple[str, str], Mapping[tuple[str, str], float]] = field(default_factory=dict)
    base: float = 0.0
    exact: Callable[[Assignment], float] | None = None

    def total(self, assignment: Assignment) -> float:
        """Cost of a whole plan."""
        return self.predicted(assignment) if self.exact is None else self.exact(assignment)

    def predicted(self, assignment: Assignment) -> float:
        """The sum of base, layers and pairs, which an integer program can minimize."""
        alone = self.base + sum(self.layers[layer, precision] for layer, precision in assignment.items())
        return alone + sum(
            extra.get((assignment[first], assignment[second]), 0.0) for (first, second), extra in self.pairs.items()
        )


@dataclass(frozen=True)
class SearchProblem:
    """A choice of precision per layer with weights.

    Attributes:
        candidates: for each layer the precisions that it may have, the cheapest first. The last one is the most exact.
        measure: what the whole network loses by one layer in a precision, for all the given (layer, precision), lower is
            better (:mod:`tvm_hquant.sensitivity.single_layers`). Measured on calibration samples; asking for many at once is
            cheaper, asking again is free.
        costs: what is minimized, or what counts beside the loss.
        evaluate: true joint losses of assignments on the search samples, in the unit of ``budget``; asking for many at
            once is cheaper, above all for those that differ in late layers.
        budget: the largest loss allowed.
        check: what plans lose at most, in the same unit, with confidence and on samples that the search does not choose by:
            those who tighten a budget ask it rarely.
        evaluate_stored: as ``evaluate``, with weights stored in so many bits where a precision has more.
        accuracy: of the float model on the search samples, so that accuracy − loss is that of a plan; 1 where the metric
            is no accuracy.
        parameters: number of weights of each layer.
        levels: how many layers have to get each precision; None: as many as the strategy likes.
        seed: of whatever a strategy draws at random.
        smooth: losses of the same plans that nearly add up over layers, in the unit of ``measure``; None: ``evaluate`` does.
        measure_on_search: as ``measure``, on the search samples: closer to what ``smooth`` says of plans, and more expensive.
        stored_costs: as ``costs``, with weights stored in so many bits where a precision has more.
        measured_plans: the plans that are evaluated to measure pairs, for those who count them as plans.
    """

    candidates: Mapping[str, tuple[str, ...]]
    measure: Callable[[Sequence[LayerPrecision]], Mapping[LayerPrecision, float]]
    costs: CostModel
    evaluate: Callable[[Sequence[Assignment]], Sequence[float]]
    budget: float
    check: Callable[[Sequence[Assignment]], Sequence[float]] | None = None
    accuracy: float = 1.0
    parameters: Mapping[str, int] = field(default_factory=dict)
    levels: Mapping[str, int] | None = None
    seed: int = 0
    smooth: Callable[[Sequence[Assignment]], Sequence[float]] | None = None
    measure_on_search: Callable[[Sequence[LayerPrecision]], Mapping[LayerPrecision, float]] | None = None
    evaluate_stored: Callable[[Sequence[Assignment], int], Sequence[float]] | None = None
    measured_plans: Callable[[Sequence[LayerPrecision]], Sequence[Assignment]] | None = None
    stored_costs: Callable[[int], CostModel] | None = None


@dataclass(frozen=True)
class SearchStep:
    """One joint evaluation: how many layers are not in their first precision, the loss and the cost."""

    promoted: int
    loss: float
    cost: float


@dataclass(frozen=True)
class SearchResult:
    """The decisions for all layers with weights.

    A strategy may return one assignment only, but every one that it has evaluated is a point of the Pareto front.
    ``loss`` is the joint loss on the search samples; ``within_budget`` says whether it keeps the budget. ``steps`` lists all
    evaluations in order. ``remark`` says what a user has to know of the answer: that there are too few samples for it.
    """

    decisions: Mapping[str, LayerDecision]
    loss: float
    within_budget: bool
    steps: tuple[SearchStep, ...]
    remark: str = ""


class SearchStrategy(Protocol):
    """Decides precisions."""

    @property
    def name(self) -> str: ...

    def search(self, problem: SearchProblem) -> SearchResult:
        """The best assignment that was found."""


@runtime_checkable
class CheckingStrategy(SearchStrategy, Protocol):
    """A strategy that checks plans (``SearchProblem.check``); samples are kept back for it."""

    @property
    def checks_plans(self) -> bool: ...
