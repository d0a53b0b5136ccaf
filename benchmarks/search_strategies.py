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

A second table compares with *equal evaluations*: of two strategies the one that makes more is stopped after as many as the
other makes, and what it has evaluated by then is its front. ilp starts with every layer in every precision alone, so a strategy
that makes fewer evaluations than these meets an ilp that has joined no plan yet. The last column says how many times ilp's loss
a front loses: the geometric mean over all costs up to that of 8 bits everywhere.

    python -m benchmarks.search_strategies FOLDER [--models kws,resnet8] [--objective size] [--samples 400] [--again ilp]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.strategy_fronts import (
    SAME_COST,
    MeasuredPlan,
    StrategyFront,
    better_than,
    equal_evaluations,
    loss_ratio,
    read_front,
    undominated,
)
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
    equal: list[tuple[str, ...]] = []
    for name in zoo_models():
        if any(part in name for part in arguments.models.split(",")):
            fronts = run(ZooModel(name), arguments)
            rows += compare(fronts)
            equal += compare_equally(fronts)
    columns = ("network", "strategy", "evaluations", "cost for the budget", "top-1 lost there", "points",
               "surely better", "better among all", "at 0.5 % of cost", "surely better in top-1", "s")  # fmt: skip
    print_table(columns, rows)
    print_table(
        ("network", "strategy", "evaluations", "of ilp", "points", "better among all", "times the loss of ilp"),
        equal,
        "with equal evaluations",
    )


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
            limit = None if name == OURS else read_front(folder / f"{OURS}.json").evaluations
            front = searched(model, name, quantizer, limit)
            (folder / f"{name}.json").write_text(json.dumps(asdict(front)))
    return [read_front(folder / f"{name}.json") for name in names]


def searched(model: ZooModel, name: str, quantizer: Quantizer, limit: int | None = None) -> StrategyFront:
    """Searches, and measures on the held-out samples its front, and that after ``limit`` evaluations, or after any number."""
    start = perf_counter()
    result = quantizer.search(name, front=True)
    seconds = perf_counter() - start
    session = quantizer.session
    precisions = {layer: decision.precision for layer, decision in result.decisions.items()}
    chosen = quantizer.archive.find(precisions, stored_bits_of(result.decisions))
    assert chosen is not None
    evaluated = quantizer.archive.plans
    earlier = every_front(evaluated) if limit is None else fronts([p for p in evaluated if p.number <= limit])
    found: list[EvaluatedPlan] = []
    for plan in (*fronts(evaluated), chosen, *earlier):
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
            plan.number,
        )
        for plan, (divergence, top1) in zip(found, scores, strict=True)
    ]
    layers = len(session.graph.anchors)
    return StrategyFront(model.title, name, layers, quantizer.evaluations, seconds, result.within_budget,
                         found.index(chosen), plans)  # fmt: skip


def fronts(plans: Sequence[EvaluatedPlan]) -> list[EvaluatedPlan]:
    """The plans that none other dominates in cost and expected drop, and those in cost and divergence."""
    return undominated(plans, lambda p: (p.cost, p.expected)) + undominated(plans, lambda p: (p.cost, p.smooth))


def every_front(plans: Sequence[EvaluatedPlan]) -> list[EvaluatedPlan]:
    """The plans that were on one of these fronts when they were evaluated, or later."""
    found: list[EvaluatedPlan] = []
    front: list[EvaluatedPlan] = []
    for plan in plans:
        front = fronts([*front, plan])
        if plan in front:
            found.append(plan)
    return found


def compare(fronts: list[StrategyFront]) -> list[tuple[str, ...]]:
    """A row of the table for each front; the first one is that of ilp. Every strategy at its own end."""
    ours = fronts[0].after(fronts[0].evaluations)
    rows: list[tuple[str, ...]] = []
    for front in fronts:
        chosen = front.plans[front.chosen]
        plans = front.after(front.evaluations)
        plans += [chosen] * (chosen not in plans)
        of_divergence = better_than(ours, plans, "divergence")
        nearly = better_than(ours, plans, "divergence", SAME_COST)
        of_top1 = better_than(ours, plans, "top1_lost")
        rows.append(
            (
                front.network,
                front.strategy,
                str(front.evaluations),
                f"{chosen.cost:.3f}" if front.within_budget else "none",
                f"{np.mean(chosen.top1_lost):+.2%}",
                str(len(plans)),
                str(sum(of_divergence.surely)),
                str(sum(of_divergence.among_all)),
                str(sum(nearly.among_all)),
                str(sum(of_top1.surely)),
                f"{front.seconds:.0f}",
            )
        )
    return rows


def compare_equally(fronts: list[StrategyFront]) -> list[tuple[str, ...]]:
    """A row for each strategy but ilp, which comes first: both after the evaluations of the one that makes fewer.

    Fronts from files that do not say when plans were evaluated have none.
    """
    ours = fronts[0]
    if not all(plan.number for front in fronts for plan in front.plans):
        return []
    rows: list[tuple[str, ...]] = []
    for front in fronts[1:]:
        both = equal_evaluations(ours, front, fronts)
        verdicts = better_than([*both.ours, both.cheapest], both.theirs, "divergence", SAME_COST)
        ratio = loss_ratio(both.theirs, both.ours, both.cheapest)
        rows.append(
            (
                front.network,
                front.strategy,
                f"{both.evaluations} of {front.evaluations}",
                f"{both.evaluations} of {ours.evaluations}",
                str(len(both.theirs)),
                str(sum(verdicts.among_all)),
                f"{ratio.estimate:.2f} ({ratio.low:.2f} … {ratio.high:.2f})",
            )
        )
    return rows


if __name__ == "__main__":
    main()
