"""How long searches take: sensitivities of all layers, and greedy search, wall and CPU seconds beside the goals.

    python -m benchmarks.search_speed [--tasks mobilenetv2,resnet50,greedy] [--samples 200] [--target host] [--json FILE]
        [--suffix-precisions default,float32]

* ``mobilenetv2``: what the zoo's MobileNetV2 loses by one layer in 8 bits, and in a 16-bit precision, for all layers;
* ``resnet50``: the same of the onnx package's ResNet-50 with random weights, on random images;
* ``greedy``: Algorithm 1 of the greedy paper on MobileNetV2, from float32 down to 8 bits, one layer after the other.

Sensitivities are measured in two ways (``--suffix-precisions``): with the layers behind the measured one in the 16-bit
precision that a search chooses by default (:mod:`tvm_hquant.sensitivity.single_layers`), and in float32.

Nothing is known beforehand, so the seconds hold the rounding of weights and the compilation of kernels;
``--kernel-cache FOLDER`` takes those that an earlier run has compiled. "CPU / workers" is what all processes computed
together over the number of worker processes: the wall time to expect where nothing else runs and all are busy. "Kernels
alone" is the same of the layers that lie behind each changed layer, by the median of ten calls of each with its
weights in the cache: what no simulator that computes them can do without. ``--target x86-64-avx2`` takes the kernels of
that spec, on a machine that has more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.machine import describe_machine
from benchmarks.zoo import ZooModel
from tests.light_models import light_model_path, load_random_weights, without_final_softmax
from tvm_hquant.calibration.data import open_data
from tvm_hquant.calibration.samples import DataSource
from tvm_hquant.cli.tables import print_table
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.precision import parse_precision
from tvm_hquant.preparation import prepare_module
from tvm_hquant.quantizer import DataRoles, Options, Quantizer
from tvm_hquant.sensitivity.measured import SensitivityTable
from tvm_hquant.sensitivity.single_layers import SingleLayerPlans, suffix_precisions
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.kernel_cache import OFF, VARIABLE
from tvm_hquant.simulator.runner import available_cores
from tvm_hquant.target_spec import TargetSpec, detect_host, load_target_spec

MOBILENET = "imagenet_mobilenetv2_1.0.onnx"
GOALS = {"mobilenetv2": 60.0, "resnet50": 300.0, "greedy": 600.0}
"""Wall seconds on two cores; plain AVX2 may take twice as long for ResNet-50."""
CALIBRATION = 64
"""Samples to calibrate with."""


@dataclass(frozen=True)
class Phase:
    """Seconds of one part of a task; ``evaluations`` of programs, each on all samples; ``goal`` in wall seconds."""

    task: str
    name: str
    wall: float
    cpu: float
    evaluations: int
    goal: float | None
    kernels: float | None


def main() -> None:
    """Prints a line to standard error when a part is done, and one table in the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(GOALS))
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--target", default="host")
    parser.add_argument("--precision", help="measured beside a8w8; bfloat16 with AVX512-BF16, else float16 by default")
    parser.add_argument("--suffix-precisions", default="default,float32", help="names, with commas between")
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--kernel-cache", default=OFF, help="folder of compiled kernels; none are taken by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ[VARIABLE] = arguments.kernel_cache
    spec = detect_host() if arguments.target == "host" else load_target_spec(arguments.target)
    phases: list[Phase] = []
    for task in arguments.tasks.split(","):
        for suffix in ["default"] if task == "greedy" else arguments.suffix_precisions.split(","):
            named = None if suffix == "default" else suffix
            phases += run(task, spec, arguments.samples, arguments.workers, named, arguments.precision)
            if arguments.json:
                found = {"machine": describe_machine(), "target": spec.name, "phases": [asdict(p) for p in phases]}
                arguments.json.write_text(json.dumps({**found, **vars(arguments), "json": None}))
    print(f"{', '.join(spec.instruction_sets)}; {arguments.samples} samples, {arguments.workers} worker processes\n")
    _print(phases, arguments.workers)


def run(
    task: str, spec: TargetSpec, samples: int, workers: int, suffix: str | None = None, precision: str | None = None
) -> list[Phase]:
    """One task, from the file on; layers are measured in a8w8 and ``precision``, those behind them compute in ``suffix``."""
    phases: list[Phase] = []

    @contextmanager
    def phase(name: str, goal: float | None = None) -> Iterator[None]:
        wall, cpu = time.perf_counter(), cpu_seconds()
        before = session.evaluator.evaluations if phases else 0
        yield
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        phases.append(Phase(task, name, wall, cpu, session.evaluator.evaluations - before, goal, None))
        print(f"{task}, {name}: {wall:.1f} s, {cpu:.1f} s of CPU", file=sys.stderr, flush=True)

    with phase("import"):
        model, calibration, evaluation = _model(task, samples)
        mod = prepare_module(model, None, None)
        session = QuantizationSession(
            mod, spec, families_for_target(spec.instruction_sets, spec.processor), spec.tvm_target()
        )
        session.evaluator.use_processes(workers)
    calibration, evaluation = (open_data(data, session.signature) for data in (calibration, evaluation))
    with phase(f"calibration, {calibration.count} samples"):
        session.calibrate(calibration)
    goal = GOALS[task]
    if task == "greedy":
        options = Options("top1", 0.01, ("a8w8", "float32"), baselines=False)
        quantizer = Quantizer(session, DataRoles(calibration, evaluation, evaluation, 0), options)
        with phase("greedy search", goal):
            quantizer.search("greedy")
        return phases
    sixteen = precision or ("bfloat16" if "avx512_bf16" in spec.instruction_sets else "float16")
    names = ("a8w8", sixteen)
    pairs = [(layer.name, p) for p in names for layer in session.graph.anchors]
    chosen = suffix_precisions(session, {layer.name: names for layer in session.graph.anchors}, suffix)
    behind = ", ".join(sorted(set(chosen.values())))
    goal = goal if task == "mobilenetv2" or "avx512_vnni" in spec.instruction_sets else 2 * goal
    with phase(f"a8w8 and {sixteen}, behind them {behind}", goal):
        plans = SingleLayerPlans(list(chosen), chosen)
        SensitivityTable(session, evaluation, plans=lambda: plans).measure(pairs)
    kernels = 2 * samples * _behind_every_layer(session, evaluation, chosen)
    last = phases.pop()
    return [*phases, Phase(**{**asdict(last), "kernels": kernels})]


def cpu_seconds() -> float:
    """User and system seconds of this process and of all that it has started, those that are still there included."""
    processes = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # It has ended since the folder was listed.
            continue
        processes[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    own = {os.getpid()}
    while more := {process for process, (parent, _) in processes.items() if parent in own} - own:
        own |= more
    return sum(processes[process][1] for process in own) / float(os.sysconf("SC_CLK_TCK"))


def _model(task: str, samples: int) -> tuple[Any, Any, Any]:
    """The model, and samples to calibrate and to measure with."""
    if task != "resnet50":
        zoo = ZooModel(MOBILENET)
        return str(zoo.path), zoo.calibration().subset(range(CALIBRATION)), zoo.evaluation().subset(range(samples))
    model = without_final_softmax(load_random_weights(onnx.load(light_model_path(task)), 0))
    images = np.random.default_rng(0).standard_normal((CALIBRATION + samples, 3, 224, 224), np.float32)
    return model, images[:CALIBRATION], images[CALIBRATION:]


def _behind_every_layer(session: QuantizationSession, source: DataSource, suffix: Mapping[str, str]) -> float:
    """Seconds of the kernels of every layer with weights and of all behind it in the suffix precision, one after the other."""
    sample = next(iter(source))
    program = session.program({layer: parse_precision(name) for layer, name in suffix.items()})
    times = session.engine.time_layers(sample.inputs, program)
    names = [layer.name for layer in session.graph.layers]
    behind = dict(zip(names[::-1], accumulate(times.get(name, 0.0) for name in names[::-1]), strict=True))
    return 1e-6 * sum(behind[layer.name] for layer in session.graph.anchors)


def _print(phases: list[Phase], workers: int) -> None:
    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    rows = [
        (
            p.task,
            p.name,
            str(p.evaluations or ""),
            seconds(p.wall),
            seconds(p.cpu),
            seconds(p.cpu / workers),
            seconds(None if p.kernels is None else p.kernels / workers),
            seconds(p.goal),
        )
        for p in phases
    ]
    columns = ("task", "phase", "evaluations", "wall, s", "CPU, s", "CPU / workers, s", "kernels alone, s", "goal, s")
    print_table(columns, rows)


if __name__ == "__main__":
    main()
