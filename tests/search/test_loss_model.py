"""The model of the loss adds up, and learns from joint losses what the sum misses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_hquant.search.loss_model import LossModel

ALONE = {
    (f"layer{n}", p): loss * (n + 1)
    for n in range(6)
    for p, loss in (("a8w4", 0.01), ("a8w8", 0.001), ("float32", 0.0))
}


def plans(count: int) -> list[dict[str, str]]:
    random = np.random.default_rng(0)
    return [{f"layer{n}": str(random.choice(["a8w4", "a8w8", "float32"])) for n in range(6)} for _ in range(count)]


def test_nothing_known_is_the_sum() -> None:
    """Without joint losses, or with such that say nothing, the model is the sum of single losses; none is negative."""
    model = LossModel.of({**ALONE, ("layer0", "a8w8"): -1e-9})
    assert model.losses["layer0", "a8w8"] == 0.0
    plan = dict.fromkeys((f"layer{n}" for n in range(6)), "a8w4")
    assert model.predict(plan) == pytest.approx(0.21)
    assert model.fitted([plan, plan], [0.0, math.inf]).losses == model.losses


def test_a_common_factor_is_learned_from_one_plan() -> None:
    """All layers lose three times as much as they do alone."""
    plan = plans(1)[0]
    model = LossModel.of(ALONE)
    fitted = model.fitted([plan], [3 * model.predict(plan)])
    for other in plans(5):
        assert fitted.predict(other) == pytest.approx(3 * model.predict(other), rel=1e-6)


def test_single_layers_are_corrected() -> None:
    """One layer loses three times as much in company; the model finds it among many plans."""
    true = {pair: loss * (3 if pair == ("layer5", "a8w4") else 1) for pair, loss in ALONE.items()}
    model, known = LossModel.of(ALONE), plans(60)
    fitted = model.fitted(known, [sum(true[pair] for pair in plan.items()) for plan in known])
    assert fitted.losses["layer5", "a8w4"] > 2 * model.losses["layer5", "a8w4"]
    before, after = (
        np.std([math.log(m.predict(plan) / sum(true[pair] for pair in plan.items())) for plan in plans(90)[60:]])
        for m in (model, fitted)
    )
    assert after < before / 2


def test_what_is_infinite_stays_so() -> None:
    """A precision that gives NaN is no part of the fit and is never repaired by it."""
    model = LossModel.of({**ALONE, ("layer0", "a8w4"): math.inf})
    known = [plan for plan in plans(20) if plan["layer0"] != "a8w4"]
    assert math.isinf(model.fitted(known, [0.1] * len(known)).losses["layer0", "a8w4"])
