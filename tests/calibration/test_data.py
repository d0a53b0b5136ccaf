"""Data sources: what is read equals what was saved, and whatever does not fit the model is said clearly."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from tvm_hquant.calibration import DataSource, count_samples, open_data
from tvm_hquant.calibration.array_files import open_npz
from tvm_hquant.errors import DataError

SIGNATURE = {"input": ((1, 3, 4, 4), "float32")}
TWO_INPUTS = {"image": ((1, 3, 4, 4), "float32"), "tokens": ((1, 5), "int64")}


def images(count: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 4, 4)).astype(np.float32)


def stacked(source: DataSource, name: str = "input") -> np.ndarray:
    return np.concatenate([sample.inputs[name] for sample in source])


@settings(max_examples=40, deadline=None)
@given(
    array=st_numpy.arrays(
        st.sampled_from([np.dtype(d) for d in ("<f4", ">f4", "<f8", "u1", "<i2", "?")]),
        st_numpy.array_shapes(min_dims=1, max_dims=4, max_side=5),
        elements={"allow_nan": False, "allow_infinity": False},
    ),
    compressed=st.booleans(),
    fortran_order=st.booleans(),
)
def test_streamed_npz_equals_numpy_load(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, compressed: bool, fortran_order: bool
) -> None:
    """The reader of single rows agrees with numpy for every layout, dtype and compression."""
    path = tmp_path_factory.mktemp("npz") / "data.npz"
    saved = np.asfortranarray(array) if fortran_order else array
    (np.savez_compressed if compressed else np.savez)(path, x=saved)
    member = open_npz(path)["x"]
    rows = list(member.rows())
    with np.load(path) as loaded:
        np.testing.assert_array_equal(np.array(rows), loaded["x"])
    assert (member.shape, member.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(member.whole(), array)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_memory_does_not_grow_with_samples(tmp_path: Path, write: Callable[..., None]) -> None:
    """A long file is never held in memory as a whole."""
    path = tmp_path / "data.npz"
    write(path, input=np.zeros((3000, 3, 32, 32), np.uint8))
    source = open_data(path, {"input": ((1, 3, 32, 32), "float32")})
    tracemalloc.start()
    count = sum(1 for _ in source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == source.count == 3000
    assert peak < 2_000_000 < 3000 * 3 * 32 * 32


def test_npz_gives_samples_and_labels_each_time(tmp_path: Path) -> None:
    """A source can be walked through repeatedly, and samples keep their labels."""
    path = tmp_path / "data.npz"
    np.savez(path, input=images(), labels=np.arange(6, dtype=np.int16)[:, np.newaxis])
    source = open_data(str(path), SIGNATURE)
    for _ in range(2):
        np.testing.assert_array_equal(stacked(source), images())
        assert [sample.label for sample in source] == list(range(6))
    assert (source.count, source.has_labels, source.name) == (6, True, str(path))
    first = next(iter(source)).inputs["input"]
    assert first.shape == (1, 3, 4, 4)
    assert first.dtype == np.float32


def test_npz_with_several_inputs(tmp_path: Path) -> None:
    """Inputs of one sample stay together, each with its own dtype."""
    path = tmp_path / "data.npz"
    tokens = np.arange(30, dtype=np.int32).reshape(6, 5)
    np.savez_compressed(path, tokens=tokens, image=images())
    source = open_data(path, TWO_INPUTS)
    np.testing.assert_array_equal(stacked(source, "tokens"), tokens)
    np.testing.assert_array_equal(stacked(source, "image"), images())
    assert next(iter(source)).inputs["tokens"].dtype == np.int64
    assert not source.has_labels


def test_npy_file(tmp_path: Path) -> None:
    """A plain array serves a model with one input, and none with two."""
    path = tmp_path / "data.npy"
    np.save(path, images())
    np.testing.assert_array_equal(stacked(open_data(path, SIGNATURE)), images())
    with pytest.raises(DataError, match="'image', 'tokens'"):
        open_data(path, TWO_INPUTS)


def test_directory_is_read_in_sorted_order(tmp_path: Path) -> None:
    """Files of a directory follow each other by name, lone samples and batches alike; other files are left alone."""
    x = images(6)
    np.save(tmp_path / "b.npy", x[2:5])
    np.save(tmp_path / "a.npy", x[:2])
    np.savez(tmp_path / "c.npz", input=x[5])
    np.save(tmp_path / "labels.npy", np.array([5, 4, 3, 2, 1, 0]))
    (tmp_path / "README.txt").write_text("not data")
    source = open_data(tmp_path, SIGNATURE)
    np.testing.assert_array_equal(stacked(source), x)
    assert [sample.label for sample in source] == [5, 4, 3, 2, 1, 0]
    assert source.count == 6


@pytest.mark.parametrize(
    "data",
    [
        images(),
        {"input": images(), "labels": np.arange(6)},
        list(images()),
        [x[np.newaxis] for x in images()],
        [images()[:4], images()[4:]],
        [{"input": x} for x in images()],
        [({"input": x}, 3) for x in images()],
        [(x, np.int64(3)) for x in images()],
        [(images()[:4], [0, 1, 2, 3]), (images()[4:], np.array([4, 5]))],
        lambda: iter(images()),
        (x for x in images()),
    ],
    ids=lambda data: type(data).__name__,
)
def test_python_data(data: Any) -> None:
    """Arrays, dicts, pairs with labels, batches, functions and generators all give the same samples, twice."""
    source = open_data(data, SIGNATURE)
    for _ in range(2):
        np.testing.assert_array_equal(stacked(source), images())
    assert count_samples(source) == 6
    assert all((sample.label is not None) == source.has_labels for sample in source)


def test_sources_pass_through_and_to_other_processes(tmp_path: Path) -> None:
    """An opened source is taken as it is, and one made of files can be sent to a process."""
    np.save(tmp_path / "x.npy", images())
    source = open_data(tmp_path / "x.npy", SIGNATURE)
    assert open_data(source, SIGNATURE) is source
    np.testing.assert_array_equal(stacked(pickle.loads(pickle.dumps(source))), images())


@pytest.mark.parametrize(
    ("dtype", "array"),
    [
        ("float32", np.full((2, 3), 0.1)),
        ("float32", np.array([[1, 2, 2**24]])),
        ("float16", np.full((2, 3), 0.1, np.float32)),
        ("bfloat16", np.full((2, 3), 0.1, np.float32)),
        ("uint8", np.array([[0.0, 7.0, 255.0]])),
        ("float32", np.array([[True, False, True]])),
    ],
)
def test_allowed_conversions(dtype: str, array: np.ndarray) -> None:
    """Floats are rounded to the model's float; everything else is taken where it is exact."""
    found = stacked(open_data(array, {"x": ((1, 3), dtype)}), "x")
    assert found.dtype.name == dtype
    np.testing.assert_allclose(found.astype(np.float64), array.astype(np.float64), rtol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "array"),
    [
        ("float32", np.array([[1, 2, 2**24 + 1]])),
        ("float32", np.array([[1.0, 2.0, 1e39]])),
        ("uint8", np.array([[0.5, 1.0, 2.0]])),
        ("uint8", np.array([[0, 1, 256]])),
        ("int8", np.array([[0, 1, 200]], np.uint8)),
    ],
)
def test_inexact_conversions_are_refused(dtype: str, array: np.ndarray) -> None:
    """No value is changed silently beyond float rounding."""
    with pytest.raises(DataError, match=f"array 'x', sample 0, holds .* that {dtype}"):
        open_data(array, {"x": ((1, 3), dtype)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"picture": images()}, "found the arrays 'picture', but the model has the inputs 'input'"),
        ({"input": images(), "label": np.arange(6)}, "'input', 'label'"),
        ({"input": images().transpose(0, 2, 3, 1)}, r"shape \[6, 4, 4, 3\].*samples of shape \[3, 4, 4\].*transpose"),
        ({"input": images()[..., :2]}, r"shape \[6, 3, 4, 2\]"),
        ({"input": images().astype(np.complex64)}, "dtype complex64"),
        ({"input": np.full((6, 3, 4, 4), "a")}, "dtype <U1"),
        ({"input": images()[:0]}, "holds no samples"),
        ([], "holds no samples"),
        ({"input": images(), "labels": np.arange(5)}, r"labels have shape \[5\], but there are 6 samples"),
        ({"input": images(), "labels": np.arange(6.0)}, "labels have dtype float64"),
        ({"input": images(), "labels": np.eye(6, dtype=int)}, "argmax"),
        ({"input": images(), "labels": np.arange(6) - 1}, "label -1 is negative"),
        (7, "a int is no source of samples"),
        ([(images()[0], 1, 2)], "tuple of 3"),
        ([[[1.0], [2.0, 3.0]]], "no array of numbers"),
    ],
)
def test_data_that_does_not_fit_is_refused(data: Any, message: str) -> None:
    """Each mistake has a message that says what was found and what is expected."""
    with pytest.raises(DataError, match=message):
        open_data(data, SIGNATURE)


def test_inputs_with_different_numbers_of_samples() -> None:
    """Inputs that do not belong together are refused before anything is run."""
    with pytest.raises(DataError, match="'image' 6, 'tokens' 4"):
        open_data({"image": images(), "tokens": np.zeros((4, 5), np.int64)}, TWO_INPUTS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_array_and_sample(tmp_path: Path, value: float) -> None:
    """The one bad sample of a file is named."""
    x = images()
    x[4, 0, 1, 2] = value
    np.savez(tmp_path / "data.npz", input=x)
    source = open_data(tmp_path / "data.npz", SIGNATURE)
    with pytest.raises(DataError, match=r"data\.npz: array 'input', sample 4, holds NaN or infinity"):
        list(source)


def test_mixed_labels_are_refused(tmp_path: Path) -> None:
    """A set with labels for some samples only cannot be evaluated by labels: say so instead of guessing."""
    with pytest.raises(DataError, match="either all samples have labels or none"):
        list(open_data([(images()[0], 1), images()[1]], SIGNATURE))
    np.savez(tmp_path / "a.npz", input=images(), labels=np.arange(6))
    np.savez(tmp_path / "b.npz", input=images())
    with pytest.raises(DataError, match=r"b\.npz: has no labels"):
        open_data(tmp_path, SIGNATURE)
    np.save(tmp_path / "labels.npy", np.arange(12))
    with pytest.raises(DataError, match=r"labels\.npy: the other files"):
        open_data(tmp_path, SIGNATURE)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    """Files that are not there, not arrays, or hold objects are told apart."""
    with pytest.raises(DataError, match="no such file"):
        open_data(tmp_path / "missing.npz", SIGNATURE)
    with pytest.raises(DataError, match="no such file"):
        open_data(tmp_path / "missing", SIGNATURE)
    with pytest.raises(DataError, match=r"no \.npz or \.npy file"):
        open_data(tmp_path, SIGNATURE)
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"neither a \.npz nor a \.npy"):
        open_data(tmp_path / "data.csv", SIGNATURE)
    (tmp_path / "text.npz").write_text("this is no archive")
    with pytest.raises(DataError, match=r"text\.npz: damaged, or not a file written by numpy"):
        open_data(tmp_path / "text.npz", SIGNATURE)
    np.save(tmp_path / "objects.npy", np.array([{}, None], object), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        open_data(tmp_path / "objects.npy", SIGNATURE)


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.95])
def test_truncated_files_are_damaged(tmp_path: Path, suffix: str, kept: float) -> None:
    """A download that broke off gives one clear error, at opening or while reading, wherever it broke off."""
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, input=images(50))
    else:
        np.save(path, images(50))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match="damaged"):
        list(open_data(path, SIGNATURE))


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_flipped_bits_are_noticed(tmp_path: Path, write: Callable[..., None]) -> None:
    """The checksums of a .npz are compared although it is read in pieces."""
    path = tmp_path / "data.npz"
    write(path, input=images(50))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged"):
        list(open_data(path, SIGNATURE))


@pytest.mark.parametrize("shape", [(1,), ()])
def test_inputs_of_low_rank(shape: tuple[int, ...]) -> None:
    """One number per sample works, with and without a batch axis in the model."""
    samples = list(open_data(np.arange(4, dtype=np.float32), {"x": (shape, "float32")}))
    assert [sample.inputs["x"].shape for sample in samples] == [shape] * 4
    assert [float(sample.inputs["x"].sum()) for sample in samples] == [0.0, 1.0, 2.0, 3.0]


def test_input_called_labels_is_an_input(tmp_path: Path) -> None:
    """A model input of that name wins over the meaning of the name."""
    np.savez(tmp_path / "data.npz", labels=images())
    source = open_data(tmp_path / "data.npz", {"labels": ((1, 3, 4, 4), "float32")})
    assert not source.has_labels
    np.testing.assert_array_equal(stacked(source, "labels"), images())
