"""The model that an integer program minimizes is what plans cost: protects the expansion, and the meaning of each objective."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.onnx_models import node, onnx_model
from tests.planned_models import shared_session
from tvm_hquant.cost.plan_costs import neighbours, plan_costs, weighted_macs
from tvm_hquant.cost.predicted import predicted_cycles, weight_bytes
from tvm_hquant.errors import SearchError
from tvm_hquant.layers import LayerGraph, read_layers
from tvm_hquant.precision import A8W8, parse_precision
from tvm_hquant.preparation import prepare_module

PRECISIONS = ("a8w8", "a16w8", "bfloat16", "float32")
BRANCHES = ("stem", "left", "right", "merge")


def candidates(model: str) -> dict[str, tuple[str, ...]]:
    """Every layer may have each of them."""
    return {layer.name: PRECISIONS for layer in shared_session(model).graph.anchors}


def test_neighbours_are_makers_readers_and_siblings() -> None:
    """Through concat and sigmoid, and for two readers of one tensor; not the layers that never meet."""
    pairs = set(neighbours(shared_session("branches").graph))
    assert pairs == {("stem", "left"), ("stem", "right"), ("left", "right"), ("left", "merge"), ("right", "merge")}


@given(st.tuples(*[st.sampled_from(PRECISIONS)] * 4))
@settings(max_examples=60, deadline=None)
def test_model_is_near_the_exact_time(names: tuple[str, ...]) -> None:
    """Exact where at most two neighbours differ from the first candidates; within a fifth for all other plans."""
    session = shared_session("branches")
    costs = plan_costs(session, candidates("branches"), "latency")
    plan = dict(zip(BRANCHES, names, strict=True))
    changed = {layer for layer, p in plan.items() if p != PRECISIONS[0]}
    exact = costs.total(plan)
    tolerance = 1e-9 if len(changed) <= 1 or changed in ({"stem", "left"}, {"left", "right"}) else 0.2
    assert costs.predicted(plan) == pytest.approx(exact, rel=tolerance)


def chain_of_blocks(count: int) -> LayerGraph:
    """Dense blocks: what each convolution makes is joined to all before it, and a block ends in a convolution."""
    nodes, weights, tensor, channels = [], {}, "x", 4
    for block in range(count):
        joined = [tensor]
        for layer in range(3):
            name = f"b{block}l{layer}"
            source = tensor if layer == 0 else f"{name}j"
            if layer:
                nodes.append(node("Concat", " ".join(joined), source, axis=1))
            nodes.append(node("Conv", f"{source} {name}w", name))
            weights[f"{name}w"] = np.zeros((4, channels + 4 * layer, 1, 1), np.float32)
            joined.append(name)
        nodes += [
            node("Concat", " ".join(joined), f"b{block}j", axis=1),
            node("Conv", f"b{block}j b{block}w", f"b{block}"),
        ]
        weights[f"b{block}w"] = np.zeros((4, channels + 12, 1, 1), np.float32)
        tensor = f"b{block}"
    return read_layers(prepare_module(onnx_model(nodes, weights, outputs=tensor)))


def test_only_what_a_layer_can_change_is_looked_at() -> None:
    """Protects large graphs: the parts around layers end where a dense block does, so all of them grow with the graph alone."""
    sizes = []
    for count in (2, 4):
        graph = chain_of_blocks(count)
        parts = {layer.name: graph.around([layer.name]).layers for layer in graph.anchors}
        sizes.append(sum(map(len, parts.values())))
        assert max(map(len, parts.values())) < len(chain_of_blocks(2).layers)
    first, second = sizes
    assert second < 2.4 * first


def test_exact_time_is_the_sum_of_what_runs() -> None:
    """Layers by the spec's rates, and every conversion once."""
    session = shared_session("branches")
    plan = dict(zip(BRANCHES, ("a8w8", "float32", "a8w8", "bfloat16"), strict=True))
    program = session.program({name: parse_precision(p) for name, p in plan.items()})
    clock, spec = session.spec.units[0].clock_ghz, session.spec
    expected = 0.0
    for layer in session.graph.layers:
        if layer.operator_kind != "reshape":
            expected += predicted_cycles(spec, layer, program.formats.precisions[layer.name]) / clock / 1e3
    assert program.conversions, "the plan has conversions"
    for c in program.conversions:
        elements = 1
        for size in session.graph.tensor_shape(c.tensor):
            elements *= size
        expected += elements / spec.conversion_elements_per_cycle(c.source.dtype, c.target.dtype) / clock / 1e3
    assert plan_costs(session, candidates("branches"), "latency").total(plan) == pytest.approx(expected)


def test_pairs_are_looked_at_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects what needs no model, such as one precision everywhere, from the time that it takes to make one."""
    session, asked = shared_session("branches"), []
    monkeypatch.setattr("tvm_hquant.cost.plan_costs.neighbours", lambda graph: asked.append(graph) or neighbours(graph))
    costs = plan_costs(session, candidates("branches"), "latency")
    costs.total(dict.fromkeys(BRANCHES, PRECISIONS[0]))
    assert not asked
    assert costs.pairs
    assert len(costs.pairs) == len(dict(costs.pairs))
    assert len(asked) == 1


def test_measured_times_take_the_place_of_predicted_ones() -> None:
    """Where a kernel was timed, its time counts, and nothing else changes."""
    session = shared_session("residual")
    name = session.graph.anchors[0].name
    plan = {layer.name: "a8w8" for layer in session.graph.anchors}
    predicted = plan_costs(session, candidates("residual"), "latency")
    measured = plan_costs(session, candidates("residual"), "latency", {(name, "a8w8"): 1234.5})
    difference = measured.total(plan) - predicted.total(plan)
    assert difference == pytest.approx(1234.5 - predicted.layers[name, "a8w8"])
    assert measured.predicted(plan) == pytest.approx(measured.total(plan))


def test_size_and_macs() -> None:
    """Bytes are those of the artifact; a multiply-accumulate of 16 by 8 bits counts twice one of 8 by 8."""
    session = shared_session("residual")
    layer = session.graph.anchors[0]
    assert plan_costs(session, candidates("residual"), "size").layers[layer.name, "a8w8"] == weight_bytes(layer, A8W8)
    macs = plan_costs(session, candidates("residual"), "macs").layers
    assert macs[layer.name, "a8w8"] == layer.macs
    assert macs[layer.name, "a16w8"] == 2 * layer.macs
    assert weighted_macs(layer, parse_precision("w4")) == macs[layer.name, "float32"] == 16 * layer.macs
    with pytest.raises(SearchError, match="latency, size, macs"):
        plan_costs(session, candidates("residual"), "energy")


def test_weights_of_two_points_take_the_bits_of_both() -> None:
    """What a search for size counts is what the artifact packs: 9 bits are 5 and 4, both packed in 5."""
    layer = shared_session("residual").graph.anchors[0]
    own = {name: weight_bytes(layer, parse_precision(name)) for name in ("a8w9", "a12w10", "a16w16", "a8w8")}
    assert own["a8w9"] == own["a12w10"]
    channels = layer.operator.output_shape[-1]
    assert own["a16w16"] == 2 * layer.parameter_count + 12 * channels
    assert own["a8w9"] == layer.parameter_count * 10 / 8 + 12 * channels
