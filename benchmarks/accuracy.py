"""Accuracy of uniform and mixed quantization on real networks: the table that the README quotes.

Every figure is measured on samples that neither calibration nor search has used: the evaluation samples are cut in two
halves, the search sees one and the other is scored, then the other way round, and both are pooled. Differences to float are
paired, sample by sample, with 95 % confidence intervals.

    python -m benchmarks.accuracy [--models mobilenetv2,resnet20] [--samples 1000] [--uniform a8w8] [--max-drop 0.005]
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tvm_hquant import api
from tvm_hquant.cli.tables import print_table
from tvm_hquant.kernels.registry import host_instruction_sets
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantizer import DataRoles, Options, Quantizer, low_bit_share
from tvm_hquant.sensitivity.measured import SensitivityTable
from tvm_hquant.simulator.metrics import METRICS, MetricAccumulator


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="parts of names, with commas between; all by default")
    parser.add_argument("--samples", type=int, default=1000, help="evaluation samples at most")
    parser.add_argument("--uniform", default="a8w8,int8,float16,bfloat16", help="uniform precisions beside the search")
    parser.add_argument("--max-drop", type=float, default=0.01, help="budget of the search, top-1")
    parser.add_argument("--observer", default="mean-squared-error")
    parser.add_argument("--target", default="host")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not zoo_models():
        raise SystemExit(f"no networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    wanted = arguments.models.split(",") if arguments.models else [""]
    rows: list[dict[str, Any]] = []
    for name in zoo_models():
        if any(part in name for part in wanted):
            rows += measure(ZooModel(name), arguments)
            _print(rows[-len(arguments.uniform.split(",")) - 1 :])
    _print(rows)
    if arguments.json:
        machine = {"instruction_sets": host_instruction_sets(), "processor": platform.processor()}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


def measure(model: ZooModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one network."""
    start = perf_counter()
    evaluation = model.evaluation()
    order = np.random.default_rng(0).permutation(evaluation.count)[: arguments.samples]
    halves = [evaluation.subset(sorted(order[i::2])) for i in (0, 1)]
    session = api.open_session(str(model.path), arguments.target, observer=arguments.observer)
    session.calibrate(model.calibration())
    options = Options("top1", arguments.max_drop, baselines=False)
    pooled: dict[str, list[list[MetricAccumulator]]] = {}
    shares: dict[str, list[float]] = {}
    plans: list[dict[str, int]] = []
    table: SensitivityTable | None = None
    for search, held_out in (halves, halves[::-1]):
        quantizer = Quantizer(session, DataRoles(model.calibration(), search, held_out, 0), options)
        # Losses of single layers are measured on calibration samples: both searches share them.
        table = quantizer.table = table or quantizer.table
        found = quantizer.search()
        plan = quantizer.plan(found.decisions)
        plans.append(dict(Counter(d.precision for d in found.decisions.values()).most_common()))
        uniform = map(parse_precision, arguments.uniform.split(","))
        programs = {f"uniform {p.name}": session.program(session.uniform(p)) for p in uniform}
        programs["searched"] = session.builder.program(plan.precisions(), plan.scales)
        metrics = [METRICS["top1"], METRICS["agreement"], METRICS["sqnr"]]
        scores = session.evaluate_metrics(list(programs.values()), held_out, metrics, "scoring")
        for (name, program), own in zip(programs.items(), scores, strict=True):
            pooled.setdefault(name, []).append(own)
            shares.setdefault(name, []).append(low_bit_share(session.graph.layers, program.formats.precisions))
    seconds = perf_counter() - start
    rows = []
    for name, folds in pooled.items():
        top1, agreement, sqnr = (a.merge(b) for a, b in zip(*folds, strict=True))
        loss = top1.loss_interval()
        rows.append(
            {
                "model": model.name.removesuffix(".onnx"),
                "quantization": name,
                "samples": top1.count,
                "float": top1.value + top1.loss,
                "top1": top1.value,
                "drop": loss.estimate,
                "drop_low": loss.low,
                "drop_high": loss.high,
                "agreement": agreement.value,
                "sqnr": sqnr.value,
                "low_bit_macs": min(shares[name]),
                "plans": plans if name == "searched" else [],
                "seconds": seconds,
            }
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    cells = [
        (
            r["model"],
            r["quantization"],
            str(r["samples"]),
            f"{r['float']:.2%}",
            f"{r['top1']:.2%}",
            f"{-r['drop']:+.2%} ({-r['drop_high']:+.2%} … {-r['drop_low']:+.2%})",
            f"{r['agreement']:.2%}",
            f"{r['sqnr']:.1f} dB",
            f"{r['low_bit_macs']:.0%}",
            " / ".join(dict.fromkeys(", ".join(f"{n} {p}" for p, n in plan.items()) for plan in r["plans"])),
        )
        for r in rows
    ]
    columns = ("network", "quantization", "samples", "float", "top-1", "difference (95 %)", "agreement", "SQNR", "≤ 8 bits",
               "layers")  # fmt: skip
    print_table(columns, cells)


if __name__ == "__main__":
    main()
