"""All search strategies on the same networks: whose Pareto front is better on samples that no search has seen?

Every strategy gets the same candidates, calibration samples, search samples and cost model, and all plans that it evaluates
count. Its points are those that none of its other plans dominates in cost and expected drop, or in cost and divergence, on the
search samples. They are measured on the held-out samples and written to FOLDER/<network>/<strategy>.json, so that one strategy
can be run again without the others. Journals are shared, so equal plans are run once; evaluations are what each strategy has
asked for.

Fronts are compared at each point of every other strategy: among the plans of ilp of at most that cost the one that loses
least on the search samples, and how much less or more it loses than the point on the held-out ones, paired sample by sample.
A point is *surely better* than ilp where the 95 % interval of that difference lies above 0, and *better among all* where the
interval that holds for all points of the strategy at once does: of fronts that are equally good, one in 40 points passes the
first, one in 40 whole fronts the second. *At 0.5 % of cost* is the second where ilp may cost half a percent more, since fronts
are points with gaps between them. The loss is the divergence from the float model, which tells plans apart better than top-1
does; the same with top-1 stands beside it.

    python -m benchmarks.search_strategies FOLDER [--models kws,resnet8] [--objective size] [--samples 400] [--again ilp]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt

from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tvm_hquant import api
from tvm_hquant.cli.tables import print_table
from tvm_hquant.planning import stored_bits_of
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantizer import DataRoles, Options, Quantizer
from tvm_hquant.search.archive import EvaluatedPlan
from tvm_hquant.search.registry import STRATEGIES
from tvm_hquant.simulator.metrics import METRICS

PRECISIONS = "a8w3,a8w4,a8w6,a8w8,float32"
OURS = "ilp"
SAME_COST = 1.005
"""Plans of no more than this times a cost are as cheap, where gaps between points are not to count."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredPlan:
    """One point of a front.

    ``cost`` is relative to 8 bits everywhere, ``expected`` the loss that the search went by, ``smooth`` the divergence on the
    search samples; on each held-out sample, ``divergence`` is that from the float model in nats, ``top1_lost`` 1 if
    quantization made it wrong, −1 if right.
    """

    assignment: dict[str, str]
    cost: float
    expected: float
    smooth: float
    divergence: list[float]
    top1_lost: list[float]


@dataclass(frozen=True)
class StrategyFront:
    """What one strategy found on one network. ``chosen`` is the number of the plan that it chose for the budget."""

    network: str
    strategy: str
    layers: int
    evaluations: int
    seconds: float
    within_budget: bool
    chosen: int
    plans: list[MeasuredPlan]


def main() -> None:
    """Runs what is missing and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default="kws,resnet8,resnet14,vww", help="parts of names, with commas between")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="names, with commas between; all by default")
    parser.add_argument("--again", default="", help="strategies to run again, with commas between")
    parser.add_argument("--target", default="host")
    parser.add_argument("--objective", default="size")
    parser.add_argument("--precisions", default=PRECISIONS)
    parser.add_argument("--samples", type=int, default=400, help="evaluation samples; half of them for the search")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--metric", default="top1")
    arguments = parser.parse_args()
    if not zoo_models():
        raise SystemExit(f"no networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    rows: list[tuple[str, ...]] = []
    for name in zoo_models():
        if any(part in name for part in arguments.models.split(",")):
            rows += compare(run(ZooModel(name), arguments))
    columns = ("network", "strategy", "evaluations", "cost for the budget", "top-1 lost there", "points",
               "surely better", "better among all", "at 0.5 % of cost", "surely better in top-1", "s")  # fmt: skip
    print_table(columns, rows)


def run(model: ZooModel, arguments: argparse.Namespace) -> list[StrategyFront]:
    """The fronts of all strategies, from the folder where they are there."""
    folder = arguments.folder / model.title
    folder.mkdir(parents=True, exist_ok=True)
    names = [OURS, *(name for name in arguments.strategies.split(",") if name != OURS)]
    again = arguments.again.split(",")
    missing = [name for name in names if name in again or not (folder / f"{name}.json").exists()]
    if missing:
        evaluation = model.evaluation()
        order = np.random.default_rng(0).permutation(evaluation.count)[: arguments.samples]
        search, held_out = (evaluation.subset(sorted(order[i::2])) for i in (0, 1))
        session = api.open_session(str(model.path), arguments.target)
        session.calibrate(model.calibration())
        session.use_journal(folder / "journal.sqlite")
        session.evaluator.use_processes(1)
        options = Options(arguments.metric, arguments.max_drop, tuple(arguments.precisions.split(",")), baselines=False,
                          objective=arguments.objective)  # fmt: skip
        for name in missing:
            quantizer = Quantizer(session, DataRoles(model.calibration(), search, held_out, 0), options)
            front = searched(model, name, quantizer)
            (folder / f"{name}.json").write_text(json.dumps(asdict(front)))
    return [read_front(folder / f"{name}.json") for name in names]


def searched(model: ZooModel, name: str, quantizer: Quantizer) -> StrategyFront:
    """Searches, and measures the front on the held-out samples."""
    start = perf_counter()
    result = quantizer.search(name, front=True)
    seconds = perf_counter() - start
    session = quantizer.session
    precisions = {layer: decision.precision for layer, decision in result.decisions.items()}
    chosen = quantizer.archive.find(precisions, stored_bits_of(result.decisions))
    assert chosen is not None
    found: list[EvaluatedPlan] = []
    for plan in (*quantizer.archive.front, *smooth_front(quantizer.archive.plans), chosen):
        if plan not in found:
            found.append(plan)
    programs = [
        session.program({n: parse_precision(p) for n, p in plan.assignment.items()}, plan.stored_bits) for plan in found
    ]
    metrics = [METRICS["kl"], METRICS["top1"]]
    scores = session.evaluate_metrics(programs, quantizer.roles.held_out, metrics, "held-out")
    costs = quantizer.problem().costs
    eight = costs.total({layer.name: "a8w8" for layer in session.graph.anchors})
    plans = [
        MeasuredPlan(
            dict(plan.assignment),
            plan.cost / eight,
            plan.expected,
            plan.smooth,
            [score.value for score in divergence.scores],
            [score.reference - score.value for score in top1.scores],
        )
        for plan, (divergence, top1) in zip(found, scores, strict=True)
    ]
    layers = len(session.graph.anchors)
    return StrategyFront(model.title, name, layers, quantizer.evaluations, seconds, result.within_budget,
                         found.index(chosen), plans)  # fmt: skip


def smooth_front(plans: Sequence[EvaluatedPlan]) -> list[EvaluatedPlan]:
    """The plans that no other one dominates in cost and divergence on the search samples, the cheapest first."""
    front: list[EvaluatedPlan] = []
    for plan in sorted(plans, key=lambda p: (p.cost, p.smooth)):
        if not front or plan.smooth < front[-1].smooth:
            front.append(plan)
    return front


def read_front(path: Path) -> StrategyFront:
    """What :func:`run` wrote."""
    document = json.loads(path.read_text())
    return StrategyFront(**{**document, "plans": [MeasuredPlan(**plan) for plan in document["plans"]]})


def compare(fronts: list[StrategyFront]) -> list[tuple[str, ...]]:
    """A row of the table for each front; the first one is that of ilp."""
    ours = fronts[0]
    rows: list[tuple[str, ...]] = []
    for front in fronts:
        of_divergence = better_than(ours, front, "divergence")
        nearly = better_than(ours, front, "divergence", SAME_COST)
        of_top1 = better_than(ours, front, "top1_lost")
        chosen = front.plans[front.chosen]
        rows.append(
            (
                front.network,
                front.strategy,
                str(front.evaluations),
                f"{chosen.cost:.3f}" if front.within_budget else "none",
                f"{np.mean(chosen.top1_lost):+.2%}",
                str(len(front.plans)),
                str(sum(of_divergence.surely)),
                str(sum(of_divergence.among_all)),
                str(sum(nearly.among_all)),
                str(sum(of_top1.surely)),
                f"{front.seconds:.0f}",
            )
        )
    return rows


@dataclass(frozen=True)
class Verdicts:
    """For each point of a front whether ours is surely worse there: by its own interval, and by that of all points at once."""

    surely: list[bool]
    among_all: list[bool]


def better_than(ours: StrategyFront, front: StrategyFront, loss: str, same_cost: float = 1 + 1e-9) -> Verdicts:
    """Where a front loses less than ours at the same cost; points that ours has no plan as cheap as count as better.

    Plans of ours of up to ``same_cost`` times the cost stand against a point.

    Differences are means over the held-out samples. Their intervals are bootstrapped over samples (basic bootstrap of the
    studentized mean, Davison and Hinkley, *Bootstrap Methods and their Application*, 1997, section 5.2, with the standard
    error of the sample kept); for all points at once by the largest of the studentized means in every resample (Westfall and
    Young, *Resampling-Based Multiple Testing*, 1993, section 2.4).
    """
    by = "smooth" if loss == "divergence" else "expected"
    differences: dict[int, Floats] = {}
    for i, plan in enumerate(front.plans):
        affordable = [own for own in ours.plans if own.cost <= plan.cost * same_cost]
        if affordable:
            best = min(affordable, key=lambda own: (float(getattr(own, by)), own.cost))
            differences[i] = np.array(getattr(best, loss)) - np.array(getattr(plan, loss))
    surely, among_all = ([i not in differences for i in range(len(front.plans))] for _ in range(2))
    varied = [i for i, values in differences.items() if values.std() > 0]
    if varied:
        table = np.stack([differences[i] for i in varied], axis=1)
        count = len(table)
        error = table.std(axis=0, ddof=1) / np.sqrt(count)
        random = np.random.default_rng(0)
        drawn = np.stack([table[random.integers(0, count, count)].mean(axis=0) for _ in range(2000)])
        deviations = (drawn - table.mean(axis=0)) / error
        means = table.mean(axis=0) / error
        own, joint = (np.quantile(values, 0.975, axis=0) for values in (deviations, deviations.max(axis=1)))
        for column, i in enumerate(varied):
            surely[i], among_all[i] = bool(means[column] > own[column]), bool(means[column] > joint)
    return Verdicts(surely, among_all)


if __name__ == "__main__":
    main()
