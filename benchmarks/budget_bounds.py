"""How often does a plan that keeps a budget on few samples lose more than the budget?

Plans are drawn at random, from precisions of few bits, and scored on all evaluation samples of a network. Then evaluation
samples are drawn, of which a search sees one half, and the smallest plan is taken that keeps the budget on them by one of
four rules:

* *measured*: the drop in top-1 that is measured;
* *expected*: the expected drop (:mod:`tvm_hquant.search.expected_drop`);
* *percentile*: the 90th percentile of the expected drop over resamples;
* *bound*: what ``ilp`` asks for: the expected drop on two thirds of the samples, on the others, and its upper bound on all
  (:meth:`tvm_hquant.search.joint_losses.PlanScores.upper_bound`).

The table shows, over many draws, how large the plans are (8 bits everywhere being 1), what they lose on all samples, as
measured and as expected, and how often that is more than the budget. Where a network has few samples, those drawn are many
of all.

    python -m benchmarks.budget_bounds [--models kws,resnet8] [--samples 2000] [--plans 60] [--max-drop 0.01]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.suffix_precisions import random_plans
from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tvm_hquant import api
from tvm_hquant.cli.tables import print_table
from tvm_hquant.cost.predicted import weight_bytes
from tvm_hquant.precision import A8W8, parse_precision
from tvm_hquant.search.expected_drop import drop_by_margins
from tvm_hquant.search.joint_losses import PlanScores, score_programs
from tvm_hquant.simulator.metrics import METRICS
from tvm_hquant.statistics import bootstrap_interval

EVALUATION_SAMPLES = (100, 200, 400)

Rule = Callable[[PlanScores, float], bool]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="kws,resnet8", help="parts of names, with commas between")
    parser.add_argument("--samples", type=int, default=2000, help="samples that say what is true, at most")
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--precisions", default="a8w3,a8w4,a8w6,a8w8")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--target", default="host")
    arguments = parser.parse_args()
    if not zoo_models():
        raise SystemExit(f"no networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    rows: list[tuple[str, ...]] = []
    for name in zoo_models():
        if any(part in name for part in arguments.models.split(",")):
            rows += simulated(ZooModel(name), arguments)
    columns = ("network", "evaluation samples", "rule", "size", "loses, measured", "expected", "more than the budget, measured",
               "expected")  # fmt: skip
    print_table(columns, rows)


def simulated(model: ZooModel, arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """Rows of one network, one for each number of samples and rule."""
    session = api.open_session(str(model.path), arguments.target)
    session.calibrate(model.calibration())
    evaluation = model.evaluation()
    chosen = np.random.default_rng(0).permutation(evaluation.count)[: arguments.samples]
    samples = evaluation.subset(sorted(chosen.tolist()))
    layers = session.graph.anchors
    names = [layer.name for layer in layers]
    plans = [*random_plans(names, arguments.precisions.split(","), arguments.plans), dict.fromkeys(names, A8W8.name)]
    sizes = [sum(weight_bytes(layer, parse_precision(plan[layer.name])) for layer in layers) for plan in plans]
    order = np.argsort(sizes)
    programs = [session.program({n: parse_precision(p) for n, p in plans[i].items()}) for i in order]
    scores = score_programs(session, programs, samples, METRICS["top1"], model.title)
    measured, expected = (
        np.array(values) for values in zip(*((s.interval.estimate, s.loss()) for s in scores), strict=True)
    )
    relative = np.array(sizes)[order] / sizes[-1]
    budget = arguments.max_drop
    rows: list[tuple[str, ...]] = []
    for count in EVALUATION_SAMPLES:
        random = np.random.default_rng(count)
        found: dict[str, list[int]] = {name: [] for name in RULES}
        for _ in range(arguments.draws):
            drawn = random.permutation(samples.count)[: count // 2].tolist()
            for name, taken in found.items():
                taken.append(_smallest([s.part(drawn) for s in scores], RULES[name], budget))
        for name, taken in found.items():
            lost = measured[taken], expected[taken]
            rows.append(
                (
                    model.title,
                    str(count),
                    name,
                    f"{relative[taken].mean():.3f}",
                    *(f"{values.mean():.2%}" for values in lost),
                    *(f"{np.mean(values > budget):.0%}" for values in lost),
                )
            )
    return rows


def _smallest(scores: Sequence[PlanScores], rule: Rule, budget: float) -> int:
    """The position of the first plan that a rule takes; the last one if it takes none."""
    return next((position for position, own in enumerate(scores) if rule(own, budget)), len(scores) - 1)


def _by_percentile(scores: PlanScores, budget: float) -> bool:
    if scores.loss() > budget:
        return False
    tables = np.stack([own.table for own in scores.own[1:]], axis=1)
    return bootstrap_interval(tables, lambda rows: drop_by_margins(rows[:, 0], rows[:, 1]), 0.8, 0, 200).high <= budget


def _by_bound(scores: PlanScores, budget: float) -> bool:
    count = scores.smooth.count
    parts = (range(2 * count // 3), range(2 * count // 3, count))
    return all(scores.loss(part) <= budget for part in parts) and scores.upper_bound() <= budget


RULES: dict[str, Rule] = {
    "measured": lambda scores, budget: scores.interval.estimate <= budget,
    "expected": lambda scores, budget: scores.loss() <= budget,
    "percentile": _by_percentile,
    "bound": _by_bound,
}


if __name__ == "__main__":
    main()
