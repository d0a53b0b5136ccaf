"""Draws a Pareto front."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm_hquant.front import Front, FrontPoint

_AXES = {"latency": "latency, ms", "size": "weights, MB", "macs": "share of multiply-accumulates above 8 bits"}

_SMOOTH = {"top1": "divergence, nats", "agreement": "divergence, nats", "sqnr": "mean squared error"}


def draw_front(front: Front, path: Path) -> None:
    """What is lost, over what was minimized, on search and held-out samples; PNG or SVG by the suffix.

    Above the loss with 95 % intervals, for top-1 with the drop that the search expects; below, on a logarithmic scale, the
    divergence from the float model, where that is not the loss itself.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    smooth = _SMOOTH.get(front.metric)
    figure = Figure(figsize=(7, 7 if smooth else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(2 if smooth else 1, 1, sharex=True, squeeze=False)[:, 0]
    costs = [_cost(front, point) for point in front.points]
    for label, losses, intervals in (
        ("search samples", [p.loss for p in front.points], [p.loss_interval for p in front.points]),
        ("held-out samples", [p.holdout_loss for p in front.points], [p.holdout_interval for p in front.points]),
    ):
        known = [(c, l, i) for c, l, i in zip(costs, losses, intervals, strict=True) if l is not None and i is not None]
        # A loss without end is no point; an interval without end is drawn as long as the largest loss.
        shown = [(c, l, i) for c, l, i in known if math.isfinite(l)]
        largest = max((l for _, l, _ in shown), default=0.0)
        errors = [
            [max(0.0, l - i[0]) for _, l, i in shown],
            [max(0.0, (i[1] if math.isfinite(i[1]) else largest) - l) for _, l, i in shown],
        ]
        axes.errorbar([c for c, _, _ in shown], [l for _, l, _ in shown], errors, label=label, marker="o", capsize=2)
    if front.metric == "top1":
        axes.plot(costs, [point.expected_loss for point in front.points], color="black", label="expected by the search")
    axes.axhline(front.max_drop, linestyle="--", color="gray", label=f"budget {front.max_drop:g}")
    axes.plot(
        [_cost(front, front.best)], [front.best.loss], marker="*", markersize=14, color="black", label="best.json"
    )
    axes.set_ylabel(f"loss ({front.metric})")
    axes.set_title(f"{front.strategy}, {front.objective}")
    axes.legend()
    for lower in below:
        lower.plot(costs, [p.divergence for p in front.points], label="search samples", marker="o")
        lower.plot(costs, [p.holdout_divergence for p in front.points], label="held-out samples", marker="o")
        lower.set_yscale("log", nonpositive="mask")
        lower.set_ylabel(smooth)
        lower.legend()
    (below or [axes])[-1].set_xlabel(_AXES[front.objective])
    figure.savefig(path, dpi=120)


def _cost(front: Front, point: FrontPoint) -> float:
    if front.objective == "latency":
        return point.latency_ms
    return point.bytes / 1e6 if front.objective == "size" else 1.0 - point.int8_mac_share
