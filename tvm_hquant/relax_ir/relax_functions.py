"""Building blocks for passes that rewrite layer functions and the calls in ``main``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tvm import IRModule, relax, tirx
from tvm.ir import GlobalVar

from tvm_hquant.layers import LayerGraph


def function_identifier(name: str) -> str:
    """A name that Relax accepts for the function of a layer or tensor called ``name``."""
    text = re.sub(r"\W", "_", name)
    return text if not text[:1].isdigit() else f"layer_{text}"


def emit_bindings(builder: relax.BlockBuilder, function: Any, arguments: Sequence[Any]) -> Any:
    """Emits the body of a function over other arguments and returns its result."""
    known: dict[Any, Any] = dict(zip(function.params, arguments, strict=True))

    def lookup(expression: Any) -> Any:
        if isinstance(expression, relax.Tuple):
            return relax.Tuple([lookup(f) for f in expression.fields])
        if isinstance(expression, relax.Call):
            return relax.Call(expression.op, [lookup(a) for a in expression.args], expression.attrs, expression.ty_args)
        if isinstance(expression, relax.TupleGetItem):
            return relax.TupleGetItem(lookup(expression.tuple_value), expression.index)
        return known.get(expression, expression) if isinstance(expression, relax.Var) else expression

    for block in function.body.blocks:
        for binding in block.bindings:
            known[binding.var] = builder.emit(lookup(binding.value))
    return lookup(function.body.body)


def rebuild_main(
    builder: relax.BlockBuilder,
    mod: IRModule,
    graph: LayerGraph,
    functions: Mapping[str, Any],
    calls: Sequence[tuple[str, tuple[str, ...]]],
    weights: Mapping[str, Any] = MappingProxyType({}),
) -> IRModule:
    """A module whose ``main`` calls layers in the given order.

    ``functions`` gives each layer its function by the layer's name. ``calls`` lists (layer, tensors read); its last entry,
    with an empty name, lists the tensors that leave the graph. ``builder`` may hold TIR functions already. ``weights`` gives
    layers a parameter of ``main``, behind the graph's inputs, that is passed to them behind their tensors.
    """
    main = mod["main"]
    names: dict[str, Any] = {}
    taken: set[str] = {"main", *(g.name_hint for g in builder.get().get_global_vars()), *tir_function_names(mod)}
    for layer, function in functions.items():
        identifier = function_identifier(layer)
        while identifier in taken:
            identifier += "_"
        taken.add(identifier)
        names[layer] = builder.add_func(function, identifier)
    parameters = [relax.Var(p.name, p.ty) for p in main.params]
    tensors: dict[str, Any] = dict(zip(graph.inputs, parameters, strict=True))
    attributes = {**dict(main.attrs), "num_input": len(parameters)} if weights else dict(main.attrs)
    with builder.function("main", [*parameters, *weights.values()], attributes):
        with builder.dataflow():
            for layer, arguments in calls[:-1]:
                own = [weights[layer]] if layer in weights else []
                call = relax.Call(names[layer], [*(tensors[a] for a in arguments), *own])
                tensors[layer] = builder.emit(call, name_hint=function_identifier(layer))
            outputs = [tensors[t] for t in calls[-1][1]]
            is_tuple = isinstance(main.ret_ty, relax.TupleType)
            result = builder.emit_output(relax.Tuple(outputs) if is_tuple else outputs[0])
        builder.emit_func_output(result)
    rebuilt = with_called_functions(builder.finalize(), mod)
    return rebuilt.with_attrs(dict(mod.attrs)) if mod.attrs else rebuilt


def tir_function_names(mod: IRModule) -> list[str]:
    """Names of the TIR functions of a module."""
    return [g.name_hint for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]


def with_called_functions(rebuilt: IRModule, mod: IRModule) -> IRModule:
    """``rebuilt`` with the functions of ``mod`` that layers in it call.

    TVM's importer writes operators that Relax has no name for, such as a reflecting pad, as calls of TIR functions.
    """
    present = set(rebuilt.get_global_vars())
    called = {g for f in rebuilt.functions.values() if isinstance(f, relax.Function) for g in _called_functions(f)}
    missing = {g: f for g, f in mod.functions_items() if g in called - present}
    return IRModule({**dict(rebuilt.functions_items()), **missing}, attrs=rebuilt.attrs) if missing else rebuilt


def _called_functions(function: Any) -> list[Any]:
    calls = [b.value for block in function.body.blocks for b in block.bindings if isinstance(b.value, relax.Call)]
    return [argument for call in calls for argument in call.args if isinstance(argument, GlobalVar)]
