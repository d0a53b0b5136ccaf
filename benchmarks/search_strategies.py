"""All search strategies on the same networks: whose Pareto front is better on samples that no search has seen?

Every strategy gets the same candidates, calibration samples, search samples and cost model, and all plans that it evaluates
count. Its front is measured on the held-out samples. Two fronts are compared at each point of the other: at most its cost,
how much less or more does the best plan of ilp lose there, paired sample by sample, with the 95 % interval?

A point counts as *dominated* where ilp has a plan of at most that cost that surely loses no more than the noise: the interval
of the difference reaches down to 0 or below. Journals are shared, so equal plans are run once; evaluations are what each
strategy has asked for.

    python -m benchmarks.search_strategies [--models kws,resnet8] [--objective size] [--samples 400] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tvm_hquant import api
from tvm_hquant.cli.tables import print_table
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantizer import DataRoles, Options, Quantizer
from tvm_hquant.search.archive import EvaluatedPlan
from tvm_hquant.search.registry import STRATEGIES
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.metrics import METRICS
from tvm_hquant.statistics import bootstrap_interval

PRECISIONS = ("a8w3", "a8w4", "a8w6", "a8w8", "float32")
OURS = "ilp"


@dataclass(frozen=True)
class StrategyRow:
    """One strategy on one network.

    ``best_cost`` is that of the cheapest plan on its front whose expected loss keeps the budget, relative to 8 bits everywhere.
    Of its ``points``, ``dominated`` are matched by ilp within the noise, ``surely_better`` are surely better than ilp.
    """

    network: str
    strategy: str
    evaluations: int
    points: int
    dominated: int
    surely_better: int
    best_cost: float | None
    holdout_drop: float | None
    seconds: float


def main() -> None:
    """Prints a table per network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="kws,resnet8,resnet14,vww", help="parts of names, with commas between")
    parser.add_argument("--strategies", help="names, with commas between; all by default")
    parser.add_argument("--objective", default="size")
    parser.add_argument("--samples", type=int, default=400, help="evaluation samples; half of them for the search")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--metric", default="top1")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not zoo_models():
        raise SystemExit(f"no networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    rows: list[StrategyRow] = []
    for name in zoo_models():
        if any(part in name for part in arguments.models.split(",")):
            rows += compare(ZooModel(name), arguments)
            _print(rows)
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def compare(model: ZooModel, arguments: argparse.Namespace) -> list[StrategyRow]:
    """One row for each strategy."""
    evaluation = model.evaluation()
    order = np.random.default_rng(0).permutation(evaluation.count)[: arguments.samples]
    search, held_out = (evaluation.subset(sorted(order[i::2])) for i in (0, 1))
    session = api.open_session(str(model.path), "host")
    session.calibrate(model.calibration())
    names = arguments.strategies.split(",") if arguments.strategies else list(STRATEGIES)
    names = [OURS, *(name for name in names if name != OURS)]
    options = Options(arguments.metric, arguments.max_drop, PRECISIONS, baselines=False, objective=arguments.objective)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        session.use_journal(Path(folder) / "journal.sqlite")
        ours: list[tuple[EvaluatedPlan, np.ndarray]] = []
        for name in names:
            start = perf_counter()
            quantizer = Quantizer(session, DataRoles(model.calibration(), search, held_out, 0), options)
            quantizer.search(name)
            seconds = perf_counter() - start
            front = measured_front(session, quantizer)
            ours = ours or front
            rows.append(_row(model, name, quantizer, front, ours, seconds))
    return rows


def measured_front(session: QuantizationSession, quantizer: Quantizer) -> list[tuple[EvaluatedPlan, np.ndarray]]:
    """The plans of a front with their divergence from the float model on each held-out sample."""
    front = quantizer.archive.front
    programs = [session.program({n: parse_precision(p) for n, p in plan.assignment.items()}) for plan in front]
    scores = session.evaluate(programs, quantizer.roles.held_out, METRICS["kl"], "held-out")
    return [(plan, np.array([s.value for s in score.scores])) for plan, score in zip(front, scores, strict=True)]


def _row(
    model: ZooModel,
    name: str,
    quantizer: Quantizer,
    front: list[tuple[EvaluatedPlan, np.ndarray]],
    ours: list[tuple[EvaluatedPlan, np.ndarray]],
    seconds: float,
) -> StrategyRow:
    dominated = surely_better = 0
    for plan, losses in front:
        affordable = [other for mine, other in ours if mine.cost <= plan.cost * (1 + 1e-9)]
        if not affordable:
            continue
        nearest = min(affordable, key=lambda other: float(other.mean()))
        difference = bootstrap_interval(nearest - losses, lambda values: float(np.mean(values)))
        dominated += difference.low <= 0
        surely_better += difference.low > 0
    within = [plan for plan, _ in front if plan.expected <= quantizer.options.max_drop]
    costs = quantizer.problem().costs
    eight = costs.total({layer.name: "a8w8" for layer in quantizer.session.graph.anchors})
    drop = None
    if within:
        program = quantizer.session.program({n: parse_precision(p) for n, p in within[0].assignment.items()})
        drop = quantizer.session.evaluate([program], quantizer.roles.held_out, quantizer.metric, "held-out")[0].loss
    best = within[0].cost / eight if within else None
    label = model.name.removesuffix(".onnx")
    return StrategyRow(label, name, quantizer.evaluations, len(front), dominated, surely_better, best, drop, seconds)


def _print(rows: list[StrategyRow]) -> None:
    cells = [
        (
            r.network,
            r.strategy,
            str(r.evaluations),
            "none" if r.best_cost is None else f"{r.best_cost:.3f}",
            "" if r.holdout_drop is None else f"{r.holdout_drop:+.2%}",
            str(r.points),
            str(r.dominated),
            str(r.surely_better),
            f"{r.seconds:.0f}",
        )
        for r in rows
    ]
    columns = ("network", "strategy", "evaluations", "cost for the budget (a8w8 = 1)", "drop held out", "points",
               "matched by ilp", "surely better than ilp", "s")  # fmt: skip
    print_table(columns, cells)


if __name__ == "__main__":
    main()
