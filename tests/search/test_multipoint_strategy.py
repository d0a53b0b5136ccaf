"""The multipoint strategy: a budget on the loss, a limit on the cost, and deployment bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.planned_models import built_outputs, one_sample, shared_session, simulated, stages
from tests.search.synthetic import SyntheticNetwork, precisions
from tvm_hquant.errors import SearchError
from tvm_hquant.search.multipoint import MultipointStrategy, relative_error, within_complexity
from tvm_hquant.search.registry import StrategyContext, make_strategy

NAMES = ("a8w2", "a8w2x1.5", "a8w2x2", "a8w2x3")
COSTS = {"a8w2": 1.0, "a8w2x1.5": 1.5, "a8w2x2": 2.0, "a8w2x3": 3.0}


def _network() -> SyntheticNetwork:
    session = shared_session("branches")
    losses = {a.name: {p: relative_error(a, p) for p in NAMES} for a in session.graph.anchors}
    return SyntheticNetwork(losses, dict.fromkeys(losses, COSTS))


def test_budget_and_limit_against_brute_force() -> None:
    """P ≤ P₀ is kept with the least loss there is; a budget on the loss is kept; a limit below all is an error."""
    of = _network()
    strategy = MultipointStrategy(shared_session("branches"))
    middle = float(np.median([of.loss(a) for a in of.assignments()]))
    found = strategy.search(of.problem(middle))
    assert found.within_budget
    assert found == strategy.search(of.problem(middle))
    assert not strategy.search(of.problem(0.0)).within_budget
    limit = 1.6 * len(of.losses)
    table = {(n, p): loss for n, own in of.losses.items() for p, loss in own.items()}
    plan = within_complexity(of.problem(1.0), table, limit)
    assert of.model.total(plan) <= limit
    best = min(of.loss(a) for a in of.assignments() if of.model.total(a) <= limit)
    np.testing.assert_allclose(of.loss(plan), best, rtol=1e-6)
    limited = MultipointStrategy(shared_session("branches"), complexity=limit).search(of.problem(1.0))
    assert precisions(limited) == plan
    with pytest.raises(SearchError, match="the cheapest costs"):
        within_complexity(of.problem(1.0), table, 0.5)
    assert make_strategy("multipoint", StrategyContext(shared_session("branches"), [])).name == "multipoint"  # type: ignore[arg-type]


def test_channels_with_different_terms_are_deployed_as_simulated() -> None:
    """Zero codes keep one arithmetic: grouped, depthwise and plain convolutions, two points on some channels."""
    expected = simulated("branches", "a8w4x1.5")
    (image,) = one_sample(shared_session("branches")).values()
    for found, wanted in zip(
        built_outputs(stages("branches", "a8w4x1.5")["lower_layers"], image), expected, strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
