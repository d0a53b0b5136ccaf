"""The experiments of the greedy paper, on the zoo's networks: one-shot against greedy with β = 0, tuned β, and lazy.

Source: Tsuji et al., "Greedy Search Algorithm for Mixed Precision in Post-Training Quantization …", ACML 2021, figures 4 to 6:
W6A6 on MobileNetV2, W4A8 and W4A4 on residual networks. All layers start in 8 bits; scales are powers of two, min-max per
channel for weights (equation 5), of least squared error per layer for activations (equation 6). Accuracy is top-1 as the paper
has it, on the search samples while searching; the curves are measured on other samples. Size is that of the weights.

For each curve the table shows the largest size reduction at no more than the paper's loss of accuracy, with the loss measured
there and its 95 % interval (paired with the float model), beside the paper's figures, which are of other networks and other
data; the mean loss over the whole curve, and how much less that is than one-shot's, with intervals; and where the lazy picks
part from the greedy ones.

    python -m benchmarks.paper_greedy [--search 200] [--held-out 400] [--experiments mobilenetv2:a6w6,resnet56:a8w4]
        [--journal FILE] [--json FILE] [--plot curves.png]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.machine import describe_machine
from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tvm_hquant import api
from tvm_hquant.cli.tables import print_table
from tvm_hquant.layers import Layer
from tvm_hquant.precision import Precision, parse_precision
from tvm_hquant.quantized_weights import QuantizedWeights, quantize_layer_weights
from tvm_hquant.rounding.weight_rounding import WeightRounding
from tvm_hquant.search.greedy import Descent, DescentStage, greedy_descent, lazy_descent, one_shot_descent
from tvm_hquant.search.problem import Assignment
from tvm_hquant.simulator.metrics import METRICS, MetricAccumulator
from tvm_hquant.simulator.program import Program
from tvm_hquant.statistics import Interval, bootstrap_interval

BASE = "a8w8"
POWER_OF_TWO = WeightRounding("power-of-two")


class PaperPoint(NamedTuple):
    """What the paper reports: size reduction, and the change of accuracy."""

    network: str
    reduction: float
    accuracy_change: float


PAPER = {
    "a6w6": PaperPoint("MobileNetV2, ImageNet", 0.801, -0.0110),
    "a8w4": PaperPoint("ResNet50, ImageNet", 0.847, -0.00626),
    "a4w4": PaperPoint("ResNet50, ImageNet", 0.835, -0.00414),
}
EXPERIMENTS = "mobilenetv2:a6w6,cifar10_resnet50:a8w4,cifar10_resnet50:a4w4,resnet56:a8w4,resnet56:a4w4"


@dataclass(frozen=True)
class Curve:
    """One method on one network; ``reductions`` and ``drops`` (top-1 lost, held-out samples) after every layer.

    ``mean`` is the drop averaged over the curve, which tells methods apart where single points do not; ``less_than_one_shot``
    is how much smaller it is than that of one-shot search, paired.
    """

    network: str
    precision: str
    method: str
    beta: float
    evaluations: int
    order: tuple[str, ...]
    reductions: tuple[float, ...]
    drops: tuple[Interval, ...]
    mean: Interval
    less_than_one_shot: Interval


def main() -> None:
    """Prints the table, and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", default=EXPERIMENTS)
    parser.add_argument("--search", type=int, default=200, help="samples to search with")
    parser.add_argument("--held-out", type=int, default=400, help="samples to measure with")
    parser.add_argument("--journal", type=Path, help="keeps evaluations there, so that a run that was stopped goes on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if not zoo_models():
        raise SystemExit(f"no networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    curves: list[Curve] = []
    with tempfile.TemporaryDirectory() as folder:
        journal = arguments.journal or Path(folder) / "journal.sqlite"
        for experiment in arguments.experiments.split(","):
            part, _, low = experiment.partition(":")
            model = next((name for name in zoo_models() if part in name), None)
            if model is None:
                raise SystemExit(f"no network of the zoo has {part} in its name: {', '.join(zoo_models())}")
            curves += run(ZooModel(model), low, arguments.search, arguments.held_out, journal)
            _print(curves)
            if arguments.json:
                found = {"machine": describe_machine(), "curves": [asdict(curve) for curve in curves]}
                arguments.json.write_text(json.dumps(found))
    if arguments.plot:
        _draw(curves, arguments.plot)


def run(model: ZooModel, low: str, searched: int, measured: int, journal: Path) -> list[Curve]:
    """The four methods on one network."""
    evaluation = model.evaluation()
    order = np.random.default_rng(0).permutation(evaluation.count)[: searched + measured]
    search, held_out = (evaluation.subset(sorted(part)) for part in (order[:searched], order[searched:]))
    session = api.open_session(str(model.path), "host", observer="power-of-two")
    session.use_journal(journal)
    session.calibrate(model.calibration())
    known: dict[tuple[str, int], QuantizedWeights] = {}

    def weights(layer: Layer, precision: Precision) -> QuantizedWeights | None:
        if not layer.is_anchor or not precision.is_integer:
            return None
        if (layer.name, precision.weight_bits) not in known:
            known[layer.name, precision.weight_bits] = quantize_layer_weights(layer, precision, POWER_OF_TWO)
        return known[layer.name, precision.weight_bits]

    def program(plan: Assignment) -> Program:
        precisions = session.all_precisions({name: parse_precision(p) for name, p in plan.items()})
        return session.builder.program(precisions, session.scales(precisions.values()), weights)

    top1 = METRICS["top1"]
    asked = 0

    def losses(plans: Sequence[Assignment]) -> list[float]:
        nonlocal asked
        asked += len(plans)
        return [score.loss for score in session.evaluate([program(p) for p in plans], search, top1, "searching")]

    layers = {layer.name: layer for layer in session.graph.anchors}
    base, lower = dict.fromkeys(layers, BASE), dict.fromkeys(layers, low)
    accuracy = session.evaluate([session.float_program], search, top1, "float32")[0].value
    curves = []
    means: list[npt.NDArray[np.float64]] = []
    total = 32 * sum(layer.parameter_count for layer in layers.values())
    for method in ("one-shot", "greedy, β = 0", "greedy, tuned β", "lazy greedy, β = 0"):
        asked = 0
        stage = DescentStage(base, lower, losses, accuracy, {n: l.parameter_count for n, l in layers.items()})
        descent = _descend(method, stage)
        plans = [stage.plan(frozenset(descent.order[: k + 1])) for k in range(len(descent.order))]
        scores = session.evaluate([program(plan) for plan in plans], held_out, top1, "measuring")
        sizes = [
            sum(layers[n].parameter_count * parse_precision(p).weight_bits for n, p in plan.items()) for plan in plans
        ]
        means.append(_mean_drops(scores))
        curves.append(
            Curve(
                model.title,
                low,
                method,
                descent.beta,
                asked,
                descent.order,
                tuple(1.0 - size / total for size in sizes),
                tuple(score.loss_interval() for score in scores),
                _interval(means[-1]),
                _interval(means[0] - means[-1]),
            )
        )
        print(f"{model.title}, {low}: {method}, {asked} evaluations", flush=True)
    return curves


def _mean_drops(scores: Sequence[MetricAccumulator]) -> npt.NDArray[np.float64]:
    """Top-1 lost on each sample, averaged over plans that were scored on the same samples."""
    drops = np.array([[score.reference - score.value for score in own.scores] for own in scores], np.float64)
    return np.asarray(drops.mean(axis=0))


def _interval(values: npt.NDArray[np.float64]) -> Interval:
    return bootstrap_interval(values, lambda rows: float(rows.mean()))


def _descend(method: str, stage: DescentStage) -> Descent:
    if method == "one-shot":
        return one_shot_descent(stage)
    if method.startswith("lazy"):
        return lazy_descent(stage, 0.0)
    return greedy_descent(stage, None if "tuned" in method else 0.0)


def smallest_within(curve: Curve, drop: float) -> tuple[float, Interval] | None:
    """The largest size reduction on a curve at no more than a loss of accuracy, and the loss there."""
    within = [(r, d) for r, d in zip(curve.reductions, curve.drops, strict=True) if d.estimate <= drop]
    return max(within, default=None)


def _parting(curves: Sequence[Curve], curve: Curve) -> str:
    """Where lazy picks part from greedy ones."""
    if not curve.method.startswith("lazy"):
        return ""
    exact = next(
        c for c in curves if (c.network, c.precision, c.method) == (curve.network, curve.precision, "greedy, β = 0")
    )
    different = [k for k, (a, b) in enumerate(zip(exact.order, curve.order, strict=True), 1) if a != b]
    return (
        f"{len(different)} of {len(curve.order)} picks differ, first at {different[0]}" if different else "same picks"
    )


def _print(curves: Sequence[Curve]) -> None:
    rows = []
    for curve in curves:
        paper = PAPER[curve.precision]
        ours = smallest_within(curve, -paper.accuracy_change)
        rows.append(
            (
                curve.network,
                curve.precision,
                curve.method,
                f"{curve.beta:.4f}",
                str(curve.evaluations),
                "none" if ours is None else f"{ours[0]:.1%} at {_change(ours[1])}",
                f"{paper.reduction:.1%} at {paper.accuracy_change:+.2%} ({paper.network})",
                f"{_change(curve.drops[-1])} at {curve.reductions[-1]:.1%}",
                _change(curve.mean),
                _signed(curve.less_than_one_shot),
                _parting(curves, curve),
            )
        )
    columns = ("network", "smaller", "method", "β", "evaluations", "size reduction at the paper's loss", "paper",
               "all layers", "mean over the curve", "better than one-shot", "")  # fmt: skip
    print_table(columns, rows)


def _change(drop: Interval) -> str:
    """A drop as a change of accuracy."""
    return _signed(Interval(-drop.estimate, -drop.high, -drop.low))


def _signed(values: Interval) -> str:
    return f"{values.estimate:+.2%} ({values.low:+.2%} … {values.high:+.2%})"


def _draw(curves: Sequence[Curve], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    experiments = list(dict.fromkeys((c.network, c.precision) for c in curves))
    figure = Figure(figsize=(6, 3.5 * len(experiments)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (network, precision) in enumerate(experiments, 1):
        axes = figure.add_subplot(len(experiments), 1, number)
        for curve in curves:
            if (curve.network, curve.precision) == (network, precision):
                reductions = [100 * r for r in curve.reductions]
                axes.plot(reductions, [-100 * drop.estimate for drop in curve.drops], marker=".", label=curve.method)
        axes.set_xlabel("size reduction, %")
        axes.set_ylabel("change of top-1, points")
        axes.set_title(f"{network}, {precision}")
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
