"""Exposed layers are what verification sees of a library: protects that they compute with the constants of ``main``."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from tests.planned_models import host_spec, one_sample, shared_session, stages
from tvm_hquant.compilation import build_module
from tvm_hquant.layers import read_layers
from tvm_hquant.passes.expose_layers import expose_layers, exposed_functions
from tvm_hquant.relax_ir.kernel_calls import KERNEL_ATTRIBUTE, call_constants


@pytest.mark.parametrize("model", ["residual", "branches"])
def test_every_layer_with_a_kernel_has_a_public_copy(model: str) -> None:
    """Names are those of the layers; ``main`` and the private functions stay as they were."""
    lowered = stages(model, "mixed")["lower_layers"]
    exposed = expose_layers()(lowered)
    functions = exposed_functions(exposed)
    layers = read_layers(lowered).layers
    with_kernel = {la.name for la in layers if KERNEL_ATTRIBUTE in lowered[la.function_name].attrs}
    assert set(functions) >= with_kernel
    assert len(set(functions.values())) == len(functions)
    for variable, function in lowered.functions_items():
        tvm.ir.assert_structural_equal(exposed[variable.name_hint], function)
    for layer in (la for la in layers if la.name in with_kernel):
        tvm.ir.assert_structural_equal(
            exposed[functions[layer.name]].body, lowered[layer.function_name].body, map_free_vars=True
        )


def test_the_library_holds_constants_once_and_calls_layers_alone() -> None:
    """The chain of exposed layers gives what ``main`` gives, and the weights are in the library only once."""
    session = shared_session("residual")
    exposed = expose_layers()(stages("residual", "mixed")["lower_layers"])
    executable = build_module(exposed, host_spec().tvm_target(), "this machine")
    machine = tvm.relax.VirtualMachine(executable, tvm.cpu())
    functions, graph = exposed_functions(exposed), read_layers(exposed)
    values = {name: tvm.runtime.tensor(a) for name, a in one_sample(session).items()}
    expected = machine["main"](*values.values())
    for layer in graph.layers:
        arguments = [values[t] for t in layer.inputs]
        if layer.name in functions:
            values[layer.name] = machine[functions[layer.name]](*arguments)
        else:
            values[layer.name] = arguments[0]._create_view(layer.operator.output_shape)
    np.testing.assert_array_equal(values[graph.outputs[0]].numpy(), expected.numpy())
    held = executable.stats()
    weights = call_constants(exposed[functions["conv1"]])[0]
    assert held.count(str(list(weights.shape))) <= 1, held
