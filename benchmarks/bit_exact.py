"""Simulated = deployed on real networks, bit for bit, on every instruction set that this machine has.

For every network and plan, and for every target:

* the outputs of the compiled module against those of the simulator, on all evaluation samples;
* every layer of the compiled library against the arithmetic contract in NumPy, on all samples too, except float
  convolutions and dense layers: emulating fused multiply-adds in NumPy is slow, they are compared on ``--float-samples``.

The contract is computed once for all targets: their layers must read and give the same bits.

    python -m benchmarks.bit_exact [--models resnet20] [--targets host,x86-64-avx2] [--plans a8w8,float32,mixed]
                                   [--splits eval] [--samples N] [--float-samples 1] [--results FILE]

With ``--results`` every finished line is kept in FILE, and a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any

import numpy.typing as npt

from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tvm_hquant import api, numerics
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.calibration.samples import Sample
from tvm_hquant.cli.tables import print_table
from tvm_hquant.deployed_library import DeployedLibrary
from tvm_hquant.kernels.interface import FloatAnchorConstants
from tvm_hquant.plan import LayerDecision, PrecisionPlan
from tvm_hquant.planning import make_plan
from tvm_hquant.relax_ir.kernel_calls import is_view
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.program import Program, Step
from tvm_hquant.target_spec import TargetSpec, load_target_spec
from tvm_hquant.tensor_comparison import differences

Array = npt.NDArray[Any]

MIXED = ("a8w8", "a16w8", "float32", "int8", "a8w4", "a16w16", "w4", "a8w8", "float32")
"""Precisions that the plan ``mixed`` gives to layers in turn."""

SAMPLES_AT_ONCE = 8
CALIBRATION_SAMPLES = 50


@dataclass(frozen=True)
class Comparison:
    """What was compared for one network, plan and target, and what differed.

    Attributes:
        model, split, plan, target: which; ``split`` names the arrays of evaluation samples.
        samples, outputs_different: simulator against compiled module.
        layers, layers_different: of the library that were compared with NumPy, and how many of them ever differed.
        values, float_values: how many values were compared on all samples, and on the few of float layers.
        float_samples: how many samples these were.
        seconds: of processor time, for all targets together.
    """

    model: str
    split: str
    plan: str
    target: str
    samples: int
    outputs_different: int
    layers: int
    layers_different: int
    values: int
    float_values: int
    float_samples: int
    seconds: float

    @property
    def holds(self) -> bool:
        return not self.outputs_different and not self.layers_different


def main() -> None:
    """Prints a table, and exits with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="parts of names, with commas between; all by default")
    parser.add_argument("--targets", default="host,x86-64-avx2")
    parser.add_argument("--plans", default="a8w8,a16w8,float32,mixed")
    parser.add_argument("--splits", default="eval,eval_jpeg", help="arrays of evaluation samples, where there are any")
    parser.add_argument("--samples", type=int, help="at most so many of each; all by default")
    parser.add_argument("--float-samples", type=int, default=1)
    parser.add_argument("--results", type=Path, help="file with a line of JSON for every comparison")
    arguments = parser.parse_args()
    if not zoo_models():
        raise SystemExit(f"no networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    wanted = arguments.models.split(",") if arguments.models else [""]
    results = _kept(arguments.results)
    for split in arguments.splits.split(","):
        for model in (ZooModel(name) for name in zoo_models() if any(part in name for part in wanted)):
            done = {(c.model, c.split, c.plan) for c in results}
            plans = [p for p in arguments.plans.split(",") if (model.title, split, p) not in done]
            if split not in model.splits() or not plans:
                continue
            session = api.open_session(str(model.path), "host")
            session.calibrate(model.calibration(), CALIBRATION_SAMPLES)
            targets, limits = arguments.targets.split(","), (arguments.samples, arguments.float_samples)
            for found in compare_model(session, model, targets, plans, *limits, split=split):
                results += found
                _print(found)
                if arguments.results:
                    with arguments.results.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(dataclasses.asdict(c)) + "\n" for c in found)
    _print(results)
    if not all(c.holds for c in results):
        raise SystemExit(1)


def compare_model(
    session: QuantizationSession,
    model: ZooModel,
    targets: Sequence[str],
    plans: Sequence[str],
    samples: int | None = None,
    float_samples: int = 1,
    split: str = "eval",
) -> Iterator[list[Comparison]]:
    """For every plan the comparisons of one calibrated network on all targets."""
    specs = {target: load_target_spec(target) for target in targets}
    for plan in plans:
        source = islice(model.source(split), samples)
        yield _compare_plan(session, model.title, split, plan, specs, source, float_samples)


def _compare_plan(
    session: QuantizationSession,
    model: str,
    split: str,
    plan_name: str,
    specs: Mapping[str, TargetSpec],
    samples: Iterable[Sample],
    float_samples: int,
) -> list[Comparison]:
    start = process_time()
    plan = zoo_plan(session, plan_name)
    artifacts = [compile_artifact(session.mod, plan, spec, name=model) for spec in specs.values()]
    libraries = [DeployedLibrary(artifact) for artifact in artifacts]
    program = session.builder.program(plan.precisions(), plan.scales)
    session.engine.compile([program])
    tallies = [_Tally() for _ in specs]
    count = 0
    remaining = iter(samples)
    while chunk := list(islice(remaining, SAMPLES_AT_ONCE)):
        chains = [[library.run_layers(program, s.inputs) for s in chunk] for library in libraries]
        for step in program.steps:
            few = max(0, float_samples - count) if isinstance(step.constants, FloatAnchorConstants) else len(chunk)
            _compare_step(step, [chain[:few] for chain in chains], tallies)
        for sample in chunk:
            simulated = session.engine.run(sample.inputs, [program])[0]
            for library, tally in zip(libraries, tallies, strict=True):
                deployed = library.run(sample.inputs)
                tally.outputs_different += any(differences(d, s)[0] for d, s in zip(deployed, simulated, strict=True))
        count += len(chunk)
    names = [spec.name if target != "host" else f"host ({spec.instruction_sets[0]})" for target, spec in specs.items()]
    layers, seconds = _compared_layers(program), process_time() - start
    return [
        Comparison(
            model, split, plan_name, name, count, t.outputs_different, layers, len(t.layers_different),
            t.values, t.float_values, min(float_samples, count), seconds,
        )
        for name, t in zip(names, tallies, strict=True)
    ]  # fmt: skip


@dataclass
class _Tally:
    """What was counted for one target so far."""

    outputs_different: int = 0
    values: int = 0
    float_values: int = 0
    layers_different: set[str] = dataclasses.field(default_factory=set)


def _compare_step(step: Step, chains: Sequence[Sequence[Mapping[int, Array]]], tallies: Sequence[_Tally]) -> None:
    """One layer of every target against the contract, for the samples of the chains."""
    if not chains[0] or step.request is None or is_view(step.request):
        return
    assert step.constants is not None
    is_float = isinstance(step.constants, FloatAnchorConstants)
    inputs = [[own[key] for key in step.inputs] for own in chains[0]]
    expected = numerics.evaluate_samples(step.request, step.constants, inputs)
    for chain, tally in zip(chains, tallies, strict=True):
        for own, read, right in zip(chain, inputs, expected, strict=True):
            actual = own[step.key]
            if differences(actual, right)[0] or any(
                differences(own[key], a)[0] for key, a in zip(step.inputs, read, strict=True)
            ):
                tally.layers_different.add(step.name)
            if is_float:
                tally.float_values += actual.size
            else:
                tally.values += actual.size


def _compared_layers(program: Program) -> int:
    return sum(1 for step in program.steps if step.request is not None and not is_view(step.request))


def zoo_plan(session: QuantizationSession, name: str) -> PrecisionPlan:
    """A plan by name: a precision for all layers, or ``mixed``."""
    layers = [layer.name for layer in session.graph.anchors]
    precisions = [MIXED[i % len(MIXED)] if name == "mixed" else name for i in range(len(layers))]
    decisions = {n: LayerDecision(p, "chosen by the user") for n, p in zip(layers, precisions, strict=True)}
    return make_plan(session, decisions)


def _kept(path: Path | None) -> list[Comparison]:
    if path is None or not path.exists():
        return []
    return [Comparison(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _print(results: Sequence[Comparison]) -> None:
    rows = [
        (
            c.model,
            c.split,
            c.plan,
            c.target,
            f"{c.samples - c.outputs_different} of {c.samples}",
            f"{c.layers - c.layers_different} of {c.layers}",
            f"{(c.values + c.float_values) / 1e6:.0f} M",
            f"{c.seconds:.0f} s",
        )
        for c in results
    ]
    header = ("network", "samples", "plan", "target", "simulator = module", "NumPy = layers", "values", "CPU")
    print_table(header, rows)


if __name__ == "__main__":
    main()
