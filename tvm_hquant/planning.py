"""Makes plans from decisions about the layers with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tvm_hquant.errors import PrecisionError
from tvm_hquant.formats import follow_consumers
from tvm_hquant.plan import LayerDecision, PrecisionPlan
from tvm_hquant.precision import A8W8, FLOAT32, INT8, Precision, parse_precision
from tvm_hquant.session import QuantizationSession


def make_plan(session: QuantizationSession, decisions: Mapping[str, LayerDecision]) -> PrecisionPlan:
    """The plan for these decisions; layers without weights follow the layers that read them.

    It holds the scales of all calibrated tensors in the kinds of codes that it uses, and in uint8 and int8, so that a
    person can change a layer's precision in the file.
    """
    graph = session.graph
    decisions = {name: _with_storage_apart(decision) for name, decision in decisions.items()}
    anchors = {name: parse_precision(d.precision) for name, d in decisions.items()}
    followed = follow_consumers(graph, anchors, {}, session.output_precision)
    layers = dict(decisions)
    for name, f in followed.items():
        layers[name] = LayerDecision(f.precision.name, f.reason, f.detail)
    scales = session.scales([A8W8, INT8, *anchors.values(), *(f.precision for f in followed.values())])
    made_for = {name: decision.weight_precision for name, decision in decisions.items()}
    weights = {layer.name: session.layer_weights(layer, made_for[layer.name]) for layer in graph.anchors}
    stored = {name: codes for name, codes in weights.items() if codes is not None}
    return PrecisionPlan(
        graph.fingerprint,
        session.spec.name,
        {layer.name: layers[layer.name] for layer in graph.layers},
        scales,
        session.ranges.groups if session.ranges is not None else (),
        stored,
        {name: made_for[name].name for name in stored},
    )


def _with_storage_apart(decision: LayerDecision) -> LayerDecision:
    """A decision whose precision is the one that is computed in, beside the bits that weights are stored in."""
    precision = parse_precision(decision.precision)
    if precision.computed == precision:
        return decision
    return replace(decision, precision=precision.computed.name, stored_bits=precision.weight_bits)


def with_stored_bits(
    assignment: Mapping[str, str], stored_bits: int | None, reason: str = "within budget", detail: str = ""
) -> dict[str, LayerDecision]:
    """Decisions for layers with weights, which are stored in ``stored_bits`` bits where the precision has more."""
    return {
        name: LayerDecision(
            precision,
            reason,
            detail,
            stored_bits if stored_bits is not None and parse_precision(precision).weight_bits > stored_bits else None,
        )
        for name, precision in assignment.items()
    }


def stored_bits_of(decisions: Mapping[str, LayerDecision]) -> int | None:
    """In how many bits weights are stored that are stored in fewer than their precision has; None: none are."""
    return next((d.stored_bits for d in decisions.values() if d.stored_bits is not None), None)


def with_calibration(session: QuantizationSession, plan: PrecisionPlan) -> PrecisionPlan:
    """A plan with what a calibrated session knows and the plan lacks for its precisions: a person has changed some.

    The plan's own scales and codes stay as they are.
    """
    precisions = plan.precisions()
    known = session.scales(precisions.values())
    scales = {name: {**known.get(name, {}), **plan.scales.get(name, {})} for name in {**plan.scales, **known}}
    weights = dict(plan.weights)
    made_for = dict(plan.weight_precisions)
    for layer in session.graph.anchors:
        precision = plan.layers[layer.name].weight_precision
        codes = session.layer_weights(layer, precision)
        if codes is not None and made_for.get(layer.name) != precision.name:
            weights[layer.name], made_for[layer.name] = codes, precision.name
    return replace(plan, scales=scales, weights=weights, weight_precisions=made_for)


def uniform_decisions(session: QuantizationSession, precision: Precision) -> dict[str, LayerDecision]:
    """One precision for all layers with weights; float32, with the reason, for those that cannot have it.

    Raises:
        PrecisionError: a layer can have neither.
    """
    decisions: dict[str, LayerDecision] = {}
    for layer in session.graph.anchors:
        refusal = session.refusal(layer, precision)
        if refusal is None:
            decisions[layer.name] = LayerDecision(precision.name, "chosen by the user")
            continue
        if session.refusal(layer, FLOAT32) is not None:
            raise PrecisionError(
                f"layer {layer.name} cannot be {precision.name} on {session.spec.name}: {refusal.detail}; float32 is not "
                "offered either"
            )
        decisions[layer.name] = LayerDecision("float32", refusal.reason, refusal.detail)
    return decisions
