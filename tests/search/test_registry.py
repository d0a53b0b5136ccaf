"""Settings reach the strategies that they are for, and are refused by all others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.planned_models import random_samples, shared_session
from tvm_hquant.calibration.data import open_data
from tvm_hquant.errors import SearchError
from tvm_hquant.search.greedy import GreedyStrategy
from tvm_hquant.search.layout import AfterStorageStrategy
from tvm_hquant.search.multipoint import MultipointStrategy
from tvm_hquant.search.registry import STRATEGIES, StrategyContext, StrategySettings, check_strategy, make_strategy


def made(name: str, **settings: Any) -> Any:
    """A strategy as the command line makes it."""
    session = shared_session("branches")
    samples = open_data(random_samples(session, 2), session.signature)
    check_strategy(name, settings=StrategySettings(**settings))
    return make_strategy(name, StrategyContext(session, samples, settings=StrategySettings(**settings)))


def test_settings_arrive() -> None:
    """Everything that the papers leave to the user can be said."""
    assert made("greedy") == GreedyStrategy(0.0)
    assert made("greedy", beta=None) == GreedyStrategy(None)
    assert made("lazy-greedy", beta=0.025) == GreedyStrategy(0.025, lazy=True)
    storage = made("after-storage", stored_bits=4, storage_apart=True)
    assert isinstance(storage, AfterStorageStrategy)
    assert (storage.stored_bits, storage.shared) == (4, False)
    limited = made("multipoint", complexity=1e4)
    assert isinstance(limited, MultipointStrategy)
    assert limited.complexity == 1e4


@pytest.mark.parametrize(
    ("settings", "able"),
    [
        ({"ranking": "gradient"}, {"hierarchical"}),
        ({"beta": None}, {"greedy", "lazy-greedy"}),
        ({"stored_bits": 4}, {"after-storage"}),
        ({"storage_apart": True}, {"after-storage"}),
        ({"complexity": 5.0}, {"multipoint"}),
    ],
)
def test_a_setting_for_another_strategy_is_refused(settings: dict[str, Any], able: set[str]) -> None:
    """Silently ignored, it would make a user believe that it had been tried."""
    for name in STRATEGIES:
        if name in able:
            check_strategy(name, settings=StrategySettings(**settings))
            continue
        with pytest.raises(SearchError, match=f"strategy {name} has no .*use {sorted(able)[0]}"):
            check_strategy(name, settings=StrategySettings(**settings))


@pytest.mark.parametrize(
    "settings",
    [{"ranking": "loss"}, {"beta": float("nan")}, {"stored_bits": 1}, {"stored_bits": 9}, {"complexity": 0.0}],
)
def test_values_that_there_are_not(settings: dict[str, Any]) -> None:
    """Found before any work."""
    with pytest.raises(SearchError):
        StrategySettings(**settings)
