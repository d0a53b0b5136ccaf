"""The comparison of engines: what tables say of the times, models of users, and masked copies of libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.avx512_masking import without_avx512
from benchmarks.core_probe import core_probe, shared_part
from benchmarks.engine_models import NetworkFiles
from benchmarks.engine_process import read_samples
from benchmarks.engines import Timing, fastest_others, print_timings, ratio
from benchmarks.own_model import OwnModel
from tests.onnx_models import node, onnx_model
from tvm_hquant.errors import DataError, ModelError


def _row(**milliseconds: float) -> dict[str, Timing]:
    names = {
        "ort": "ONNX Runtime float32",
        "u8s8": "ONNX Runtime u8s8",
        "s8s8": "ONNX Runtime s8s8",
        "ov": "OpenVINO float32",
        "nncf": "OpenVINO int8",
        "ours": "ours a8w8",
        "ours_float": "ours float32",
    }
    return {names[k]: Timing("net", names[k], ((v * 1e-3,), (v * 1e-3,))) for k, v in milliseconds.items()}


def test_ratio_is_to_the_fastest_other_engine_of_its_kind() -> None:
    """Integers are compared with the fastest engine whatever it computes in, floats with the fastest float32."""
    row = _row(ort=4, u8s8=3, s8s8=9, ov=5, nncf=2, ours=1, ours_float=3)
    assert fastest_others(row) == ("OpenVINO int8", "ONNX Runtime float32")
    assert ratio(row, "ours a8w8") == pytest.approx(0.5)
    assert ratio(row, "ours float32") == pytest.approx(0.75)


def test_time_is_the_median_over_all_turns() -> None:
    """One slow turn, or one slow run, does not move the figure."""
    assert Timing("net", "x", ((0.002, 0.002, 0.5), (0.002, 0.004, 0.002))).milliseconds == pytest.approx(2)


def test_part_of_the_time_a_core_is_shared(tmp_path: Path) -> None:
    """A probe that takes longer than the shortest one met a neighbour; the real one times every core that is asked for."""
    assert shared_part([1.0, 1.05, 1.6, 1.02]) == 0.25
    seconds = core_probe(tmp_path, 1)()
    assert min(seconds) > 0
    assert 0 <= shared_part(seconds) < 1


def test_engine_without_a_model_leaves_its_cell_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """What a tool of another engine cannot quantize is missing from the row, and the ratio is to what is there."""
    row = _row(ort=4, ov=5, ours=1)
    print_timings(list(row.values()), {"net": [1.0]})
    printed = capsys.readouterr().out
    assert "OpenVINO int8" not in printed
    assert "0.25" in printed
    assert fastest_others(row) == ("ONNX Runtime float32", "ONNX Runtime float32")


def _relu_model(path: Path, height: int | str = 8) -> OwnModel:
    onnx.save(onnx_model([node("Relu", "x", "y")], inputs={"x": ("n", 3, height, 8)}, opset=11), path)
    return OwnModel(path)


def test_model_of_a_user_gets_fixed_shapes_and_their_samples(tmp_path: Path) -> None:
    """Every engine gets one sample at a time, from the given data, in an operator set that has scales per channel."""
    own = _relu_model(tmp_path / "mine.onnx")
    data = np.random.default_rng(0).normal(size=(20, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=data)
    files = NetworkFiles(own.name, tmp_path / "made", OwnModel(own.path, tmp_path / "samples.npz"))
    files.make_float_model()
    model = onnx.load(files.float_model)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 8, 8]
    assert model.opset_import[0].version == 13
    samples = read_samples(str(files.inputs))
    assert [s["x"].shape for s in samples] == [(1, 3, 8, 8)] * 16
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in samples]), data[:16])


def test_changed_model_of_a_user_is_read_again(tmp_path: Path) -> None:
    """The files of all engines are made of the model that is there now."""
    own = _relu_model(tmp_path / "mine.onnx")
    files = NetworkFiles(own.name, tmp_path / "made", own)
    files.make_float_model()
    files.openvino_int8.write_text("of the first model")
    _relu_model(own.path, height=4)
    files.make_float_model()
    assert read_samples(str(files.inputs))[0]["x"].shape == (1, 3, 4, 8)
    assert not files.openvino_int8.exists()


def test_model_of_a_user_that_cannot_be_compared_says_why(tmp_path: Path) -> None:
    """Open dimensions and data of another shape are refused before anything is made."""
    with pytest.raises(ModelError, match=r"\"h\".*is open.*--input-shapes"):
        _relu_model(tmp_path / "open.onnx", "h").read()
    np.savez(tmp_path / "wrong.npz", x=np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(DataError, match="another order"):
        OwnModel(_relu_model(tmp_path / "mine.onnx").path, tmp_path / "wrong.npz").read()


def test_masked_copy_reports_no_avx512(tmp_path: Path) -> None:
    """Every xgetbv is replaced by its AVX answer in place, bytes that only look like one stay, the original is untouched."""
    package = tmp_path / "engine"
    package.mkdir()
    read, look_alike = b"\x31\xc9\x0f\x01\xd0\xa8\x06", b"\x83\xe0\x0f\x01\xd0\x41"
    joined = b"\x89\xd5\x0f\x01\xd0\x89\xc0\x48\xc1\xe2\x20"
    (package / "kernels.so.1").write_bytes(read + look_alike + joined)
    (package / "__init__.py").write_text("")
    copy = without_avx512(package, tmp_path / "masked") / "engine"
    assert (copy / "kernels.so.1").read_bytes() == (
        b"\x31\xc9\xb0\x07\x90\xa8\x06" + look_alike + b"\x89\xd5\xb0\x07\x90\x89\xc0\x48\xc1\xe2\x20"
    )
    assert (copy / "__init__.py").exists()
    assert (package / "kernels.so.1").read_bytes() == read + look_alike + joined


def test_package_that_cannot_be_masked_is_refused(tmp_path: Path) -> None:
    """A library that asks in an unknown way would use AVX-512 unnoticed."""
    package = tmp_path / "engine"
    package.mkdir()
    (package / "kernels.so").write_bytes(b"\x90\x90")
    with pytest.raises(SystemExit, match="cannot mask"):
        without_avx512(package, tmp_path / "masked")
