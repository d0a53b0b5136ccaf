"""plan.json is for people: protects that it survives a round trip, can be edited and compared, and explains its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planned_models import named_plan, one_sample, partitioned, shared_session
from tvm_hquant.errors import PlanError
from tvm_hquant.layers import read_layers
from tvm_hquant.plan import LayerDecision, PrecisionPlan, load_plan
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantized_weights import quantize_layer_weights
from tvm_hquant.rounding.weight_rounding import WeightRounding
from tvm_hquant.tensor_format import TensorFormat


def saved(folder: Path, name: str = "mixed") -> Path:
    """The plan ``name`` of the residual model in a folder; gives the path of its plan.json."""
    named_plan("residual", name).save(folder)
    return folder / "plan.json"


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """plan.json after a change to its document."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def outputs_of(plan: PrecisionPlan) -> np.ndarray[Any, Any]:
    """What the residual model gives under a plan."""
    session = shared_session("residual")
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    return session.engine.run(one_sample(session), [program])[0][0]


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    """Decisions, scales, zero points, groups and weight codes come back exactly as they were."""
    plan = named_plan("residual", "mixed")
    again = load_plan(saved(tmp_path))
    assert (again.fingerprint, again.target, again.layers) == (plan.fingerprint, plan.target, plan.layers)
    assert {k: dict(v) for k, v in again.scales.items()} == {k: dict(v) for k, v in plan.scales.items()}
    assert again.groups == plan.groups != ()
    assert again.weight_precisions == plan.weight_precisions
    assert set(again.weights) == set(plan.weights) == {"conv1", "conv2"}
    for name, weights in plan.weights.items():
        for field in ("codes", "scales", "bias"):
            ours, theirs = getattr(again.weights[name], field), getattr(weights, field)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    again.check_model(read_layers(partitioned("residual")))


@given(st.floats(2.0**-60, 2.0**30, width=32), st.integers(0, 255))
@settings(max_examples=50, deadline=None)
def test_scales_are_written_exactly(scale: float, zero_point: int) -> None:
    """The shortest decimal text of a float32 is read as the same float32."""
    formats = {"t": {"uint8": TensorFormat("uint8", scale, zero_point, 0, 255)}}
    text = PrecisionPlan("", "", {}, formats).to_json()
    entry = json.loads(text)["tensors"]["t"]["uint8"]
    assert float(np.float32(entry["scale"])) == scale
    assert len(str(entry["scale"])) <= 16, "no digits beyond what float32 needs"


def test_one_line_for_each_layer_and_tensor(tmp_path: Path) -> None:
    """Two plans compare line by line: a promoted layer is one changed line, however long the model is."""
    plan = named_plan("residual", "a8w8")
    before = plan.to_json().splitlines()
    for name in (*plan.layers, *plan.scales):
        assert sum(line.startswith(f'    "{name}": ') for line in before) == 1 + (
            name in plan.layers and name in plan.scales
        )
    promoted = plan.with_layers({"conv2": LayerDecision("a16w8", "sensitive", "alone it loses 0.3")})
    after = promoted.to_json().splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == 1
    assert '"conv2"' in changed[0][1]
    assert '"a16w8"' in changed[0][1]


def test_an_edited_precision_is_obeyed(tmp_path: Path) -> None:
    """A person changes one word in plan.json: the layer computes so, its codes are made anew (without data, by rounding to
    nearest), the others stay."""

    def to_eight_bits(document: dict[str, Any]) -> None:
        document["layers"]["conv2"]["precision"] = "uint8"

    plan = load_plan(edited(saved(tmp_path), to_eight_bits))
    assert plan.layers["conv2"].precision == "a8w8"
    layer = read_layers(partitioned("residual")).by_name["conv2"]
    made = plan.layer_weights(layer, parse_precision("a8w8"))
    assert made is not None
    np.testing.assert_array_equal(made.codes, quantize_layer_weights(layer, parse_precision("a8w8")).codes)
    conv1 = plan.layer_weights(read_layers(partitioned("residual")).by_name["conv1"], parse_precision("a8w8"))
    assert conv1 is plan.weights["conv1"]
    assert not np.array_equal(outputs_of(plan), outputs_of(named_plan("residual", "mixed")))


def test_codes_cannot_pass_for_another_precision(tmp_path: Path) -> None:
    """``sed s/a8w8/a8w4/`` over the whole file: the 8-bit codes beside it are not taken for 4-bit ones."""
    path = saved(tmp_path, "a8w8")
    path.write_text(path.read_text(encoding="utf-8").replace("a8w8", "a8w4"), encoding="utf-8")
    layer = read_layers(partitioned("residual")).by_name["conv1"]
    made = load_plan(path).layer_weights(layer, parse_precision("a8w4"))
    assert made is not None
    assert np.unique(made.codes).size <= 16


def test_an_edited_scale_is_obeyed(tmp_path: Path) -> None:
    """Scales in the file are what runs, not a copy for show."""

    def widen(document: dict[str, Any]) -> None:
        document["tensors"]["conv1"]["uint16"]["scale"] *= 64
        document["groups"] = []

    plan = load_plan(edited(saved(tmp_path), widen))
    assert not np.array_equal(outputs_of(plan), outputs_of(named_plan("residual", "mixed")))


def test_weights_may_be_missing(tmp_path: Path) -> None:
    """plan.json alone is a plan: codes are made from the model by rounding to nearest, with the model's own bias."""
    path = saved(tmp_path)
    (tmp_path / "plan.npz").unlink()
    plan = load_plan(path)
    assert plan.weights == {}
    graph = read_layers(partitioned("residual"))
    for name, stored in named_plan("residual", "mixed").weights.items():
        made = plan.layer_weights(graph.by_name[name], plan.precisions()[name])
        assert made is not None
        assert np.abs(made.codes.astype(np.int32) - stored.codes).max() <= 1
        np.testing.assert_array_equal(made.scales, stored.scales)
        assert graph.by_name[name].bias is not None
        np.testing.assert_array_equal(made.bias, graph.by_name[name].bias)
    np.testing.assert_allclose(outputs_of(plan), outputs_of(named_plan("residual", "mixed")), atol=0.05)


def test_completed_plan_holds_the_codes_of_its_present_precisions() -> None:
    """What is deployed can be verified without the model: an edited plan gets codes for what it says now, and no others."""
    graph = read_layers(partitioned("residual"))
    plan = named_plan("residual", "mixed")
    edits = {"conv1": LayerDecision("float32", ""), "conv2": LayerDecision("a8w4", ""), "head": LayerDecision("w3", "")}
    completed = plan.with_layers(edits).completed(graph)
    assert completed.weight_precisions == {"conv2": "a8w4", "head": "w3"}
    assert set(completed.weights) == {"conv2", "head"}
    assert np.unique(completed.weights["conv2"].codes).size <= 16
    assert plan.completed(graph).weights["conv1"] is plan.weights["conv1"], "codes that a plan holds are kept"
    one_scale = replace(plan, weights={}, weight_precisions={}).completed(
        graph, WeightRounding("nearest", per_channel=False)
    )
    assert np.unique(one_scale.weights["conv1"].scales).size == 1
    with pytest.raises(PlanError, match="for another model"):
        plan.completed(read_layers(partitioned("branches")))


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no layers": (lambda d: d.pop("layers"), "the field 'layers' is missing"),
    "no model": (lambda d: d.pop("model"), "the field 'model' is missing"),
    "no precision": (lambda d: d["layers"]["conv1"].pop("precision"), "layer conv1: the field 'precision' is missing"),
    "unknown precision": (lambda d: d["layers"]["conv1"].update(precision="a9"), "unknown precision 'a9'"),
    "a number as precision": (lambda d: d["layers"]["conv1"].update(precision=8), "layer conv1: unknown precision '8'"),
    "layers as a list": (lambda d: d.update(layers=["conv1"]), "wrong form"),
    "another version": (lambda d: d.update(version=99), "version 99 is not supported"),
    "no scale": (lambda d: d["tensors"]["x"]["uint8"].pop("scale"), "the field 'scale' is missing"),
    "negative scale": (lambda d: d["tensors"]["x"]["uint8"].update(scale=-1), "tensor x, uint8: scale -1.0"),
    "scale of text": (lambda d: d["tensors"]["x"]["uint8"].update(scale="wide"), "wrong form"),
    "zero point outside": (lambda d: d["tensors"]["x"]["uint8"].update(zero_point=256), "zero point 256 is outside"),
    "broken zero point": (lambda d: d["tensors"]["x"]["uint8"].update(zero_point=0.5), "0.5 is not an integer"),
    "unknown codes": (lambda d: d["tensors"]["x"].update(nibbles={"scale": 1, "zero_point": 0}), "tensor x, nibbles"),
    "a group of two scales": (lambda d: d.update(groups=[["x", "conv1"]]), "x, conv1 must have one scale"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda c: c.replace(" ", "-"))
def test_wrong_documents_are_explained(tmp_path: Path, case: str) -> None:
    """Every mistake that a person can make in the file gets a sentence with the file's name in it, never a traceback."""
    change, message = WRONG[case]
    path = edited(saved(tmp_path), change)
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '"plan"', "null", "\x00"])
def test_files_that_are_no_plan(tmp_path: Path, text: str) -> None:
    """Other JSON, broken JSON, nothing."""
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=r"plan\.json"):
        load_plan(path)


def test_unreadable_files(tmp_path: Path) -> None:
    """Missing, a folder, or bytes that are no text."""
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.json", ".", "binary.json"):
        with pytest.raises(PlanError, match="cannot read the plan"):
            load_plan(tmp_path / name)


def test_weights_of_another_plan_are_refused(tmp_path: Path) -> None:
    """plan.json names its plan.npz by hash: mixed-up files never run."""
    path = saved(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    saved(other, "a8w8")
    (tmp_path / "plan.npz").write_bytes((other / "plan.npz").read_bytes())
    with pytest.raises(PlanError, match="SHA-256 differs"):
        load_plan(path)


def test_damaged_weights_are_a_plan_error(tmp_path: Path) -> None:
    """Also where the hash was taken out of plan.json, a broken archive is the plan's fault, not a crash."""

    def without_hash(document: dict[str, Any]) -> None:
        document["weights"]["sha256"] = None

    path = edited(saved(tmp_path), without_hash)
    for data in (b"", b"PK\x03\x04 no archive", (tmp_path / "plan.npz").read_bytes()[:300]):
        (tmp_path / "plan.npz").write_bytes(data)
        with pytest.raises(PlanError, match="plan"):
            load_plan(path)


def test_plan_of_another_model_is_refused() -> None:
    """By names where they differ, by the fingerprint where only weights do."""
    plan = named_plan("residual", "a8w8")
    with pytest.raises(PlanError, match=r"does not have \(.*conv1.*\) and it has no decision for .*stem"):
        plan.check_model(read_layers(partitioned("branches")))
    with pytest.raises(PlanError, match="shapes or weights differ"):
        replace(plan, fingerprint="0" * 64).check_model(read_layers(partitioned("residual")))


def test_misspelt_layer_is_found() -> None:
    """The model is the right one, so an unknown name is a slip of the person who edited: the likely name is said."""
    plan = named_plan("residual", "a8w8")
    layers = {name.replace("conv2", "conv_2"): decision for name, decision in plan.layers.items()}
    with pytest.raises(PlanError, match=r"edited wrongly: .*; write conv2 for conv_2"):
        replace(plan, layers=layers).check_model(read_layers(partitioned("residual")))
