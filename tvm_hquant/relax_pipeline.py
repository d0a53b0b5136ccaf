"""The registered Relax pipeline ``hquant``: quantization inside ``tvm.compile``.

A named pipeline gets no arguments and replaces TVM's default one, and ``PassContext`` refuses unknown keys; so plan and
target spec ride as attributes of the module::

    mod = hq.attach_plan(mod, plan, spec)
    executable = tvm.compile(mod, target=spec.tvm_target(), relax_pipeline="hquant")
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax
from tvm.runtime import tensor as runtime_tensor

from tvm_hquant.compilation import build_pipeline, quantization_passes
from tvm_hquant.errors import PlanError
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.layers import LAYER_ATTRIBUTE, read_layers
from tvm_hquant.plan import PrecisionPlan, plan_from_text
from tvm_hquant.preparation import preparation_pipeline
from tvm_hquant.rounding.weight_rounding import rounding_for
from tvm_hquant.target_spec import TargetSpec, read_target_spec

PLAN_ATTRIBUTE = "hquant.plan"
SPEC_ATTRIBUTE = "hquant.target_spec"
WEIGHTS_ATTRIBUTE = "hquant.plan_weights"
PIPELINE_NAME = "hquant"


def attach_plan(mod: IRModule, plan: PrecisionPlan, spec: TargetSpec) -> IRModule:
    """The module with plan and spec as attributes, for the pipeline ``hquant``."""
    return mod.with_attrs(
        {
            PLAN_ATTRIBUTE: plan.to_json(),
            SPEC_ATTRIBUTE: spec.to_toml(),
            WEIGHTS_ATTRIBUTE: runtime_tensor(np.frombuffer(plan.weights_bytes(), np.uint8)),
        }
    )


def hquant_pipeline() -> Any:
    """The pipeline: prepares the module where it is not partitioned yet, quantizes, lowers, and ends with TVM's build passes.

    Raises (when run):
        PlanError: the module carries no plan or no target spec.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        if not mod.attrs or PLAN_ATTRIBUTE not in mod.attrs or SPEC_ATTRIBUTE not in mod.attrs:
            raise PlanError("the module carries no plan: call hq.attach_plan(mod, plan, spec) before tvm.compile")
        plan = plan_from_text(
            str(mod.attrs[PLAN_ATTRIBUTE]), "the attached plan", mod.attrs[WEIGHTS_ATTRIBUTE].numpy().tobytes()
        )
        spec = read_target_spec(str(mod.attrs[SPEC_ATTRIBUTE]), "the attached target spec")
        bare = mod.without_attr(PLAN_ATTRIBUTE).without_attr(SPEC_ATTRIBUTE).without_attr(WEIGHTS_ATTRIBUTE)
        if not any(f.attrs and LAYER_ATTRIBUTE in f.attrs for _, f in bare.functions_items()):
            bare = preparation_pipeline()(bare)
        plan = plan.completed(read_layers(bare), rounding_for(spec.rules))
        for _, stage in quantization_passes(plan, spec, families_for_target(spec.instruction_sets, spec.processor)):
            bare = stage(bare)
        return build_pipeline(spec.tvm_target())(bare)

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.pipeline")


def _register() -> None:
    if PIPELINE_NAME not in relax.pipeline.PIPELINE_MAP:
        relax.register_pipeline(PIPELINE_NAME)(hquant_pipeline)


_register()
