"""What this machine's core reaches in whole networks, as target specs want it: multiply-accumulates (elements) per cycle.

For every operator kind and precision, the work of all its kernels in the networks over the time that they take inside them, in
cycles of the clock that the core has while it is measured. Uniform plans, one core, one sample; networks take turns.

    python -m benchmarks.unit_rates --instruction-set avx2 --precisions a8w8,a8w7,a8w4,float32 [--networks resnet50,mobilenetv2]

``--step prepare`` compiles what is not in ``--folder`` yet and times nothing, ``--step time`` times what stands there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.engine_models import NetworkFiles
from benchmarks.engines import TARGETS
from benchmarks.machine import describe_machine
from tvm_hquant.cli.tables import print_table
from tvm_hquant.roofline import profile_artifact
from tvm_hquant.runtime import load_artifact
from tvm_hquant.target_spec import load_target_spec
from tvm_hquant.target_spec.core_probe import measure_core

_LANES = {"avx512-vnni": 16, "avx2": 8}
_VISITS = 3


def main() -> None:
    """Prints a row for every operator kind and a column for every precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruction-set", choices=TARGETS, default="avx2")
    parser.add_argument("--precisions", default="a8w8,a8w7,a8w6,a8w5,a8w4,float32")
    parser.add_argument("--networks", default="resnet50,mobilenetv2,squeezenet")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hquant-engines")
    parser.add_argument("--step", choices=("all", "prepare", "time"), default="all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    target, precisions = TARGETS[arguments.instruction_set], arguments.precisions.split(",")
    networks = [NetworkFiles(name, arguments.folder) for name in arguments.networks.split(",")]
    if arguments.step != "time":
        for network in networks:
            network.make_float_model()
            missing = [p for p in precisions if not network.artifact(arguments.instruction_set, p).exists()]
            if missing:
                network.make_artifacts(arguments.instruction_set, target, tuple(missing))
    if arguments.step == "prepare":
        return
    os.environ["TVM_NUM_THREADS"] = "1"
    found = {p: network_rates(networks, arguments.instruction_set, p) for p in precisions}
    core = measure_core(load_target_spec(target).tvm_target(), _LANES[arguments.instruction_set])
    rates = {p: {kind: r / core.clock_ghz / 1e3 for kind, r in by_kind.items()} for p, by_kind in found.items()}
    kinds = list(dict.fromkeys(kind for by_kind in rates.values() for kind in by_kind))
    rows = [(kind, *(f"{rates[p][kind]:.1f}" if kind in rates[p] else "" for p in precisions)) for kind in kinds]
    print_table((f"per cycle at {core.clock_ghz:.2f} GHz", *precisions), rows)
    if arguments.json:
        document = {"machine": describe_machine(), "core": vars(core), "rates": rates}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def network_rates(networks: list[NetworkFiles], instruction_set: str, precision: str) -> dict[str, float]:
    """Multiply-accumulates (elements) a microsecond by operator kind, over all networks in one precision."""
    work: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    artifacts = [load_artifact(network.artifact(instruction_set, precision)) for network in networks]
    for _ in range(_VISITS):
        for artifact in artifacts:
            for kernel in profile_artifact(artifact, 1).kernels:
                if kernel.rated:
                    kind = kernel.operator if kernel.operator != "convert" else f"convert {kernel.precision}"
                    work[kind] += kernel.rated
                    microseconds[kind] += kernel.microseconds  # type: ignore[assignment]
    return {kind: work[kind] / microseconds[kind] for kind in work}


if __name__ == "__main__":
    main()
