"""Calibrated sessions over small models, and plans for them, for tests of everything behind the partitioned module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import IRModule
from tvm.script import ir as I
from tvm.script import relax as R

from tests.small_models import residual_module, with_weights
from tvm_hquant.calibration.data import open_data
from tvm_hquant.compilation import build_module, lower
from tvm_hquant.kernels.registry import families_for_target, host_instruction_sets
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.plan import LayerDecision, PrecisionPlan
from tvm_hquant.planning import make_plan
from tvm_hquant.session import QuantizationSession
from tvm_hquant.target_spec import TargetSpec, detect_host

Array = npt.NDArray[Any]

PRECISIONS = ("a8w8", "int8", "a16w8", "a16w16", "float16", "bfloat16", "float32", "w4", "a6w5")
"""One of every way to compute a layer."""


@I.ir_module
class _Branches:
    @R.function
    def main(
        image: R.Tensor((1, 6, 6, 4), "float32"),
        stem_weight: R.Tensor((8, 4, 3, 3), "float32"),
        stem_bias: R.Tensor((8,), "float32"),
        left_weight: R.Tensor((8, 1, 3, 3), "float32"),
        right_weight: R.Tensor((8, 4, 1, 1), "float32"),
        merge_weight: R.Tensor((8, 16, 1, 1), "float32"),
    ) -> R.Tuple(R.Tensor((1, 9, 8), "float32"), R.Tensor((1, 6, 6, 8), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            stem = R.nn.conv2d(image, stem_weight, padding=[1, 1, 1, 1], data_layout="NHWC", kernel_layout="OIHW")
            stem_biased = R.add(stem, stem_bias)
            stem_clipped = R.clip(stem_biased, 0, 6)
            left = R.nn.conv2d(
                stem_clipped, left_weight, padding=[1, 1, 1, 1], groups=8, data_layout="NHWC", kernel_layout="OIHW"
            )
            right = R.nn.conv2d(stem_clipped, right_weight, groups=2, data_layout="NHWC", kernel_layout="OIHW")
            right_relu = R.nn.relu(right)
            joined = R.concat((left, right_relu), axis=3)
            active = R.sigmoid(joined)
            merge = R.nn.conv2d(active, merge_weight, data_layout="NHWC", kernel_layout="OIHW")
            merge_relu = R.nn.relu(merge)
            total = R.add(merge_relu, stem_clipped)
            pooled = R.nn.avg_pool2d(total, (2, 2), (2, 2), layout="NHWC")
            flat = R.reshape(pooled, (1, 9, 8))
            scores = R.nn.softmax(flat, axis=2)
            squared = R.power(total, R.const(2.0, "float32"))
            result = (scores, squared)
            R.output(result)
        return result


def branches_module(seed: int = 0) -> IRModule:
    """Depthwise, grouped and plain convolutions, concat, sigmoid, add, mean pool, softmax, and one opaque layer."""
    return with_weights(_Branches, ["scores", "squared"], seed)


@cache
def partitioned(model: str) -> IRModule:
    """The partitioned module of ``residual`` or ``branches``."""
    return partition_layers()({"residual": residual_module, "branches": branches_module}[model]())


@cache
def host_spec() -> TargetSpec:
    """The spec of this machine, detected once."""
    return detect_host()


def new_session(mod: IRModule, spec: TargetSpec | None = None, samples: int = 4, seed: int = 0) -> QuantizationSession:
    """A session that was calibrated with random samples."""
    families = families_for_target(host_instruction_sets(), host_spec().processor)
    session = QuantizationSession(mod, spec or host_spec(), families, host_spec().tvm_target(), "min-max")
    session.calibrate(open_data(random_samples(session, samples, seed), session.signature))
    return session


@cache
def shared_session(model: str) -> QuantizationSession:
    """A calibrated session that tests share: its kernels are compiled once."""
    return new_session(partitioned(model))


def random_samples(session: QuantizationSession, count: int, seed: int = 0) -> dict[str, Array]:
    """Normal values for every graph input, ``count`` samples."""
    random = np.random.default_rng(seed)
    return {
        name: random.normal(size=(count, *tensor.shape[1:])).astype(tensor.dtype)
        for name, tensor in session.graph.inputs.items()
    }


def one_sample(session: QuantizationSession, seed: int = 7) -> dict[str, Array]:
    """One sample with the batch axis of the graph's inputs."""
    return random_samples(session, 1, seed)


def uniform_plan(session: QuantizationSession, precision: str) -> PrecisionPlan:
    """One precision for all layers with weights."""
    return mixed_plan(session, {layer.name: precision for layer in session.graph.anchors})


def mixed_plan(session: QuantizationSession, precisions: Mapping[str, str]) -> PrecisionPlan:
    """The given precisions; float32 for the other layers with weights."""
    return make_plan(
        session,
        {
            layer.name: LayerDecision(precisions.get(layer.name, "float32"), "chosen by the user")
            for layer in session.graph.anchors
        },
    )


MIXED = {
    "residual": {"conv1": "a8w8", "conv2": "a16w8", "head": "bfloat16"},
    "branches": {"stem": "a16w8", "left": "int8", "right": "a8w8", "merge": "float16"},
}
"""For each model a plan in which as many kinds of precision meet as it has layers with weights."""


def named_plan(model: str, name: str) -> PrecisionPlan:
    """A uniform plan of the shared session, or its plan ``mixed``."""
    session = shared_session(model)
    return mixed_plan(session, MIXED[model]) if name == "mixed" else uniform_plan(session, name)


@cache
def stages(model: str, name: str) -> Mapping[str, IRModule]:
    """:func:`plan_stages` of a named plan of a small model."""
    return plan_stages(shared_session(model), named_plan(model, name))


def plan_stages(
    session: QuantizationSession, plan: PrecisionPlan, instruction_sets: Sequence[str] | None = None
) -> Mapping[str, IRModule]:
    """The module after every quantization pass, by the name of the pass, with this machine's kernels unless sets are named."""
    modules: dict[str, IRModule] = {}
    families = families_for_target(instruction_sets or session.spec.instruction_sets, session.spec.processor)
    lower(session.mod, plan, session.spec, families, modules.__setitem__)
    return modules


@cache
def simulated(model: str, name: str) -> tuple[Array, ...]:
    """What the simulator gives for :func:`one_sample`."""
    session = shared_session(model)
    plan = named_plan(model, name)
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    return session.engine.run(one_sample(session), [program])[0]


def built_outputs(mod: IRModule, *inputs: Array) -> list[Array]:
    """Outputs of a module whose layers are lowered, built as artifacts are."""
    spec = host_spec()
    machine = tvm.relax.VirtualMachine(build_module(mod, spec.tvm_target(), spec.name), tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(a) for a in inputs))
    return [r.numpy() for r in ([result] if hasattr(result, "numpy") else result)]


def through_text(mod: IRModule) -> IRModule:
    """The module printed as TVMScript and parsed again. It must hold no tensor constants: their text is elided."""
    return tvm.script.from_source(mod.script())
