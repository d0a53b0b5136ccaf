"""Which precisions a search may choose from: protects that none is offered that only costs evaluations, and what users name."""

from __future__ import annotations

from functools import cache

import pytest

from tests.planned_models import new_session, partitioned, shared_session
from tvm_hquant.cost.plan_costs import plan_costs
from tvm_hquant.layers import Layer
from tvm_hquant.plan import LayerDecision
from tvm_hquant.planning import make_plan
from tvm_hquant.precision import parse_precision
from tvm_hquant.search.candidates import CandidateRules
from tvm_hquant.session import QuantizationSession, Refusal
from tvm_hquant.target_spec import load_target_spec

NARROW = ("a8w8", "a8w7", "a8w6", "a8w5", "a8w4")


@cache
def session_for(target: str) -> QuantizationSession:
    return new_session(partitioned("branches"), load_target_spec(target), samples=1)


def layer_of(session: QuantizationSession, kind: str) -> Layer:
    return next(layer for layer in session.graph.anchors if layer.operator_kind == kind)


def test_nothing_as_slow_as_float32_is_offered_for_latency() -> None:
    """Float32 loses nothing: 16 bits have to be faster. For size they are smaller, whatever they take."""
    session = session_for("x86-64-avx2")
    layer, spec = layer_of(session, "conv2d"), session.spec
    offered = CandidateRules(session).of(layer)
    assert offered[0] == "a8w8"
    assert offered[-1] == "float32"
    for name in offered[1:-1]:
        assert spec.macs_per_cycle(name, "conv2d") > spec.macs_per_cycle("float32", "conv2d"), name
    assert {"float16", "bfloat16", "a16w8"} <= set(CandidateRules(session, objective="size").of(layer))


def test_narrow_weights_have_to_be_faster_in_the_layer() -> None:
    """On plain AVX2 depthwise layers of all weights below 8 bits take the same time: the widest of them is enough."""
    session = session_for("x86-64-avx2")
    rules = CandidateRules(session, NARROW)
    assert rules.of(layer_of(session, "conv2d")) == ("a8w4", "a8w5", "a8w6", "a8w7", "a8w8")
    assert rules.of(layer_of(session, "depthwise_conv2d")) == ("a8w7", "a8w8")
    by_size = CandidateRules(session, NARROW, objective="size").of(layer_of(session, "depthwise_conv2d"))
    assert set(by_size) == set(NARROW)


def test_what_the_user_names_stays_where_it_is_faster_nowhere() -> None:
    """Whoever asks for 4 bits where all widths are as fast wants them for something else; so do those who prescribe levels."""
    vnni = session_for("x86-64-avx512-vnni")
    assert set(CandidateRules(vnni, ("a8w8", "a8w4")).of(layer_of(vnni, "conv2d"))) == {"a8w8", "a8w4"}
    avx2 = session_for("x86-64-avx2")
    kept = CandidateRules(avx2, NARROW, keep_all=True).of(layer_of(avx2, "depthwise_conv2d"))
    assert set(kept) == set(NARROW)


@pytest.mark.parametrize("name", ["a8w8", "a8w4"])
def test_a_fixed_precision_is_the_only_one(name: str) -> None:
    """What the user fixes is not judged by its speed."""
    session = session_for("x86-64-avx2")
    layer = layer_of(session, "depthwise_conv2d")
    assert CandidateRules(session, fixed={layer.name: name}).of(layer) == (name,)


def test_what_no_unit_lists_is_not_forbidden() -> None:
    """A reason tells people where to look: at the rules of the spec, or at what computes there."""
    c_source, npu = session_for("c-source"), session_for("generic-int8-npu")
    missing = CandidateRules(c_source, ("float16", "float32")).refused(layer_of(c_source, "conv2d"))
    assert missing == Refusal("no kernel", "no unit of c-source computes conv2d in float16")
    forbidden = CandidateRules(npu, ("bfloat16",)).refused(layer_of(npu, "conv2d"))
    assert forbidden is not None
    assert forbidden.reason == "the spec forbids"
    assert CandidateRules(c_source, ("a8w8", "float32")).refused(layer_of(c_source, "conv2d")) is None


@pytest.mark.parametrize("objective", ["size", "macs", "latency"])
def test_stored_bits_cost_what_they_change(objective: str) -> None:
    """bfloat16 with weights stored in 4 bits takes the bytes of these, and the time and the operations of bfloat16."""
    session = shared_session("branches")
    names = ("bfloat16w4", "w4", "bfloat16")
    rules = CandidateRules(session, names, objective=objective)
    layers = {layer.name: rules.of(layer) for layer in session.graph.anchors}
    assert all(set(own) == set(names) for own in layers.values())
    costs = plan_costs(session, layers, objective).layers
    same = "w4" if objective == "size" else "bfloat16"
    for layer in layers:
        assert costs[layer, "bfloat16w4"] == pytest.approx(costs[layer, same], rel=1e-9)


def test_stored_bits_are_the_same_program_as_in_a_plan() -> None:
    """What a search evaluates under a name is what its plan says with precision and stored bits apart."""
    session = shared_session("branches")
    names = dict(zip((a.name for a in session.graph.anchors), ("bfloat16w4", "a8w8", "w3", "bfloat16w8"), strict=True))
    plan = make_plan(session, {layer: LayerDecision(name, "within budget") for layer, name in names.items()})
    stem, merge = (plan.layers[list(names)[i]] for i in (0, 3))
    assert (stem.precision, stem.stored_bits, merge.precision, merge.stored_bits) == ("bfloat16", 4, "bfloat16", 8)
    searched = session.program({layer: parse_precision(name) for layer, name in names.items()})
    planned = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    plain = {
        layer: parse_precision(name.removesuffix("w4").removesuffix("w8"))
        for layer, name in names.items()
        if "b" in name
    }
    exact = session.program({**{layer: parse_precision(name) for layer, name in names.items()}, **plain})
    assert searched.digest == planned.digest != exact.digest


@pytest.mark.parametrize("objective", ["size", "macs", "latency"])
def test_any_width_can_be_searched(objective: str) -> None:
    """Weights of 9 to 16 bits are two points: what a search chooses can be compiled."""
    session = session_for("x86-64-avx2")
    layer = layer_of(session, "conv2d")
    rules = CandidateRules(session, ("a12w12", "a8w8", "float32"), objective=objective)
    assert rules.of(layer)[-1] == "float32"
    assert "a12w12" in rules.of(layer)
    assert rules.refused(layer) is None
