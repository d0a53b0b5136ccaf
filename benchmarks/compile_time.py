"""Seconds that networks take to compile with a given plan: from the ONNX file to the artifact, without calibration or search.

    python -m benchmarks.compile_time [--networks resnet50,squeezenet] [--target host] [--precision a8w8] [--json out.json]

Plans are made before the clock starts. Equal kernels are compiled once; LLVM works on all cores of this machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.bit_exact import zoo_plan
from benchmarks.engine_models import NETWORKS, NetworkFiles, available_networks
from benchmarks.machine import describe_machine
from tvm_hquant import api
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.calibration.data import open_data
from tvm_hquant.cli.tables import print_table


@dataclass(frozen=True)
class CompileTime:
    """Seconds: to import and prepare a network, and to make its artifact."""

    network: str
    precision: str
    imported: float
    compiled: float

    @property
    def seconds(self) -> float:
        return self.imported + self.compiled


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(available_networks()))
    parser.add_argument("--target", default="host")
    parser.add_argument("--precision", default="a8w8")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hquant-engines")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    for name in arguments.networks.split(","):
        found.append(measure(NetworkFiles(name, arguments.folder), arguments.target, arguments.precision))
        print(f"{NETWORKS[name]}: {found[-1].seconds:.1f} s", flush=True)
    rows = [(NETWORKS[t.network], *(f"{s:.1f}" for s in (t.imported, t.compiled, t.seconds))) for t in found]
    print_table(("seconds", "import", "compile", "together"), rows)
    if arguments.json:
        document = {"machine": describe_machine(), "times": [{**asdict(t), "seconds": t.seconds} for t in found]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure(network: NetworkFiles, target: str, precision: str) -> CompileTime:
    """One network."""
    network.make_float_model()
    model = str(network.float_model)
    calibrated = api.open_session(model, target, observer="min-max")
    with np.load(network.inputs) as archive:
        calibrated.calibrate(open_data(dict(archive), calibrated.signature))
    plan = zoo_plan(calibrated, precision)
    start = time.perf_counter()
    session = api.open_session(model, target)
    ready = time.perf_counter()
    compile_artifact(session.mod, plan, session.spec, name=network.name)
    return CompileTime(network.name, precision, ready - start, time.perf_counter() - ready)


if __name__ == "__main__":
    main()
