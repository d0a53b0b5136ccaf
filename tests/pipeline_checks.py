"""Takes one ONNX model through the whole pipeline and says what came out of every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.onnx_models import onnxruntime_outputs
from tests.planned_models import host_spec
from tvm_hquant import api
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.calibration.data import open_data
from tvm_hquant.operators import Opaque
from tvm_hquant.plan import LayerDecision, PrecisionPlan
from tvm_hquant.planning import make_plan
from tvm_hquant.runtime import Artifact
from tvm_hquant.session import QuantizationSession
from tvm_hquant.verification import verify_artifact

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ImportedModel:
    """A session over a model, calibrated with one input, and what ONNX Runtime makes of that input."""

    session: QuantizationSession
    inputs: Mapping[str, Array]
    expected: Sequence[Array]

    @property
    def opaque(self) -> frozenset[str]:
        """Names of the Relax operators in it that no kernel of this project computes."""
        operators = (layer.operator for layer in self.session.graph.layers)
        return frozenset(o.name for o in operators if isinstance(o, Opaque))

    def float_outputs(self) -> tuple[Array, ...]:
        """What the simulator gives in float32."""
        self.session.engine.compile([self.session.float_program])
        return self.session.engine.run(self.inputs, [self.session.float_program])[0]


def import_model(model: Any, inputs: Mapping[str, Array]) -> ImportedModel:
    """Imports, partitions and calibrates a model for this machine."""
    session = api.open_session(model, host_spec(), observer="min-max")
    session.calibrate(open_data(inputs, session.signature))
    return ImportedModel(session, inputs, onnxruntime_outputs(model, inputs))


def uniform_plan(session: QuantizationSession, precision: str) -> PrecisionPlan:
    """One precision for all layers with weights."""
    decisions = {layer.name: LayerDecision(precision, "chosen by the user") for layer in session.graph.anchors}
    return make_plan(session, decisions)


def simulated_outputs(imported: ImportedModel, plan: PrecisionPlan) -> tuple[Array, ...]:
    """What the simulator gives under a plan."""
    engine = imported.session.engine
    program = imported.session.builder.program(plan.precisions(), plan.scales)
    engine.compile([program])
    return engine.run(imported.inputs, [program])[0]


def assert_deployed_as_simulated(imported: ImportedModel, plan: PrecisionPlan, verified: bool = True) -> Artifact:
    """Compiles a plan and compares the module with the simulator, and every kernel with the contract, bit for bit."""
    artifact = compile_artifact(imported.session.mod, plan, imported.session.spec)
    simulated = simulated_outputs(imported, plan)
    deployed = artifact.run(imported.inputs)
    assert list(deployed) == list(imported.session.graph.output_names)
    for name, expected in zip(deployed, simulated, strict=True):
        np.testing.assert_array_equal(deployed[name], expected, err_msg=f"output {name}: module and simulator differ")
    if verified:
        report = verify_artifact(artifact, [imported.inputs])
        assert report.holds, [check for check in report.checks if check.different]
    return artifact


def signal_to_noise(output: Array, reference: Array) -> float:
    """In decibels."""
    noise = float(np.sum((output.astype(np.float64) - reference) ** 2))
    signal = float(np.sum(reference.astype(np.float64) ** 2))
    return float(10 * np.log10(max(signal, 1e-30) / max(noise, 1e-30)))
