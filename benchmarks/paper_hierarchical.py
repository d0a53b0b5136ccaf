"""Table 1 of the hierarchical paper, made again: uint8, int8, float16, bfloat16 and hierarchical quantization on CIFAR-10.

Source: X. Mao, "Hierarchical Quantization Algorithm for Deep Learning Network Models", Table 1. The paper's ImageNet figures
stand beside ours, which are of the zoo's CIFAR-10 networks of the same kinds; only differences within a row can be compared.
The search sees one half of the samples and the other half is scored, then the other way round, as in ``benchmarks.accuracy``.
Each of our figures has its 95 % interval, and differences to float16 are paired: where "above float16" is within the noise,
the last column says so.

    python -m benchmarks.paper_hierarchical [--samples 4000] [--max-drop 0.005]
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np

from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tvm_hquant import api
from tvm_hquant.cli.tables import print_table
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantizer import DataRoles, Options, Quantizer
from tvm_hquant.sensitivity.measured import SensitivityTable
from tvm_hquant.simulator.metrics import METRICS
from tvm_hquant.statistics import Interval, paired_difference_interval, wilson_interval

UNIFORM = ("a8w8", "int8", "float16", "bfloat16")
PAPER = {
    "cifar10_shufflenetv1": (0.5818, 0.6024, 0.6316, 0.6324, 0.6569),
    "cifar10_resnet50": (0.7544, 0.7516, 0.7584, 0.7582, 0.7683),
    "cifar10_googlenet": (0.6646, 0.6736, 0.6814, 0.6802, 0.6972),
}


class Row(NamedTuple):
    """One network: what it gets right, sample by sample, under each quantization; and how many layers were promoted."""

    network: str
    right: dict[str, Any]
    promoted: list[int]
    layers: int


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PAPER))
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--max-drop", type=float, default=0.005)
    arguments = parser.parse_args()
    if not zoo_models():
        raise SystemExit(f"no networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    rows = []
    for name in arguments.models.split(","):
        rows.append(measure(name, arguments.samples, arguments.max_drop))
        _print(rows)


def measure(name: str, samples: int, max_drop: float) -> Row:
    """One network, in two folds."""
    model = ZooModel(f"{name}.onnx")
    evaluation = model.evaluation()
    order = np.random.default_rng(0).permutation(evaluation.count)[:samples]
    halves = [evaluation.subset(sorted(order[i::2])) for i in (0, 1)]
    session = api.open_session(str(model.path), "host")
    session.calibrate(model.calibration())
    options = Options("top1", max_drop, baselines=False)
    table: SensitivityTable | None = None
    right: dict[str, list[float]] = {}
    promoted = []
    for search, held_out in (halves, halves[::-1]):
        quantizer = Quantizer(session, DataRoles(model.calibration(), search, held_out, 0), options)
        table = quantizer.table = table or quantizer.table
        plan = quantizer.plan(quantizer.search("hierarchical").decisions)
        promoted.append(sum(1 for decision in plan.layers.values() if decision.reason == "sensitive"))
        programs = {p: session.program(session.uniform(parse_precision(p))) for p in UNIFORM}
        programs["hierarchical"] = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
        scores = session.evaluate(list(programs.values()), held_out, METRICS["top1"], "scoring")
        for label, score in zip(programs, scores, strict=True):
            right.setdefault(label, []).extend(s.value for s in score.scores)
    return Row(name, {label: np.array(values) for label, values in right.items()}, promoted, len(session.graph.anchors))


def _print(rows: list[Row]) -> None:
    cells = []
    for row in rows:
        paper = PAPER[row.network]
        figures = [wilson_interval(int(values.sum()), len(values)) for values in row.right.values()]
        above = paired_difference_interval(row.right["hierarchical"], row.right["float16"])
        verdict = "above" if above.low > 0 else "below" if above.high < 0 else "within the noise"
        cells.append(
            (
                row.network,
                *(f"{_interval(f)}; paper {p:.2%}" for f, p in zip(figures, paper, strict=True)),
                f"{'/'.join(map(str, row.promoted))} of {row.layers}",
                f"{_interval(above, '+')}: {verdict}; paper {paper[-1] - paper[2]:+.2%}",
            )
        )
    columns = ("network", "uint8", "int8", "float16", "bfloat16", "hierarchical", "promoted", "hierarchical − float16")
    print_table(columns, cells)


def _interval(values: Interval, sign: str = "") -> str:
    return f"{values.estimate:{sign}.2%} ({values.low:{sign}.2%} … {values.high:{sign}.2%})"


if __name__ == "__main__":
    main()
