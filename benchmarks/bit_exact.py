"""Simulated = deployed on real networks, bit for bit, on every instruction set that this machine has.

For every network and plan: the compiled module against the simulator on the evaluation samples, and every kernel of the
compiled library against the arithmetic contract in NumPy (for plans with float32 layers on fewer samples: emulating fused
multiply-adds in NumPy is slow).

    python benchmarks/bit_exact.py [--models resnet20] [--targets host,x86-64-avx2] [--plans a8w8,float32,mixed]
                                   [--samples 100] [--numpy-samples 100]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import numpy as np

from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tvm_hquant import api
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.cli.tables import print_table
from tvm_hquant.plan import LayerDecision, PrecisionPlan
from tvm_hquant.planning import make_plan
from tvm_hquant.precision import Arithmetic
from tvm_hquant.session import QuantizationSession
from tvm_hquant.target_spec import load_target_spec
from tvm_hquant.verification import verify_artifact

MIXED = ("a8w8", "a16w8", "float32", "int8", "a8w4", "a16w16", "w4", "a8w8", "float32")
"""Precisions that the plan ``mixed`` gives to layers in turn."""


@dataclass(frozen=True)
class Comparison:
    """What was compared for one network, plan and target, and what differed."""

    model: str
    plan: str
    target: str
    samples: int
    outputs_different: int
    numpy_samples: int
    tensors: int
    tensors_different: int
    seconds: float


def main() -> None:
    """Prints a table, and exits with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="parts of names, with commas between; all by default")
    parser.add_argument("--targets", default="host,x86-64-avx2")
    parser.add_argument("--plans", default="a8w8,a16w8,float32,mixed")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--numpy-samples", type=int, default=100)
    arguments = parser.parse_args()
    if not zoo_models():
        raise SystemExit(f"no networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    wanted = arguments.models.split(",") if arguments.models else [""]
    results: list[Comparison] = []
    for name in zoo_models():
        if not any(part in name for part in wanted):
            continue
        for comparison in compare_model(
            ZooModel(name),
            arguments.targets.split(","),
            arguments.plans.split(","),
            arguments.samples,
            arguments.numpy_samples,
        ):
            results.append(comparison)
            _print([comparison])
    _print(results)
    if any(c.outputs_different or c.tensors_different for c in results):
        raise SystemExit(1)


def compare_model(
    model: ZooModel, targets: list[str], plans: list[str], samples: int, numpy_samples: int
) -> Iterator[Comparison]:
    """All comparisons of one network."""
    session = api.open_session(str(model.path), "host")
    session.calibrate(model.calibration(), 50)
    evaluation = model.evaluation()
    for plan_name in plans:
        plan = zoo_plan(session, plan_name)
        has_floats = any(p.arithmetic is not Arithmetic.INTEGER for p in plan.precisions().values())
        checked = min(1, numpy_samples) if has_floats else numpy_samples
        for target in targets:
            start = perf_counter()
            spec = load_target_spec(target)
            artifact = compile_artifact(session.mod, plan, spec, name=model.name)
            program = session.builder.program(plan.precisions(), plan.scales)
            session.engine.compile([program])
            different = count = 0
            for sample in islice(evaluation, samples):
                simulated = session.engine.run(sample.inputs, [program])[0]
                deployed = artifact.run(sample.inputs)
                count += 1
                different += any(
                    not np.array_equal(a, b, equal_nan=True) for a, b in zip(simulated, deployed.values(), strict=True)
                )
            report = verify_artifact(artifact, [s.inputs for s in islice(evaluation, checked)]) if checked else None
            checks = [c for c in report.checks if c.elements] if report else []
            wrong = sum(1 for c in checks if c.different) + (report is not None and not report.outputs_equal)
            yield Comparison(
                model.name.removesuffix(".onnx"),
                plan_name,
                spec.name if target != "host" else f"host ({spec.instruction_sets[0]})",
                count,
                different,
                checked,
                len(checks),
                wrong,
                perf_counter() - start,
            )


def zoo_plan(session: QuantizationSession, name: str) -> PrecisionPlan:
    """A plan by name: a precision for all layers, or ``mixed``."""
    layers = [layer.name for layer in session.graph.anchors]
    precisions = [MIXED[i % len(MIXED)] if name == "mixed" else name for i in range(len(layers))]
    decisions = {n: LayerDecision(p, "chosen by the user") for n, p in zip(layers, precisions, strict=True)}
    return make_plan(session, decisions)


def _print(results: list[Comparison]) -> None:
    rows = [
        (
            c.model,
            c.plan,
            c.target,
            f"{c.samples - c.outputs_different} of {c.samples}",
            f"{c.tensors - c.tensors_different} of {c.tensors} ({c.numpy_samples} samples)",
            f"{c.seconds:.0f} s",
        )
        for c in results
    ]
    print_table(("network", "plan", "target", "simulator = module", "NumPy = kernels, tensors", ""), rows)


if __name__ == "__main__":
    main()
