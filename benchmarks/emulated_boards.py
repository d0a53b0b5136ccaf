"""Simulated = deployed on emulated AArch64 boards: a Raspberry Pi 5's Cortex-A76 and a Raspberry Pi 4's Cortex-A72.

For every network and plan, the artifact is cross-compiled, runs on the emulated board with TVM's runtime alone, and its
outputs for evaluation samples are compared with the simulator's on this machine, bit for bit. The emulator computes each
instruction as the processor does, but its times mean nothing, so none are shown; instructions of the library are counted
instead.

    python tests/emulated_board/build_board.py        (once)
    python -m benchmarks.emulated_boards [--models kws,resnet8] [--cpus cortex-a76,cortex-a72]
                                         [--plans a8w8,a16w8,float32,mixed] [--samples 16]
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bit_exact import zoo_plan
from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tests.emulated_board.board import Board, BoardMissingError, find_board
from tests.emulated_board.board_artifacts import Job, run_artifacts
from tvm_hquant import api
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.cli.tables import print_table
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.session import QuantizationSession
from tvm_hquant.target_spec import load_target_spec

Array = npt.NDArray[Any]

MODELS = ("kws_dscnn", "cifar10_resnet8_mlperftiny", "vww_mobilenetv1_0.25", "cifar10_resnet20")
PLANS = ("a8w8", "a16w8", "float32", "mixed")
INSTRUCTIONS = ("sdot", "smull", "smlal", "sadalp", "fmla")
"""What is counted in the library: the vector multiplications, signed bytes and float32."""


@dataclass(frozen=True)
class Comparison:
    """One network under one plan on one CPU: how many values of the outputs differ, and the library's instructions."""

    model: str
    plan: str
    cpu: str
    samples: int
    values: int
    different: int
    instructions: Mapping[str, int]


def main() -> None:
    """Prints a table, and exits with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="parts of names, with commas between")
    parser.add_argument("--cpus", default="cortex-a76,cortex-a72", help="names of target specs")
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    wanted = arguments.models.split(",")
    models = [name for name in zoo_models() if any(part in name for part in wanted)]
    if not models:
        raise SystemExit(f"no such networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    try:
        board = find_board()
    except BoardMissingError as reason:
        raise SystemExit(str(reason)) from None
    results: list[Comparison] = []
    for name in models:
        found = list(
            compare_model(
                board, ZooModel(name), arguments.cpus.split(","), arguments.plans.split(","), arguments.samples
            )
        )
        _print(found)
        results += found
    _print(results)
    if any(comparison.different for comparison in results):
        raise SystemExit(1)


def compare_model(
    board: Board, model: ZooModel, cpus: list[str], plans: list[str], samples: int
) -> Iterator[Comparison]:
    """All comparisons of one network; all plans run in one process of each CPU."""
    session = api.open_session(str(model.path), "host")
    session.calibrate(model.calibration(), 50)
    evaluation = [sample.inputs for sample in islice(model.evaluation(), samples)]
    inputs = {name: np.concatenate([sample[name] for sample in evaluation]) for name in evaluation[0]}
    made = {name: zoo_plan(session, name) for name in plans}
    expected = {name: simulate(session, plan, evaluation) for name, plan in made.items()}
    for cpu in cpus:
        spec = load_target_spec(cpu)
        artifacts = {name: compile_artifact(session.mod, plan, spec, name=model.name) for name, plan in made.items()}
        jobs = [Job(name, artifact, inputs) for name, artifact in artifacts.items()]
        with TemporaryDirectory(prefix="hquant-boards-") as folder:
            results = run_artifacts(board, cpu, jobs, Path(folder), timeout=3600)
        if results.refusals:
            raise RuntimeError(f"{cpu} refused {model.name}: {results.refusals}")
        for name, artifact in artifacts.items():
            outputs = [results.outputs[name][output] for output in session.graph.output_names]
            yield Comparison(
                model.name.removesuffix(".onnx"),
                name,
                cpu,
                len(evaluation),
                sum(array.size for array in outputs),
                sum(different_values(a, b) for a, b in zip(outputs, expected[name], strict=True)),
                count_instructions(artifact.folder / artifact.manifest["library"]),
            )


def simulate(session: QuantizationSession, plan: PrecisionPlan, samples: list[Mapping[str, Array]]) -> list[Array]:
    """The simulator's outputs of a plan, all samples joined along the batch axis."""
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    rows = [session.engine.run(sample, [program])[0] for sample in samples]
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]


def different_values(actual: Array, expected: Array) -> int:
    """How many values of two arrays of one shape differ in their bits."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ValueError(f"shapes or types differ: {actual.dtype}{actual.shape}, {expected.dtype}{expected.shape}")
    bits = f"u{actual.dtype.itemsize}"
    return int((np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)).sum())


def count_instructions(library: Path) -> dict[str, int]:
    """How often each of :data:`INSTRUCTIONS` occurs in a library for AArch64; forms for the upper half count too."""
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    mnemonics = re.findall(r"^\s+[0-9a-f]+:\s+(\S+)", listing, re.MULTILINE)
    return {name: sum(m in (name, f"{name}2") for m in mnemonics) for name in INSTRUCTIONS}


def _print(results: list[Comparison]) -> None:
    rows = [
        (
            c.model,
            c.plan,
            c.cpu,
            str(c.samples),
            f"{c.values - c.different} of {c.values}",
            *(str(c.instructions[name]) for name in INSTRUCTIONS),
        )
        for c in results
    ]
    print_table(("network", "plan", "CPU", "samples", "equal values", *INSTRUCTIONS), rows)


if __name__ == "__main__":
    main()
