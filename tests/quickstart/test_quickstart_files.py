"""The embedded network and its data: they are whole, small, accurate, and the evaluation is fair."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from tvm_hquant import quickstart


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(quickstart.model_path(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("path", "count"), [(quickstart.calibration_path(), 256), (quickstart.evaluation_path(), 539)])
def test_data_is_what_the_docstrings_say(path, count):
    """Protects shapes, dtypes and ranges that the documentation promises."""
    data = np.load(path)
    assert set(data.files) == {"input", "labels"}
    assert data["input"].shape == (count, 1, 8, 8)
    assert data["input"].dtype == np.float32
    assert data["labels"].shape == (count,)
    assert data["labels"].dtype == np.int64
    assert data["input"].min() == 0
    assert data["input"].max() == 1
    assert set(data["labels"]) == set(range(10))


def test_calibration_and_evaluation_share_no_image():
    """A shared image would make the measured loss too small."""
    calibration, evaluation = (
        {image.tobytes() for image in np.load(path)["input"]}
        for path in (quickstart.calibration_path(), quickstart.evaluation_path())
    )
    assert len(evaluation) > 500
    assert not calibration & evaluation


def test_network_is_accurate_on_held_out_images(session):
    """Protects the exported file: layouts, batch norm statistics and the batch axis are right only if it classifies."""
    data = np.load(quickstart.evaluation_path())
    (logits,) = session.run(["logits"], {"input": data["input"]})
    assert (logits.argmax(axis=1) == data["labels"]).mean() >= 0.97


def test_outputs_do_not_depend_on_the_batch(session):
    """The batch axis is symbolic: one sample alone gives what it gives among others."""
    images = np.load(quickstart.evaluation_path())["input"][:5]
    (together,) = session.run(["logits"], {"input": images})
    alone = np.concatenate([session.run(["logits"], {"input": image[None]})[0] for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


def test_network_has_what_the_tool_is_to_show():
    """Depthwise layers, residual adds, batch norm and ReLU6, so that the quickstart exercises more than plain layers."""
    model = onnx.load(quickstart.model_path())
    groups = [a.i for n in model.graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "group"]
    operators = [n.op_type for n in model.graph.node]
    assert sum(g > 1 for g in groups) == 3
    assert operators.count("Add") == 2
    assert {"BatchNormalization", "Clip", "GlobalAveragePool", "Gemm"} <= set(operators)
    assert model.opset_import[0].version == 13


def test_files_stay_small():
    """They are in the repository and in the wheel."""
    assert quickstart.model_path().stat().st_size < 200_000
    data = (quickstart.calibration_path(), quickstart.evaluation_path())
    assert sum(path.stat().st_size for path in data) < 300_000
