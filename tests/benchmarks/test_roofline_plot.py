"""The roofline picture: what it draws comes from the profile alone."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.roofline_plot import draw, peaks


def _profile(**changes: Any) -> dict[str, Any]:
    kernel = {"operator": "conv2d", "precision": "a8w8", "operations": 4000, "bytes": 100, "microseconds": 2.0,
              "giga_operations_per_second": 2.0, "bound": "compute", "possible_microseconds": 1.0}  # fmt: skip
    slower = {**kernel, "operator": "depthwise_conv2d", "possible_microseconds": 2.0}
    return {
        "model": "net",
        "target": "host",
        "threads": 1,
        "bandwidth_gb_per_s": 20.0,
        "kernels": [kernel, slower],
        **changes,
    }


def test_peak_of_a_precision_is_its_fastest_unit() -> None:
    """4000 operations in a microsecond are 4 · 10⁹ a second."""
    assert peaks([_profile()]) == {"a8w8": 4.0}


def test_picture_is_written(tmp_path: Any) -> None:
    """With the name of the network in it."""
    pytest.importorskip("matplotlib", reason="an extra of benchmarks")
    draw({"net a8w8": _profile()}, tmp_path / "roofline.svg")
    assert "<!-- net a8w8 -->" in (tmp_path / "roofline.svg").read_text()


def test_one_roofline_for_one_machine() -> None:
    """Points of two targets under one roof would mislead."""
    pytest.importorskip("matplotlib", reason="an extra of benchmarks")
    with pytest.raises(SystemExit, match="different targets"):
        draw({"one": _profile(), "two": _profile(threads=2)}, None)  # type: ignore[arg-type]
