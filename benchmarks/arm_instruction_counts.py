"""Instructions that networks execute on emulated AArch64 cores, kernel by kernel: for want of times.

    python tests/emulated_board/build_board.py        (once)
    python -m benchmarks.arm_instruction_counts [--models kws,mobilenetv2] [--cpus cortex-a53,cortex-a72,cortex-a76]
                                                [--plans a8w8,float32] [--kernels]

An artifact runs once, one sample, on the emulated board (``tests/emulated_board``); a plugin of the emulator
(``count_instructions.c``) counts how often each block of instructions is executed. Those of the library are added up by
function. What Python, TVM's runtime and the C library execute is not counted. Counts do not depend on this machine, but they
are no times: instructions differ in what they take. ``--kernels`` shows every kernel.
"""

from __future__ import annotations

import argparse
import bisect
import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np

from benchmarks.bit_exact import zoo_plan
from benchmarks.zoo import ZooModel, zoo_folder, zoo_models
from tests.emulated_board.board import Board, BoardMissingError, find_board
from tvm_hquant import api
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.cli.tables import print_table
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.runtime import Artifact
from tvm_hquant.session import QuantizationSession
from tvm_hquant.target_spec import load_target_spec

MODELS = ("kws_dscnn", "cifar10_resnet8_mlperftiny", "vww_mobilenetv1_0.25", "imagenet_mobilenetv2_1.0")
_HERE = Path(__file__).resolve().parent
_OUTSIDE_KERNELS = "calls of kernels"


@dataclass(frozen=True)
class KernelCount:
    """What all layers with one kernel did: multiply-accumulates (0 without weights) and executed instructions."""

    kernel: str
    layers: int
    macs: int
    instructions: int


def main() -> None:
    """Prints a row for each network, CPU and plan, or for each of their kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="parts of names, with commas between")
    parser.add_argument("--cpus", default="cortex-a53,cortex-a72,cortex-a76,neoverse-v1", help="names of target specs")
    parser.add_argument("--plans", default="a8w8,float32")
    parser.add_argument("--kernels", action="store_true", help="a row for each kernel")
    arguments = parser.parse_args()
    wanted = arguments.models.split(",")
    models = [name for name in zoo_models() if any(part in name for part in wanted)]
    if not models:
        raise SystemExit(f"no such networks in {zoo_folder()}: set HQUANT_ZOO to a folder that has some")
    try:
        board = find_board()
    except BoardMissingError as reason:
        raise SystemExit(str(reason)) from None
    rows: list[tuple[str, ...]] = []
    for name in models:
        model = ZooModel(name)
        session = api.open_session(str(model.path), "host")
        session.calibrate(model.calibration(), 20)
        sample = next(iter(model.evaluation())).inputs
        for plan_name in arguments.plans.split(","):
            plan = zoo_plan(session, plan_name)
            for cpu in arguments.cpus.split(","):
                counts = count(board, cpu, session, plan, name, sample)
                which = (name.removesuffix(".onnx"), plan_name, cpu)
                shown = counts if arguments.kernels else [total(counts)]
                rows += [(*which, *_cells(c)) for c in shown]
    print_table(
        ("network", "plan", "CPU", "kernel", "layers", "10⁶ MACs", "10⁶ instructions", "MACs/instruction"), rows
    )


def count(
    board: Board,
    cpu: str,
    session: QuantizationSession,
    plan: PrecisionPlan,
    name: str,
    sample: Mapping[str, np.ndarray],
) -> list[KernelCount]:
    """Counts of all kernels that a plan's artifact has, the most instructions first."""
    artifact = compile_artifact(session.mod, plan, load_target_spec(cpu), name=name)
    with TemporaryDirectory(prefix="hquant-counts-") as folder:
        executed = run_counted(board, cpu, artifact, sample, Path(folder))
    macs: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    works = {layer.name: getattr(layer.operator, "macs", 0) for layer in session.graph.layers}
    names = {symbol_of(entry["kernel"]): str(entry["kernel"]) for entry in artifact.manifest["layers"]}
    for entry in artifact.manifest["layers"]:
        macs[entry["kernel"]] += works.get(entry["name"], 0)
        layers[entry["kernel"]] += 1
    instructions: Counter[str] = Counter()
    for symbol, number in executed.items():
        instructions[names.get(re.sub(r"_[0-9a-f]{12}_compute_$", "", symbol), _OUTSIDE_KERNELS)] += number
    found = [KernelCount(k, layers[k], macs[k], number) for k, number in instructions.items()]
    return sorted(found, key=lambda c: -c.instructions)


def run_counted(
    board: Board, cpu: str, artifact: Artifact, sample: Mapping[str, np.ndarray], folder: Path
) -> Mapping[str, int]:
    """Instructions that one run executes in each function of an artifact's library."""
    plugin, counts, place = folder / "count.so", folder / "counts", folder / "place"
    source = _HERE / "count_instructions.c"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", plugin, source], check=True)
    saved = artifact.save(folder / "artifact")
    np.savez(folder / "inputs.npz", allow_pickle=False, **sample)
    # The emulator's options can be given as variables of its environment.
    with patch.dict(os.environ, {"QEMU_PLUGIN": f"{plugin},out={counts}"}):
        result = board.run_python(
            _HERE / "run_counted.py",
            saved.folder,
            folder / "inputs.npz",
            place,
            cpu=cpu,
            timeout=3600,
            runtime_only=True,
        )
    if result.returncode != 0:
        raise RuntimeError(f"the board's process ended with exit code {result.returncode}:\n{result.stderr}")
    start = int(place.read_text())
    symbols = functions(saved.folder / saved.manifest["library"])
    addresses = sorted(symbols)
    end = max(addresses) + os.path.getsize(saved.folder / saved.manifest["library"])
    found: Counter[str] = Counter()
    for line in counts.read_text().splitlines():
        address, size, executions = map(int, line.split())
        if start <= address < start + end and (at := bisect.bisect_right(addresses, address - start)):
            found[symbols[addresses[at - 1]]] += size * executions
    return found


def functions(library: Path) -> Mapping[int, str]:
    """Functions of a library by address. A function's threads run code that follows it, without a name of its own."""
    listing = subprocess.run(
        ["aarch64-linux-gnu-nm", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split() for line in listing.splitlines()]
    return {int(address, 16): name for address, kind, name in lines if kind in "tT" and not name.startswith("$")}


def symbol_of(kernel: str) -> str:
    """What the name of a kernel's function begins with."""
    return re.sub(r"\W+", "_", kernel).strip("_")


def total(counts: list[KernelCount]) -> KernelCount:
    """All kernels as one."""
    return KernelCount("all", *(sum(getattr(c, field) for c in counts) for field in ("layers", "macs", "instructions")))


def _cells(counted: KernelCount) -> tuple[str, ...]:
    ratio = f"{counted.macs / counted.instructions:.2f}" if counted.macs else ""
    return (
        counted.kernel,
        str(counted.layers),
        f"{counted.macs / 1e6:.2f}",
        f"{counted.instructions / 1e6:.3f}",
        ratio,
    )


if __name__ == "__main__":
    main()
