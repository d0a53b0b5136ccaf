"""Draws a Pareto front."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm_hquant.front import Front, FrontPoint

_AXES = {"latency": "latency, ms", "size": "weights, MB", "macs": "share of multiply-accumulates above 8 bits"}


def draw_front(front: Front, path: Path) -> None:
    """Loss on search and held-out samples, with 95 % intervals, over what was minimized; PNG or SVG by the suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    costs = [_cost(front, point) for point in front.points]
    for label, losses, intervals in (
        ("search samples", [p.loss for p in front.points], [p.loss_interval for p in front.points]),
        ("held-out samples", [p.holdout_loss for p in front.points], [p.holdout_interval for p in front.points]),
    ):
        shown = [(c, l, i) for c, l, i in zip(costs, losses, intervals, strict=True) if l is not None and i is not None]
        errors = [[max(0.0, l - i[0]) for _, l, i in shown], [max(0.0, i[1] - l) for _, l, i in shown]]
        axes.errorbar([c for c, _, _ in shown], [l for _, l, _ in shown], errors, label=label, marker="o", capsize=2)
    axes.axhline(front.max_drop, linestyle="--", color="gray", label=f"budget {front.max_drop:g}")
    axes.plot(
        [_cost(front, front.best)], [front.best.loss], marker="*", markersize=14, color="black", label="best.json"
    )
    axes.set_xlabel(_AXES[front.objective])
    axes.set_ylabel(f"loss ({front.metric})")
    axes.set_title(f"{front.strategy}, {front.objective}")
    axes.legend()
    figure.savefig(path, dpi=120)


def _cost(front: Front, point: FrontPoint) -> float:
    if front.objective == "latency":
        return point.latency_ms
    return point.bytes / 1e6 if front.objective == "size" else 1.0 - point.int8_mac_share
