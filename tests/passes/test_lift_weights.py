"""Lifted weights are handed in by the runtime: protects that the module computes the same with them, and holds them no more."""

from __future__ import annotations

import numpy as np
import tvm

from tests.planned_models import built_outputs, one_sample, shared_session, simulated, stages
from tvm_hquant.layers import read_layers
from tvm_hquant.passes.lift_weights import lift_weights
from tvm_hquant.relax_ir.kernel_calls import call_constants

LAYERS = ("left", "stem")


def test_main_takes_weights_behind_its_inputs_in_the_given_order() -> None:
    """With the arrays that were constants before, the outputs are those of the simulator."""
    lowered = stages("branches", "mixed")["lower_layers"]
    functions = {la.name: lowered[la.function_name] for la in read_layers(lowered).layers}
    weights = [call_constants(functions[name])[0] for name in LAYERS]
    lifted = lift_weights(LAYERS)(lowered)
    main = lifted["main"]
    assert int(main.attrs["num_input"]) == 1
    assert [p.name for p in main.params][1:] == ["left_weights", "stem_weights"]
    outputs = built_outputs(lifted, *one_sample(shared_session("branches")).values(), *weights)
    for ours, expected in zip(outputs, simulated("branches", "mixed"), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_other_layers_stay_and_the_given_module_too() -> None:
    """Only the named functions get a parameter for their first constant."""
    lowered = stages("branches", "mixed")["lower_layers"]
    before = {g.name_hint: f for g, f in lowered.functions_items()}
    lifted = lift_weights(("left",))(lowered)
    for layer in read_layers(lowered).layers:
        ours, old = lifted[layer.function_name], lowered[layer.function_name]
        if layer.name == "left":
            assert len(ours.params) == len(old.params) + 1
            assert len(call_constants(ours)) == len(call_constants(old)) - 1
        else:
            tvm.ir.assert_structural_equal(ours, old, map_free_vars=True)
    for name, function in before.items():
        tvm.ir.assert_structural_equal(lowered[name], function)
