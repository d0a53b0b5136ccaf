"""The search strategies by the names that the command line uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
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
)
from tvm_hquant.search.monotone import MonotoneStrategy
from tvm_hquant.search.multipoint import MultipointStrategy
from tvm_hquant.search.problem import SearchStrategy

if TYPE_CHECKING:
    from tvm_hquant.calibration.samples import DataSource
    from tvm_hquant.session import QuantizationSession


RANKINGS = ("measured", "gradient")
"""Losses of single layers as measured, or the norms of mean gradients at their inputs times the largest error."""


@dataclass(frozen=True)
class StrategySettings:
    """What a user can say to some strategies only.

    Attributes:
        ranking: what ``hierarchical`` ranks layers by (:data:`RANKINGS`).
        beta: weight of the number of quantized parameters in the objective of ``greedy`` and ``lazy-greedy``; None: tuned.
        stored_bits: of all weights in the file, 2 to 8, for ``after-storage``.
        storage_apart: whether inputs and weights get levels of their own in ``after-storage``: its algorithm's second branch.
        complexity: P₀ of ``multipoint``, in the unit of the objective: the plan with the least predicted loss that costs no
            more; None: the cheapest plan for the budget.

    Raises:
        SearchError: a value is none that there is.
    """

    ranking: str = "measured"
    beta: float | None = 0.0
    stored_bits: int = 8
    storage_apart: bool = False
    complexity: float | None = None

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise SearchError(f"unknown ranking {self.ranking!r}: use one of {', '.join(RANKINGS)}")
        if self.beta is not None and not math.isfinite(self.beta):
            raise SearchError(f"beta is {self.beta}: give a number, or have it tuned")
        if not 2 <= self.stored_bits <= 8:
            raise SearchError(f"weights cannot be stored in {self.stored_bits} bits: use 2 to 8")
        if self.complexity is not None and not self.complexity > 0:
            raise SearchError(f"the complexity limit is {self.complexity}: give a positive number")


NO_SETTINGS = StrategySettings()
"""What holds where nothing is said."""

_KNOWN_BY: Mapping[str, tuple[str, ...]] = {
    "ranking": ("hierarchical",),
    "beta": ("greedy", "lazy-greedy"),
    "stored_bits": ("after-storage",),
    "storage_apart": ("after-storage",),
    "complexity": ("multipoint",),
}
"""The strategies that each setting is for."""


@dataclass(frozen=True, eq=False)
class StrategyContext:
    """What a strategy may need beyond the problem: the calibrated model, and calibration samples with their gradients.

    ``front`` says whether a whole front is wanted, or one plan for the budget; ``settings`` what the user said to it.
    """

    session: QuantizationSession
    samples: DataSource
    seed: int = 0
    front: bool = True
    settings: StrategySettings = NO_SETTINGS

    @property
    def layout_data(self) -> LayoutData:
        """The model and the samples for gradients."""
        return LayoutData(self.session, self.samples)


def _hierarchical(context: StrategyContext) -> HierarchicalStrategy:
    if context.settings.ranking == "measured":
        return HierarchicalStrategy()
    return HierarchicalStrategy(GradientStrategy(context.layout_data).predict)


def _after_storage(context: StrategyContext) -> AfterStorageStrategy:
    settings = context.settings
    return AfterStorageStrategy(context.layout_data, settings.stored_bits, shared=not settings.storage_apart)


STRATEGIES: Mapping[str, Callable[[StrategyContext], SearchStrategy]] = {
    "one-shot": lambda _context: OneShotStrategy(),
    "hierarchical": _hierarchical,
    "greedy": lambda context: GreedyStrategy(context.settings.beta),
    "lazy-greedy": lambda context: GreedyStrategy(context.settings.beta, lazy=True),
    "gradient": lambda context: GradientStrategy(context.layout_data),
    "monotone": lambda _context: MonotoneStrategy(),
    "after-storage": _after_storage,
    "hawq-v2": lambda context: HessianStrategy(context.layout_data, seed=context.seed),
    "multipoint": lambda context: MultipointStrategy(context.session, context.settings.complexity),
    "ilp": lambda context: IntegerProgramStrategy(context.front),
}
"""Makes each strategy for a model; one line for each."""

DEFAULT_STRATEGY = "ilp"

WITH_LEVELS = frozenset({"gradient", "monotone", "after-storage", "hawq-v2", "multipoint", "ilp"})
"""Strategies that can give each precision to a prescribed number of layers."""


def check_strategy(name: str, has_levels: bool = False, settings: StrategySettings = NO_SETTINGS) -> None:
    """Refuses names of no strategy, and levels or settings for one that does not know them, before any work.

    Raises:
        SearchError: no strategy has that name, or the strategy knows no levels, or not that setting.
    """
    if name not in STRATEGIES:
        raise SearchError(f"unknown strategy {name!r}: use one of {', '.join(STRATEGIES)}")
    if has_levels and name not in WITH_LEVELS:
        able = ", ".join(other for other in STRATEGIES if other in WITH_LEVELS)
        raise SearchError(f"strategy {name} cannot prescribe levels: leave them out, or use one of {able}")
    for setting in fields(StrategySettings):
        able_ones, value = _KNOWN_BY[setting.name], getattr(settings, setting.name)
        if value != setting.default and name not in able_ones:
            spelled = setting.name.replace("_", " ")
            raise SearchError(f"strategy {name} has no {spelled}: leave it out, or use {' or '.join(able_ones)}")


def make_strategy(name: str, context: StrategyContext) -> SearchStrategy:
    """The strategy called ``name``, for one model.

    Raises:
        SearchError: no strategy has that name.
    """
    check_strategy(name)
    return STRATEGIES[name](context)
