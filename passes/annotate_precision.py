"""Stage 3: every layer function carries its precision and the reason for it.

Before::

    @R.function(private=True)
    def conv1(x):
        R.func_attr({"hquant.layer": "conv1", "hquant.operator": "{...}"})
        ...

After::

    @R.function(private=True)
    def conv1(x):
        R.func_attr({"hquant.layer": "conv1", "hquant.operator": "{...}",
                     "hquant.precision": "a8w8", "hquant.reason": "within budget"})
        ...

A precision that the target spec does not offer for the operator is refused, never annotated.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import IRModule

from tvm_hquant.errors import PrecisionError
from tvm_hquant.layers import PRECISION_ATTRIBUTE, REASON_ATTRIBUTE, read_layers
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.precision import parse_precision
from tvm_hquant.target_spec import TargetSpec


def annotate_precision(plan: PrecisionPlan, spec: TargetSpec | None = None) -> Any:
    """The pass. ``spec`` is the target that must offer what the plan asks for; without it nothing is forbidden.

    Raises (when run):
        PlanError: the plan is for another model.
        PrecisionError: the spec does not offer a layer's precision.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        graph = read_layers(mod)
        plan.check_model(graph)
        result = mod.clone()
        for layer in graph.layers:
            decision = plan.layers[layer.name]
            precision = parse_precision(decision.precision)
            against = spec.reason_against(precision.name, layer.operator_kind) if spec else None
            if against is not None and layer.is_anchor:
                raise PrecisionError(f"layer {layer.name} cannot be {precision.name} on {plan.target}: {against}")
            function = mod[layer.function_name]
            function = function.with_attr(PRECISION_ATTRIBUTE, precision.name)
            result[layer.function_name] = function.with_attr(REASON_ATTRIBUTE, decision.reason)
        return result

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.annotate_precision")
