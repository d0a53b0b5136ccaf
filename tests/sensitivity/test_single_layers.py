"""What a layer loses is measured on plans that can be deployed, and means the same whatever stands behind the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planned_models import new_session, partitioned, random_samples, shared_session
from tvm_hquant.calibration.data import open_data
from tvm_hquant.errors import PrecisionError
from tvm_hquant.precision import parse_precision
from tvm_hquant.sensitivity.measured import SensitivityTable
from tvm_hquant.sensitivity.single_layers import SingleLayerPlans, suffix_precisions
from tvm_hquant.simulator.metrics import METRICS
from tvm_hquant.target_spec import load_target_spec

NAMES = ("a8w4", "a8w8", "bfloat16", "float32")


@st.composite
def tables(draw: st.DrawFn) -> dict[str, dict[str, float]]:
    """Whole losses by layer and precision; float32 loses nothing."""
    losses = st.integers(0, 1000)
    return {
        f"layer{i}": {p: float(draw(losses)) for p in NAMES[:3]} | {"float32": 0.0}
        for i in range(draw(st.integers(1, 5)))
    }


@given(tables(), st.data())
def test_where_losses_add_up_any_suffix_finds_them(table: dict[str, dict[str, float]], data: st.DataObject) -> None:
    """Each layer's loss, exactly; no plan twice, and never the float model, which is known to lose nothing."""
    suffix = {layer: data.draw(st.sampled_from(NAMES)) for layer in table}
    plans = SingleLayerPlans(list(table), suffix)
    asked: list[tuple[str, ...]] = []

    def evaluate(assignments: Sequence[Mapping[str, str]]) -> list[float]:
        asked.extend(tuple(plan.values()) for plan in assignments)
        return [sum(table[layer][p] for layer, p in plan.items()) for plan in assignments]

    pairs = [(layer, p) for p in NAMES for layer in table]
    assert plans.losses(pairs, evaluate) == {(layer, p): table[layer][p] for layer, p in pairs}
    assert len(asked) == len(set(asked)) <= len(NAMES) * len(table)
    assert ("float32",) * len(table) not in asked
    assert [tuple(plan.values()) for plan in plans.plans(pairs)] == asked


def test_the_float_suffix_measures_layers_alone() -> None:
    """The definition of the paper: one plan for each layer and precision, all others in float32."""
    plans = SingleLayerPlans(["first", "second"])
    assert plans.plans([("second", "a8w8"), ("first", "a8w8"), ("first", "float32")]) == [
        {"first": "a8w8", "second": "float32"},
        {"first": "float32", "second": "a8w8"},
    ]


def test_losses_are_never_below_0_and_nothing_is_better_than_infinity() -> None:
    """A layer whose error happens to take some of the suffix's away counts as lossless; an output with NaN stays infinite."""
    plans = SingleLayerPlans(["first", "second"], {"second": "bfloat16"})
    losses = {"a8w8": 1.0, "float32": 2.0, "float16": float("inf")}
    pairs = [("first", p) for p in losses]
    found = plans.losses(pairs, lambda asked: [losses[plan["first"]] for plan in asked])
    assert found == {("first", "a8w8"): 0.0, ("first", "float32"): 0.0, ("first", "float16"): float("inf")}


def test_the_table_measures_what_the_plans_lose() -> None:
    """Of a real network with branches, by evaluating both plans by hand; the second question costs nothing."""
    session = shared_session("branches")
    layers = [layer.name for layer in session.graph.anchors]
    source = open_data(random_samples(session, 3, 5), session.signature)
    plans = SingleLayerPlans(layers, dict.fromkeys(layers, "bfloat16"))
    table = SensitivityTable(session, source, "mse", lambda: plans)
    pairs = [(layer, p) for layer in layers for p in ("a8w8", "bfloat16")]
    found = table.measure(pairs)
    assert table.evaluations == 2 * len(layers)
    for layer, precision in pairs:
        before, behind = layers[: layers.index(layer)], layers[layers.index(layer) + 1 :]
        others = dict.fromkeys(before, "float32") | dict.fromkeys(behind, "bfloat16")
        programs = [
            session.program({n: parse_precision(p) for n, p in {**others, layer: own}.items()})
            for own in (precision, "float32")
        ]
        with_it, without = session.evaluate(programs, source, METRICS["mse"], "")
        assert found[layer, precision] == max(0.0, with_it.loss - without.loss)
    assert table.measure(pairs) == found
    assert table.evaluations == 2 * len(layers)


@pytest.mark.parametrize(
    ("target", "candidates", "expected"),
    [
        ("x86-64-avx512-bf16", ("a8w8", "a16w8", "bfloat16", "float32"), "bfloat16"),
        ("x86-64-avx512-bf16", ("a8w8", "float32"), "float32"),
        ("x86-64-avx512-vnni", ("a8w8", "a16w8", "float16", "float32"), "a16w8"),
        ("x86-64-avx2", ("a8w8", "a16w8", "float16", "float32"), "float32"),
        ("generic-int8-npu", ("a8w8", "a16w8", "a16w16"), "a16w8"),
    ],
)
def test_the_suffix_is_the_fastest_16_bit_candidate(target: str, candidates: tuple[str, ...], expected: str) -> None:
    """Where none of the candidates is faster than float32, float32: a suffix that no layer may have would be measured for
    nothing else."""
    session = new_session(partitioned("residual"), load_target_spec(target), samples=1)
    found = suffix_precisions(session, {layer.name: candidates for layer in session.graph.anchors})
    assert set(found.values()) == {expected}


def test_the_suffix_may_be_named() -> None:
    """Layers that cannot have it keep float32; a name of no precision is refused."""
    session = shared_session("branches")
    candidates = {layer.name: ("a8w8", "float32") for layer in session.graph.anchors}
    assert set(suffix_precisions(session, candidates, "a16w8").values()) == {"a16w8"}
    some = {**candidates, session.graph.anchors[0].name: ("a8w8", "bfloat16", "float32")}
    assert set(suffix_precisions(session, some, "float32").values()) == {"float32"}
    with pytest.raises(PrecisionError, match="bfloat17"):
        suffix_precisions(session, candidates, "bfloat17")
