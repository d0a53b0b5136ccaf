"""Building blocks for passes that rewrite layer functions and the calls in ``main``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tvm import IRModule, relax

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
) -> IRModule:
    """A module whose ``main`` calls layers in the given order.

    ``functions`` gives each layer its function by the layer's name. ``calls`` lists (layer, tensors read); its last entry,
    with an empty name, lists the tensors that leave the graph. ``builder`` may hold TIR functions already.
    """
    main = mod["main"]
    names: dict[str, Any] = {}
    taken: set[str] = {"main", *(g.name_hint for g in builder.get().get_global_vars())}
    for layer, function in functions.items():
        identifier = function_identifier(layer)
        while identifier in taken:
            identifier += "_"
        taken.add(identifier)
        names[layer] = builder.add_func(function, identifier)
    parameters = [relax.Var(p.name, p.ty) for p in main.params]
    tensors: dict[str, Any] = dict(zip(graph.inputs, parameters, strict=True))
    with builder.function("main", parameters, dict(main.attrs)):
        with builder.dataflow():
            for layer, arguments in calls[:-1]:
                call = relax.Call(names[layer], [tensors[a] for a in arguments])
                tensors[layer] = builder.emit(call, name_hint=function_identifier(layer))
            outputs = [tensors[t] for t in calls[-1][1]]
            is_tuple = isinstance(main.ret_ty, relax.TupleType)
            result = builder.emit_output(relax.Tuple(outputs) if is_tuple else outputs[0])
        builder.emit_func_output(result)
    rebuilt = builder.finalize()
    return rebuilt.with_attrs(dict(mod.attrs)) if mod.attrs else rebuilt
