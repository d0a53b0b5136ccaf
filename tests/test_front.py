"""What is written of a front can be read and drawn whatever was measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from tvm_hquant.front import Front, FrontPoint
from tvm_hquant.front_plot import draw_front
from tvm_hquant.json_text import json_text

POINT = FrontPoint(
    "plan_00.json", 10.0, 0.2, 0.2, (0.1, 0.3), 0.25, (0.2, 0.4), 0.25, 0.2, 0.25, 1.0, "predicted", 1000, 0.9, 12
)
BROKEN = replace(
    POINT, loss=math.inf, loss_interval=(0.4, math.inf), divergence=math.inf, holdout_loss=None, holdout_interval=None
)


def refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def test_infinite_losses_are_null() -> None:
    """A plan whose output had NaN has an infinite loss, which JSON cannot say; a reader outside Python must not fail on it."""
    read: Any = json.loads(json_text([asdict(BROKEN), asdict(POINT)]), parse_constant=refuse)
    assert read[0]["loss"] is None
    assert read[0]["loss_interval"] == [0.4, None]
    assert read[0]["holdout_interval"] is None, "not measured"
    assert read[1] == json.loads(json.dumps(asdict(POINT)))


def test_plots_leave_infinite_losses_out(tmp_path: Path) -> None:
    """One broken plan does not keep the others from being seen."""
    points = (BROKEN, replace(POINT, holdout_interval=(0.2, math.inf)))
    draw_front(Front(points, points[1], True, 0.5, "kl", "latency", "ilp"), tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000
