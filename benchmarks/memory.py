"""Memory of whole networks while they run, beside what no plan can do without.

For each network and precision: the bytes of the blocks that hold intermediate tensors, of all constants and of the largest
workspace that a kernel takes; then the weights as the precision stores them, with the largest set of activations that live at
once, each from its making to its last reading; and the ratio of both sums.

    python -m benchmarks.memory [--networks resnet50,squeezenet] [--target host] [--precisions a8w8,float32] [--json out.json]

``--resident FOLDER`` measures processes that run artifacts made by ``benchmarks.engines --step prepare --folder FOLDER``: what
each holds more of memory after some runs than before it loads the artifact (Linux).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import DataType, relax, tirx

from benchmarks.bit_exact import zoo_plan
from benchmarks.engine_models import NETWORKS, NetworkFiles, available_networks, process_environment
from benchmarks.machine import describe_machine
from tvm_hquant import api
from tvm_hquant.calibration.data import open_data
from tvm_hquant.cli.tables import print_table
from tvm_hquant.compilation import build_pipeline, lower
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.layers import constant_array, is_constant
from tvm_hquant.memory_plan import Lifetime, largest_set
from tvm_hquant.precision import parse_precision
from tvm_hquant.relax_ir.describe import operator_name
from tvm_hquant.relax_ir.kernel_calls import is_view
from tvm_hquant.rounding.weight_rounding import rounding_for
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.program import Program
from tvm_hquant.tensor_format import STORAGE_DTYPE

_STACK_BYTES = 1024
"""Smaller buffers of a kernel are on the stack."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a network in a precision."""

    network: str
    precision: str
    blocks: int
    constants: int
    workspace: int
    weights: int
    activations: int

    @property
    def ratio(self) -> float:
        """What is taken over what is needed at least."""
        return (self.blocks + self.constants + self.workspace) / (self.weights + self.activations)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(available_networks()))
    parser.add_argument("--target", default="host")
    parser.add_argument("--precisions", default="a8w8,float32")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hquant-engines")
    parser.add_argument("--resident", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.networks.split(",")
    if arguments.resident:
        print_table(
            ("artifact", "resident MB"), [(n, f"{size / 1e6:.1f}") for n, size in resident(arguments.resident, names)]
        )
        return
    found: list[Memory] = []
    for name in names:
        found += measure(NetworkFiles(name, arguments.folder), arguments.target, arguments.precisions.split(","))
        print_memory(found[-1 - arguments.precisions.count(",") :])
    if len(names) > 1:
        print_memory(found)
    if arguments.json:
        rows = [{**asdict(m), "ratio": m.ratio} for m in found]
        arguments.json.write_text(json.dumps({"machine": describe_machine(), "memory": rows}, indent=1) + "\n")


def measure(network: NetworkFiles, target: str, precisions: Sequence[str]) -> list[Memory]:
    """One network in several precisions."""
    network.make_float_model()
    session = api.open_session(str(network.float_model), target, observer="min-max")
    with np.load(network.inputs) as archive:
        session.calibrate(open_data(dict(archive), session.signature))
    return [_measure(network.name, session, precision) for precision in precisions]


def _measure(name: str, session: QuantizationSession, precision: str) -> Memory:
    plan = zoo_plan(session, precision).completed(session.graph, rounding_for(session.spec.rules))
    lowered = lower(
        session.mod, plan, session.spec, families_for_target(session.spec.instruction_sets, session.spec.processor)
    )
    target = session.spec.tvm_target()
    with tvm.transform.PassContext(opt_level=3), target:
        built = build_pipeline(target)(lowered)
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    weight_bits = {p.name: p.weight_bits for p in map(parse_precision, (d.precision for d in plan.layers.values()))}
    weights = sum(
        layer.parameter_count * (4 if weight_bits[d.precision] == 32 else -(-weight_bits[d.precision] // 8))
        for layer in session.graph.anchors
        for d in [plan.layers[layer.name]]
    )
    calls = list(_values(built["main"]))
    blocks = sum(
        math.prod(int(d) for d in call.args[0].values)
        for call in calls
        if operator_name(call) == "relax.vm.alloc_storage"
    )
    constants = {}
    for call in calls:
        for argument in call.args if isinstance(call, relax.Call) else ():
            if is_constant(argument):
                values = constant_array(argument)
                constants[values.tobytes(), values.dtype.str, values.shape] = values.nbytes
    workspace = max((_workspace(f) for _, f in lowered.functions_items() if isinstance(f, tirx.PrimFunc)), default=0)
    live = largest_set(_lifetimes(session, program))
    return Memory(name, precision, blocks, sum(constants.values()), workspace, weights, live)


def _values(function: Any) -> Iterator[Any]:
    for block in function.body.blocks:
        for binding in block.bindings:
            yield binding.value


def _workspace(function: Any) -> int:
    """Bytes of the buffers that a kernel allocates at run time, all at once."""
    total = 0
    pending = [function.body]
    while pending:
        node = pending.pop()
        if isinstance(node, tirx.AllocBuffer):
            size = math.prod(int(d) for d in node.buffer.shape) * DataType(str(node.buffer.dtype)).itemsize
            total += size if size >= _STACK_BYTES else 0
        pending += list(getattr(node, "seq", ()))
        children = (getattr(node, name, None) for name in ("body", "then_case", "else_case"))
        pending += [child for child in children if child is not None]
    return total


def _lifetimes(session: QuantizationSession, program: Program) -> list[Lifetime]:
    """All activations, from their making to their last reading; graph inputs from the start, outputs to the end."""
    root: dict[int, int] = {}
    size: dict[int, int] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for key, tensor in enumerate(session.graph.inputs.values()):
        root[key], size[key], first[key] = key, 4 * math.prod(tensor.shape), 0
    for position, step in enumerate(program.steps, 1):
        for key in step.inputs:
            last[root[key]] = position
        shape = session.graph.tensor_shape(step.tensor)
        if step.request is not None and is_view(step.request):
            root[step.key] = root[step.inputs[0]]
        else:
            storage = "float32" if step.request is None else step.request.output
            root[step.key] = step.key
            size[step.key] = math.prod(shape) * np.dtype(STORAGE_DTYPE[storage]).itemsize
            first[step.key] = position
    for key in program.outputs:
        last[root[key]] = len(program.steps) + 1
    return [Lifetime(size[key], first[key], last.get(key, first[key])) for key in size]


def print_memory(rows: Sequence[Memory]) -> None:
    """A row for each network and precision, in megabytes."""
    columns = ("network", "precision", "blocks", "constants", "workspace", "weights", "live activations", "ratio")
    print_table(
        columns,
        [
            (
                NETWORKS[m.network],
                m.precision,
                *(f"{b / 1e6:.2f}" for b in (m.blocks, m.constants, m.workspace, m.weights, m.activations)),
                f"{m.ratio:.2f}",
            )
            for m in rows
        ],
    )


_RESIDENT = """
import os, sys
os.environ["TVM_NUM_THREADS"] = "1"
import numpy as np, tvm
from tvm_hquant.runtime import load_artifact

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("Rss:"))

with np.load(sys.argv[2]) as archive:
    inputs = dict(archive)
tvm.runtime.tensor(next(iter(inputs.values())))
before = resident()
artifact = load_artifact(sys.argv[1])
for _ in range(3):
    artifact.run(inputs)
print(resident() - before)
"""


def resident(folder: Path, networks: Sequence[str]) -> list[tuple[str, int]]:
    """What processes hold more after some runs of an artifact than before they load it, in bytes."""
    found = []
    for name in networks:
        for artifact in sorted(path for path in folder.glob(f"{name}.*.*") if (path / "manifest.json").exists()):
            command = [sys.executable, "-c", _RESIDENT, str(artifact), str(folder / f"{name}.npz")]
            done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, check=True)
            found.append((artifact.name, int(done.stdout)))
    return found


if __name__ == "__main__":
    main()
