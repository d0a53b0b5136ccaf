"""After stage 7, in artifacts: weights that are stored in few bits become parameters of ``main``.

Before::

    @R.function(private=True)
    def conv1(x):
        return R.call_tir(cls.avx512_float32_conv2d_…, (x, packed_weights, bias, limits))

    @R.function
    def main(x): ... cls.conv1(lv) ...

After::

    @R.function(private=True)
    def conv1(x, weights):
        return R.call_tir(cls.avx512_float32_conv2d_…, (x, weights, bias, limits))

    @R.function
    def main(x, conv1_weights):
        R.func_attr({"num_input": 1})
        ... cls.conv1(lv, conv1_weights) ...

The runtime makes the arrays from the bit-packed codes in ``weights.bin`` when it loads an artifact, so that the library
does not hold them at full width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import IRModule, relax

from tvm_hquant.layers import is_constant, read_layers
from tvm_hquant.relax_ir.relax_functions import function_identifier, rebuild_main


def lift_weights(layers: Sequence[str]) -> Any:
    """The pass. ``layers`` are the layers whose weights become parameters, in the order of the parameters."""

    def transform(mod: IRModule, _context: Any) -> IRModule:
        graph = read_layers(mod)
        functions = {layer.name: mod[layer.function_name] for layer in graph.layers}
        parameters: dict[str, Any] = {}
        for name in layers:
            functions[name], lifted = _with_weights_as_parameter(functions[name])
            parameters[name] = relax.Var(f"{function_identifier(name)}_weights", lifted)
        calls = [*((layer.name, layer.inputs) for layer in graph.layers), ("", graph.outputs)]
        return rebuild_main(relax.BlockBuilder(), mod, graph, functions, calls, parameters)

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.lift_weights")


def _with_weights_as_parameter(function: Any) -> tuple[Any, Any]:
    """The layer function with its first constant as last parameter, and that parameter's type."""
    call = function.body.blocks[0].bindings[0].value
    arguments = list(call.args[1].fields)
    position = next(i for i, argument in enumerate(arguments) if is_constant(argument))
    lifted = arguments[position].ty
    builder = relax.BlockBuilder()
    own = [relax.Var(p.name, p.ty) for p in function.params]
    weights = relax.Var("weights", lifted)
    replaced = dict(zip(function.params, own, strict=True))
    fields = [weights if i == position else replaced.get(a, a) for i, a in enumerate(arguments)]
    with builder.function("layer", [*own, weights], dict(function.attrs), private=True):
        with builder.dataflow():
            value = relax.Call(call.op, [call.args[0], relax.Tuple(fields)], call.attrs, call.ty_args)
            result = builder.emit_output(value)
        builder.emit_func_output(result)
    return builder.finalize()["layer"], lifted
