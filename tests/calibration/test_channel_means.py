"""Bias correction rests on these means: protects that they are those of all samples, channel by channel."""

from __future__ import annotations

import numpy as np

from tvm_hquant.calibration.channel_means import ChannelMeans


def test_means_over_positions_and_samples() -> None:
    """Samples may differ in their number of positions; every position counts once."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, h, 3, 5)).astype(np.float32) for h in (2, 4, 7)]
    means = ChannelMeans({"t"})
    for array in arrays:
        means.observe("t", array)
        means.observe("other", array)
    rows = np.concatenate([a.reshape(-1, 5) for a in arrays]).astype(np.float64)
    assert set(means.means()) == {"t"}
    np.testing.assert_allclose(means.means()["t"], rows.mean(axis=0), atol=1e-6)
