"""Draws what ``hquant profile --json`` measured: every kernel of a network under the roofline of its target.

A point is a kernel; its area is its share of the time. The slope is the target's memory bandwidth, which bounds only what no
cache keeps; the level lines are the rates of its units in the precisions that occur.

    pip install -e '.[benchmarks]'
    hquant profile resnet50 --json resnet50.json
    python -m benchmarks.roofline_plot resnet50.json [squeezenet.json …] -o roofline.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=Path("roofline.svg"))
    arguments = parser.parse_args()
    draw({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in arguments.profiles}, arguments.output)


def require_matplotlib() -> None:
    """Before anything is measured that could not be drawn.

    Raises:
        SystemExit: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise SystemExit("matplotlib is missing: pip install -e '.[benchmarks]'")


def draw(named: Mapping[str, dict[str, Any]], path: Path) -> None:
    """A picture of one or several profiles, by name, for the same target and number of threads.

    Raises:
        SystemExit: matplotlib is missing, or the profiles are of different targets.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    profiles = list(named.values())
    machines = {(p["target"], p["threads"]) for p in profiles}
    if len(machines) > 1:
        raise SystemExit(f"profiles of different targets or threads do not fit one roofline: {sorted(machines)}")
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    for name, profile in named.items():
        points = [k for k in profile["kernels"] if k["operations"] and k["bytes"]]
        total = sum(k["microseconds"] for k in profile["kernels"])
        axes.scatter(
            [k["operations"] / k["bytes"] for k in points],
            [k["giga_operations_per_second"] for k in points],
            [4000 * k["microseconds"] / total for k in points],
            alpha=0.5,
            label=name,
        )
    bandwidth = profiles[0]["bandwidth_gb_per_s"]
    for precision, rate in peaks(profiles).items():
        axes.axhline(rate, linewidth=0.8, color="black")
        axes.annotate(precision, (axes.get_xlim()[1], rate), ha="right", va="bottom")
    lower, upper = axes.get_xlim()
    axes.plot([lower, upper], [lower * bandwidth, upper * bandwidth], "--", linewidth=0.8, color="black")
    axes.set_xlim(lower, upper)
    axes.set_xlabel("operations per byte of activations and weights")
    axes.set_ylabel("10⁹ operations per second")
    axes.set_title(f"{profiles[0]['target']}, {profiles[0]['threads']} thread(s); dashed: {bandwidth:g} GB/s of memory")
    axes.legend(markerscale=0.4)
    figure.savefig(path)


def peaks(profiles: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The highest rate that the target allows any layer with weights, in 10⁹ operations a second, by precision."""
    found: dict[str, float] = {}
    for kernel in (k for p in profiles for k in p["kernels"] if "conv2d" in k["operator"] or k["operator"] == "dense"):
        if kernel["bound"] == "compute":
            rate = kernel["operations"] / kernel["possible_microseconds"] / 1e3
            found[kernel["precision"]] = max(rate, found.get(kernel["precision"], 0.0))
    return found


if __name__ == "__main__":
    main()
