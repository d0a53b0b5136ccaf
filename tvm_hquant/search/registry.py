"""The search strategies by the names that the command line uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm_hquant.errors import SearchError
from tvm_hquant.search.greedy import GreedyStrategy, OneShotStrategy
from tvm_hquant.search.hierarchical import HierarchicalStrategy
from tvm_hquant.search.ilp import IntegerProgramStrategy
from tvm_hquant.search.layout import (
    AfterStorageStrategy,
    GradientStrategy,
    HessianStrategy,
    LayoutData,
    MonotoneStrategy,
)
from tvm_hquant.search.multipoint import MultipointStrategy
from tvm_hquant.search.problem import SearchStrategy

if TYPE_CHECKING:
    from tvm_hquant.calibration.samples import DataSource
    from tvm_hquant.session import QuantizationSession


@dataclass(frozen=True, eq=False)
class StrategyContext:
    """What a strategy may need beyond the problem: the calibrated model, and calibration samples with their gradients.

    ``front`` says whether a whole front is wanted, or one plan for the budget; ``ranking`` what the hierarchical strategy
    ranks layers by (:data:`RANKINGS`).
    """

    session: QuantizationSession
    samples: DataSource
    seed: int = 0
    front: bool = True
    ranking: str = "measured"


RANKINGS = ("measured", "gradient")
"""Losses of single layers as measured, or the norms of mean gradients at their inputs times the largest error."""


def _hierarchical(context: StrategyContext) -> HierarchicalStrategy:
    if context.ranking == "measured":
        return HierarchicalStrategy()
    return HierarchicalStrategy(GradientStrategy(LayoutData(context.session, context.samples)).predict)


STRATEGIES: Mapping[str, Callable[[StrategyContext], SearchStrategy]] = {
    "one-shot": lambda _context: OneShotStrategy(),
    "hierarchical": _hierarchical,
    "greedy": lambda _context: GreedyStrategy(),
    "lazy-greedy": lambda _context: GreedyStrategy(lazy=True),
    "gradient": lambda context: GradientStrategy(LayoutData(context.session, context.samples)),
    "monotone": lambda _context: MonotoneStrategy(),
    "after-storage": lambda context: AfterStorageStrategy(LayoutData(context.session, context.samples)),
    "hawq-v2": lambda context: HessianStrategy(LayoutData(context.session, context.samples), seed=context.seed),
    "multipoint": lambda context: MultipointStrategy(context.session),
    "ilp": lambda context: IntegerProgramStrategy(context.front),
}
"""Makes each strategy for a model; one line for each."""

DEFAULT_STRATEGY = "ilp"

WITH_LEVELS = frozenset({"gradient", "monotone", "after-storage", "hawq-v2", "multipoint", "ilp"})
"""Strategies that can give each precision to a prescribed number of layers."""


def check_strategy(name: str, has_levels: bool = False, ranking: str = "measured") -> None:
    """Refuses names of no strategy, and levels or rankings for one that does not know them, before any work.

    Raises:
        SearchError: no strategy or ranking has that name, or the strategy knows no levels, or ranks nothing.
    """
    if name not in STRATEGIES:
        raise SearchError(f"unknown strategy {name!r}: use one of {', '.join(STRATEGIES)}")
    if has_levels and name not in WITH_LEVELS:
        able = ", ".join(other for other in STRATEGIES if other in WITH_LEVELS)
        raise SearchError(f"strategy {name} cannot prescribe levels: leave them out, or use one of {able}")
    if ranking not in RANKINGS:
        raise SearchError(f"unknown ranking {ranking!r}: use one of {', '.join(RANKINGS)}")
    if ranking != "measured" and name != "hierarchical":
        raise SearchError(f"strategy {name} has no ranking {ranking}: leave it out, or use hierarchical")


def make_strategy(name: str, context: StrategyContext) -> SearchStrategy:
    """The strategy called ``name``, for one model.

    Raises:
        SearchError: no strategy has that name.
    """
    check_strategy(name)
    return STRATEGIES[name](context)
