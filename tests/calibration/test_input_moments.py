"""The rounding of weights rests on these moments: protects that they are those of the columns."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_hquant.calibration import input_moments
from tvm_hquant.calibration.input_moments import InputMomentsCollector
from tvm_hquant.errors import DataError
from tvm_hquant.layers import Layer
from tvm_hquant.operators import Conv2D, Dense, Window
from tvm_hquant.rounding.output_error import regularized


def convolution(groups: int, window: Window) -> Layer:
    return Layer("l", "l", Conv2D((1, 7, 6, 12), 24, window, groups), ("x",))


def columns_of(x: np.ndarray, window: Window, groups: int) -> np.ndarray:
    """[groups, positions, columns] by plain loops over positions."""
    (kh, kw), (sh, sw), (dh, dw) = window.kernel, window.strides, window.dilation
    top, left, bottom, right = window.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    height, width = window.output_size(x.shape[1], x.shape[2])
    rows = []
    for n in range(len(x)):
        for i in range(height):
            for j in range(width):
                patch = padded[n, i * sh :, j * sw :][: (kh - 1) * dh + 1 : dh, : (kw - 1) * dw + 1 : dw]
                rows.append(patch.transpose(2, 0, 1).reshape(groups, -1))
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize(
    "window", [Window((1, 1)), Window((3, 3), (2, 1), (1, 1, 1, 1)), Window((3, 2), (1, 2), (0, 1, 2, 0), (2, 1))]
)
def test_moments_of_convolutions(groups: int, window: Window) -> None:
    """All positions of small tensors count once, padding included, in the order of the weights."""
    rng = np.random.default_rng(0)
    collector = InputMomentsCollector([convolution(groups, window)])
    arrays = [rng.normal(1.0, 1.0, size=(1, 7, 6, 12)).astype(np.float32) for _ in range(3)]
    for array in arrays:
        collector.observe("x", array)
        collector.observe("other", array)
    rows = np.concatenate([columns_of(array, window, groups) for array in arrays], axis=1).astype(np.float64)
    moments = collector.moments()["l"]
    assert moments.count == rows.shape[1]
    np.testing.assert_allclose(moments.means, rows.mean(axis=1), atol=1e-6)
    for group, covariance in enumerate(moments.covariances[0]):
        np.testing.assert_allclose(covariance, np.cov(rows[group].T, bias=True), atol=1e-5)


def test_positions_of_large_tensors_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many samples as it takes every position is met, none twice before."""
    monkeypatch.setattr(input_moments, "POSITIONS_PER_SAMPLE", 16)
    collector = InputMomentsCollector([Layer("l", "l", Dense(64, 64, 5), ("x",))])
    for _ in range(4):
        collector.observe("x", np.eye(64, dtype=np.float32))
    np.testing.assert_allclose(collector.moments()["l"].means, np.full((1, 64), 1 / 64))


def test_layers_with_many_columns_are_cut_at_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The diagonal blocks of the whole covariance, of whole input channels each."""
    monkeypatch.setattr(input_moments, "LARGEST_BLOCK", 50)
    monkeypatch.setattr(input_moments, "BLOCK_OF_LARGE_LAYERS", 50)
    window = Window((3, 3), (1, 1), (1, 1, 1, 1))
    x = np.random.default_rng(0).normal(size=(1, 7, 6, 12)).astype(np.float32)
    collector = InputMomentsCollector([convolution(1, window)])
    collector.observe("x", x)
    moments = collector.moments()["l"]
    whole = np.cov(columns_of(x, window, 1)[0].astype(np.float64).T, bias=True)
    assert [c.shape[1] for c in moments.covariances] == [45, 45, 18]
    np.testing.assert_allclose(moments.covariances[1][0], whole[45:90, 45:90], atol=1e-5)


def test_means_that_are_large_against_the_spread() -> None:
    """A difference of second moments in float32 would be noise, and indefinite: rounding takes the matrix's square root."""
    layer = Layer("head", "head", Dense(48, 64, 8), ("x",))
    collector = InputMomentsCollector([layer])
    rng = np.random.default_rng(0)
    arrays = [(1e4 + rng.normal(size=(48, 1)) + 0.1 * rng.normal(size=(48, 64))).astype(np.float32) for _ in range(5)]
    for array in arrays:
        collector.observe("x", array)
    moments = collector.moments()["head"]
    exact = np.cov(np.concatenate(arrays).astype(np.float64).T, bias=True)
    np.testing.assert_allclose(moments.covariances[0][0], exact, rtol=0, atol=1e-3)
    assert np.linalg.eigvalsh(regularized(moments.covariances[0], moments.count)).min() > 0


def test_one_row_has_no_spread() -> None:
    layer = Layer("head", "head", Dense(1, 64, 8), ("x",))
    collector = InputMomentsCollector([layer])
    collector.observe("x", np.random.default_rng(0).normal(1e4, 1e3, (1, 64)).astype(np.float32))
    assert not collector.moments()["head"].covariances[0].any()


def test_variances_beyond_float32() -> None:
    collector = InputMomentsCollector([Layer("head", "head", Dense(2, 4, 8), ("x",))])
    collector.observe("x", np.array([[1e25, 0, 0, 0], [-1e25, 0, 0, 0]], np.float32))
    with pytest.raises(DataError, match=r"layer head: .* varies by more than"):
        collector.moments()
