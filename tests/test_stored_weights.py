"""Weights in few bits: protects that what is made of them again is what kernels read, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.onnx_models import node, onnx_model, random_inputs, random_weights
from tests.pipeline_checks import import_model, uniform_plan
from tests.planned_models import mixed_plan, one_sample, partitioned, shared_session
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.bfloat16 import bfloat16_bits
from tvm_hquant.errors import ArtifactError, PlanError
from tvm_hquant.plan import LayerDecision, load_plan
from tvm_hquant.planning import make_plan
from tvm_hquant.runtime import PACKED_WEIGHTS_NAME, Artifact, load_artifact
from tvm_hquant.stored_weights import pack_bits, restored, stored_floats, stored_integers, unpack_bits
from tvm_hquant.verification import verify_artifact

Array = npt.NDArray[Any]

PRECISIONS = {"stem": "w4", "left": "w8", "right": "a8w3", "merge": "float32"}


@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_codes_come_back(bits: int, count: int, seed: int) -> None:
    """Any width, any count: as many bits in the file as there are, rounded up to a byte."""
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint16)
    packed = pack_bits(codes, bits)
    assert packed.nbytes == (count * bits + 7) // 8
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), codes)


@given(st.integers(-127, 127), st.integers(-127, 127), st.integers(1, 5), st.sampled_from(["int8", "int16"]))
def test_integers_take_the_bits_of_their_range(a: int, b: int, rows: int, dtype: str) -> None:
    """Zeros of unfilled tiles count: they are in the array."""
    array = np.array([[a, b, 0]] * rows, dtype)
    stored = stored_integers(array)
    assert 2**stored.bits > max(a, b, 0) - min(a, b, 0)
    again = restored(stored.record(), stored.data)
    np.testing.assert_array_equal(again.array(), array, strict=True)


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16"])
def test_floats_are_codes_times_the_scale_of_their_lane(values: str) -> None:
    """[blocks, …, lanes], the layout of all templates; unfilled lanes hold code 0."""
    random = np.random.default_rng(1)
    codes = random.integers(-7, 8, (3, 10, 4))
    codes[2, :, 2:] = 0
    scales = np.broadcast_to(random.uniform(0.01, 0.1, (3, 1, 4)).astype(np.float32), codes.shape)
    stored = stored_floats(values, codes, scales)
    assert stored is not None
    assert stored.scales is not None
    assert stored.scales.shape == (3, 4)
    assert stored.bits == 4
    expected = codes.astype(np.float32) * scales
    wanted = bfloat16_bits(expected) if values == "bfloat16" else expected.astype(values)
    np.testing.assert_array_equal(restored(stored.record(), stored.data).array(), wanted, strict=True)


def test_scales_without_order_are_refused() -> None:
    """Where every element had its own scale nothing would be saved."""
    assert stored_floats("float32", np.ones((1, 97)), np.arange(97, dtype=np.float32)) is None


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    """Weights of 3, 4 and 8 bits in a depthwise, a grouped and a plain convolution; one layer is float."""
    session = shared_session("branches")
    return compile_artifact(partitioned("branches"), mixed_plan(session, PRECISIONS), session.spec)


def test_artifacts_keep_codes_and_run_as_simulated(artifact: Artifact) -> None:
    """The simulator has whole arrays, the artifact makes its own from a side file: their outputs are equal."""
    session = shared_session("branches")
    records = {r["layer"]: r for r in artifact.manifest["packed_weights"]}
    assert {name: r["bits"] for name, r in records.items()} == {"stem": 4, "left": 8, "right": 3}
    assert sum(r["bytes"] for r in records.values()) == (artifact.folder / PACKED_WEIGHTS_NAME).stat().st_size
    plan = mixed_plan(session, PRECISIONS)
    program = session.builder.program(plan.precisions(), plan.scales)
    session.engine.compile([program])
    for ours, simulated in zip(
        artifact.run(one_sample(session)).values(), session.engine.run(one_sample(session), [program])[0], strict=True
    ):
        np.testing.assert_array_equal(ours, simulated)
    assert verify_artifact(artifact).holds


STORED = {"stem": ("bfloat16", 4), "left": ("float16", 8), "right": ("a16w8", 3), "merge": ("float32", 2)}


def test_scales_per_channel_are_packed_or_kept() -> None:
    """The kernel of a layer with one weight a channel reads codes as floats: the artifact is whole all the same."""
    weights = random_weights(
        w=(32, 4, 1, 1), last=(8, 32, 1, 1), v=(32,), gamma=(32,), beta=(32,), mean=(32,), variance=(32,)
    )
    normalized = node("BatchNormalization", "r gamma beta mean variance", "n")
    nodes = [node("Conv", "x w v", "c"), node("Relu", "c", "r"), normalized, node("Add", "n r", "s")]
    nodes.append(node("Conv", "s last", "y"))
    model = onnx_model(nodes, weights)
    session = import_model(model, random_inputs(model)).session
    artifact = compile_artifact(session.mod, uniform_plan(session, "a8w8"), session.spec)
    assert verify_artifact(artifact).holds


def test_storage_apart_from_computation(tmp_path: Path) -> None:
    """A plan stores weights in fewer bits than it computes with: through plan.json, in simulator, library and contract."""
    session = shared_session("branches")
    decisions = {n: LayerDecision(p, "chosen by the user", stored_bits=b) for n, (p, b) in STORED.items()}
    made = make_plan(session, decisions)
    made.save(tmp_path)
    plan = load_plan(tmp_path / "plan.json")
    assert {n: d.stored_bits for n, d in plan.layers.items() if d.stored_bits} == {n: b for n, (_, b) in STORED.items()}
    assert dict(plan.weight_precisions) == {"stem": "w4", "left": "w8", "right": "a16w3", "merge": "w2"}
    artifact = compile_artifact(partitioned("branches"), plan, session.spec)
    assert {r["layer"]: r["bits"] for r in artifact.manifest["packed_weights"]} == {
        n: b for n, (_, b) in STORED.items()
    }
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    simulated = session.engine.run(one_sample(session), [program])[0]
    for ours, expected in zip(artifact.run(one_sample(session)).values(), simulated, strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert verify_artifact(artifact).holds


@pytest.mark.parametrize(
    ("precision", "bits", "message"),
    [
        ("a8w4", 5, "use 2 to 4"),
        ("float32", 9, "use 2 to 8"),
        ("a16w16", 1, "use 2 to 8"),
        ("a8w8", "4", "not an integer"),
    ],
)
def test_impossible_storage_is_refused(tmp_path: Path, precision: str, bits: Any, message: str) -> None:
    """More bits than the precision has, fewer than 2, or no number at all: the layer is named."""
    uniform = mixed_plan(shared_session("branches"), dict.fromkeys(PRECISIONS, "float32"))
    document = json.loads(uniform.to_json())
    document["layers"]["left"] |= {"precision": precision, "stored_bits": bits}
    (tmp_path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PlanError, match=f"layer left: .*{message}"):
        load_plan(tmp_path / "plan.json")


def test_the_library_does_not_hold_them(artifact: Artifact) -> None:
    """Not as floats, in the order of the kernel, anywhere in the file."""
    library = (artifact.folder / "model.so").read_bytes()
    for layer, array in artifact.packed_weights().items():
        assert array.tobytes() not in library, layer


def test_damaged_packed_weights(artifact: Artifact, tmp_path: Path) -> None:
    """A file that is cut short, and one that is gone."""
    folder = artifact.save(tmp_path / "artifact").folder
    path = folder / PACKED_WEIGHTS_NAME
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(ArtifactError, match=r"weights\.bin is missing"):
        load_artifact(folder)
    path.write_bytes(data[:-3])
    with pytest.raises(ArtifactError, match=r"weights\.bin: it is damaged"):
        load_artifact(folder)
