"""Table 1 of the hierarchical paper, made again: uint8, int8, float16, bfloat16 and hierarchical quantization on CIFAR-10.

Source: X. Mao, "Hierarchical Quantization Algorithm for Deep Learning Network Models", Table 1. The paper's ImageNet figures
stand beside ours, which are of the zoo's CIFAR-10 networks of the same kinds; only differences within a row can be compared.
The search sees one half of the samples and the other half is scored, then the other way round, as in ``benchmarks.accuracy``.
Each of our figures has its 95 % interval, and differences to float16 are paired: where "above float16" is within the noise,
the last column says so. Hierarchical quantization has a row for each budget: the paper names none.

    python -m benchmarks.paper_hierarchical [--samples 4000] [--max-drops 0.005,0.0005] [--journal FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tvm_hquant import api
from tvm_hquant.cli.tables import print_table
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantizer import DataRoles, Options, Quantizer
from tvm_hquant.sensitivity.measured import SensitivityTable
from tvm_hquant.simulator.metrics import METRICS
from tvm_hquant.statistics import Interval, paired_difference_interval, wilson_interval

UNIFORM = ("a8w8", "int8", "float16", "bfloat16")
COLUMNS = ("uint8", "int8", "float16", "bfloat16", "hierarchical")
PAPER = {
    "cifar10_shufflenetv1": (0.5818, 0.6024, 0.6316, 0.6324, 0.6569),
    "cifar10_resnet50": (0.7544, 0.7516, 0.7584, 0.7582, 0.7683),
    "cifar10_googlenet": (0.6646, 0.6736, 0.6814, 0.6802, 0.6972),
}


@dataclass(frozen=True)
class Budget:
    """The largest drop in top-1 that a search was allowed, and how many layers got more than 8 bits in each fold."""

    max_drop: float
    promoted: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One network: what each quantization gets right, 0 or 1 for every sample, and the budgets of the searches by label."""

    network: str
    right: dict[str, list[float]]
    budgets: dict[str, Budget]
    layers: int


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PAPER), help="parts of names, with commas between")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--max-drops", default="0.005,0.0005", help="budgets of the searches, top-1")
    parser.add_argument("--journal", type=Path, help="keeps evaluations there, so that a run that was stopped goes on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not zoo_models():
        raise SystemExit(f"no networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    names = [name for name in PAPER if any(part in name for part in arguments.models.split(","))]
    if not names:
        raise SystemExit(f"--models {arguments.models} names none of the paper's networks: {', '.join(PAPER)}")
    drops = tuple(map(float, arguments.max_drops.split(",")))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        journal = arguments.journal or Path(folder) / "journal.sqlite"
        for name in names:
            rows.append(measure(name, arguments.samples, drops, journal))
            _print(rows)
            if arguments.json:
                found = {"machine": describe_machine(), "rows": [asdict(row) for row in rows]}
                arguments.json.write_text(json.dumps(found))


def measure(name: str, samples: int, max_drops: tuple[float, ...], journal: Path) -> Row:
    """One network, in two folds."""
    model = ZooModel(f"{name}.onnx")
    evaluation = model.evaluation()
    order = np.random.default_rng(0).permutation(evaluation.count)[:samples]
    halves = [evaluation.subset(sorted(order[i::2])) for i in (0, 1)]
    session = api.open_session(str(model.path), "host")
    session.use_journal(journal)
    session.calibrate(model.calibration())
    table: SensitivityTable | None = None
    right: dict[str, list[float]] = {}
    promoted: dict[str, list[int]] = {}
    for search, held_out in (halves, halves[::-1]):
        programs = {"float32": session.float_program}
        programs |= {p: session.program(session.uniform(parse_precision(p))) for p in UNIFORM}
        for drop in max_drops:
            options = Options("top1", drop, baselines=False)
            quantizer = Quantizer(session, DataRoles(model.calibration(), search, held_out, 0), options)
            # Losses of single layers are measured on calibration samples: all searches share them.
            table = quantizer.table = table or quantizer.table
            plan = quantizer.plan(quantizer.search("hierarchical").decisions)
            label = f"hierarchical, at most {drop:.2%}"
            programs[label] = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
            more = sum(1 for decision in plan.layers.values() if decision.reason == "sensitive")
            promoted.setdefault(label, []).append(more)
        scores = session.evaluate(list(programs.values()), held_out, METRICS["top1"], "scoring")
        for label, score in zip(programs, scores, strict=True):
            right.setdefault(label, []).extend(s.value for s in score.scores)
    budgets = {
        label: Budget(drop, tuple(counts)) for drop, (label, counts) in zip(max_drops, promoted.items(), strict=True)
    }
    return Row(name, right, budgets, len(session.graph.anchors))


def _print(rows: list[Row]) -> None:
    cells = []
    for row in rows:
        paper = dict(zip(COLUMNS, PAPER[row.network], strict=True))
        float16 = row.right["float16"]
        for label, values in row.right.items():
            published = paper.get("uint8" if label == "a8w8" else label.partition(",")[0])
            above = paired_difference_interval(values, float16)
            verdict = "above" if above.low > 0 else "below" if above.high < 0 else "within the noise"
            more = "/".join(map(str, row.budgets[label].promoted)) if label in row.budgets else ""
            cells.append(
                (
                    row.network,
                    label,
                    _interval(wilson_interval(int(sum(values)), len(values))),
                    "" if label == "float16" else f"{_interval(above, '+')}, {verdict}",
                    f"{more} of {row.layers}" if more else "",
                    "" if published is None else f"{published:.2%}",
                    "" if published is None else f"{published - paper['float16']:+.2%}",
                )
            )
    columns = ("network", "quantization", "top-1 (95 %)", "less float16's (95 %, paired)", "layers above 8 bits", "paper",
               "paper, less float16's")  # fmt: skip
    print_table(columns, cells)
    print(f"{len(rows[0].right['float32'])} samples, each in one of two folds", flush=True)


def _interval(values: Interval, sign: str = "") -> str:
    return f"{values.estimate:{sign}.2%} ({values.low:{sign}.2%} … {values.high:{sign}.2%})"


if __name__ == "__main__":
    main()
