"""The reasons in a plan: a reader must be able to tell a layer that needs its precision from one that has it for nothing."""

from __future__ import annotations

from tests.search.synthetic import SyntheticNetwork
from tvm_hquant.search.problem import Assignment
from tvm_hquant.search.reasons import explained


def reasons(network: SyntheticNetwork, plan: Assignment, known: bool = True) -> dict[str, str]:
    """Reason by layer."""
    losses = {(layer, p): loss for layer, own in network.losses.items() for p, loss in own.items()}
    found = explained(network.problem(0.0), plan, losses if known else None)
    return {layer: decision.reason for layer, decision in found.items()}


def test_only_what_a_cheaper_precision_would_make_worse_is_sensitive() -> None:
    """Of four layers in 16 bits one is cheapest there, one costs the same, one would lose no more in 8; one is sensitive."""
    losses = {name: {"a8w8": 1.0, "bfloat16": 0.1} for name in ("needs it", "fastest there", "as fast", "no worse")}
    losses["no worse"]["a8w8"] = 0.1
    costs = {name: {"a8w8": 1.0, "bfloat16": 2.0} for name in losses}
    costs["fastest there"]["bfloat16"], costs["as fast"]["bfloat16"] = 0.5, 1.0
    network = SyntheticNetwork(losses, costs)
    plan = dict.fromkeys(losses, "bfloat16")
    free = dict.fromkeys(losses, "within budget")
    assert reasons(network, plan) == {**free, "needs it": "sensitive"}
    assert reasons(network, plan, known=False) == {**free, "needs it": "sensitive", "no worse": "sensitive"}
    assert reasons(network, dict.fromkeys(losses, "a8w8")) == free


def test_a_layer_that_conversions_keep_is_not_sensitive() -> None:
    """Between two layers in 16 bits a third would be cheaper in 8 by itself, but not with what converting to and fro costs."""
    losses = {name: {"a8w8": 1.0, "bfloat16": 0.0} for name in ("before", "between", "behind")}
    costs = {name: {"a8w8": 2.0, "bfloat16": 3.0} for name in losses}
    extra = {("a8w8", "bfloat16"): 1.0, ("bfloat16", "a8w8"): 1.0}
    pairs = {("before", "between"): extra, ("between", "behind"): extra}
    network = SyntheticNetwork(losses, costs, pairs)
    found = reasons(network, dict.fromkeys(losses, "bfloat16"))
    assert found["between"] == "cast cost"
    assert reasons(network, {**dict.fromkeys(losses, "bfloat16"), "behind": "a8w8"})["before"] == "cast cost"


def test_the_detail_says_what_would_be_lost_and_saved() -> None:
    """In numbers, so that a person can decide otherwise."""
    losses = {"layer": {"a8w4": 5.0, "a8w8": 1.0, "float32": 0.0}, "other": {"float32": 0.0}}
    costs = {"layer": {"a8w4": 1.0, "a8w8": 2.0, "float32": 8.0}, "other": {"float32": 12.0}}
    network = SyntheticNetwork(losses, costs)
    known = {(layer, p): loss for layer, own in losses.items() for p, loss in own.items()}
    found = explained(network.problem(0.0), {"layer": "float32", "other": "float32"}, known, notes={"other": "a note"})
    assert found["layer"].detail == "alone it loses 5 in a8w4, 0 in float32; a8w4 would save 35.00% of the cost"
    assert (found["other"].reason, found["other"].detail) == ("within budget", "a note; alone it loses 0 in float32")
