"""The nine networks inside the onnx package, with random weights: are they imported whole, exact, and how fast?

Per network: layers, layers that only TVM computes, conversions under uniform a8w8, the largest difference between our
float32 and ONNX Runtime's relative to the largest output, milliseconds a sample as float32 and as a8w8 (median of ten
calls on one thread), whether the a8w8 module equals the simulator, and how many tensors equal the contract in NumPy.

    TVM_NUM_THREADS=1 python -m benchmarks.light_networks [--networks squeezenet,shufflenet]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import numpy as np
import onnx

from benchmarks.bit_exact import zoo_plan
from tests.light_models import light_model_path, load_random_weights, without_final_softmax
from tests.onnx_models import onnxruntime_outputs, random_inputs
from tvm_hquant import api
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.calibration.data import open_data
from tvm_hquant.cli.tables import print_table
from tvm_hquant.operators import Opaque
from tvm_hquant.verification import verify_artifact

NETWORKS = (
    "squeezenet", "shufflenet", "zfnet512", "inception_v1", "bvlc_alexnet", "inception_v2", "resnet50", "densenet121",
    "vgg19",
)  # fmt: skip


@dataclass(frozen=True)
class LightResult:
    """What was measured for one network; times in milliseconds."""

    network: str
    layers: int
    opaque: tuple[str, ...]
    conversions: int
    float_difference: float
    float_time: float
    integer_time: float
    is_equal: bool
    tensors: int
    tensors_different: int


def main() -> None:
    """Prints a row as each network is done, and exits with 1 where module and simulator differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    results = []
    for name in parser.parse_args().networks.split(","):
        results.append(measure_network(name))
        _print(results[-1:])
    _print(results)
    if any(not r.is_equal or r.tensors_different for r in results):
        raise SystemExit(1)


def measure_network(name: str) -> LightResult:
    """Imports, quantizes, compiles, compares and times one network on this machine."""
    model = without_final_softmax(load_random_weights(onnx.load(light_model_path(name)), 0))
    inputs = random_inputs(model)
    session = api.open_session(model, "host", observer="min-max")
    session.engine.compile([session.float_program])
    computed = session.engine.run(inputs, [session.float_program])[0]
    difference = max(
        float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        for ours, theirs in zip(computed, onnxruntime_outputs(model, inputs), strict=True)
    )
    session.calibrate(open_data(inputs, session.signature))
    in_float = compile_artifact(session.mod, zoo_plan(session, "float32"), session.spec)
    float_time = 1000 * statistics.median(in_float.time(inputs))
    plan = zoo_plan(session, "a8w8")
    artifact = compile_artifact(session.mod, plan, session.spec)
    program = session.builder.program(plan.precisions(), plan.scales)
    session.engine.compile([program])
    simulated = session.engine.run(inputs, [program])[0]
    deployed = artifact.run(inputs)
    report = verify_artifact(artifact, [inputs])
    return LightResult(
        name,
        len(session.graph.layers),
        tuple(layer.operator.name for layer in session.graph.layers if isinstance(layer.operator, Opaque)),
        len(program.conversions),
        difference,
        float_time,
        1000 * statistics.median(artifact.time(inputs)),
        report.outputs_equal and all(np.array_equal(a, b) for a, b in zip(simulated, deployed.values(), strict=True)),
        sum(1 for check in report.checks if check.elements),
        sum(1 for check in report.checks if check.different),
    )


def _print(results: list[LightResult]) -> None:
    rows = [
        (
            r.network,
            str(r.layers),
            ", ".join(r.opaque) or "none",
            str(r.conversions),
            f"{r.float_difference:.1e}",
            f"{r.float_time:.2f}",
            f"{r.integer_time:.2f}",
            "yes" if r.is_equal else "NO",
            f"{r.tensors - r.tensors_different} of {r.tensors}",
        )
        for r in results
    ]
    columns = (
        "network", "layers", "opaque", "casts", "float32 − ORT", "float32 ms", "a8w8 ms", "simulator = module",
        "NumPy = kernels",
    )  # fmt: skip
    print_table(columns, rows)


if __name__ == "__main__":
    main()
