"""``main`` of a model as data: inputs, named weights, bindings, outputs. Passes read it, rewrite it, and write it back.

Weights are the trailing parameters of ``main``. Their values are in the function attribute ``params`` and the number
of parameters before them in ``num_input``, which is how TVM's ONNX importer hands weights over
(``keep_params_in_input=True``); their names are those of the model and are unique. Constants without a name, such as
the indices of a ``R.take``, stay in the body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import IRModule, relax

from tvm_hquant.errors import ModelError

Array = npt.NDArray[Any]

INPUT_COUNT_ATTRIBUTE = "num_input"
WEIGHTS_ATTRIBUTE = "params"


@dataclass(frozen=True, eq=False)
class MainFunction:
    """The parts of ``main``.

    Attributes:
        inputs: parameters that the caller gives on every run.
        weights: parameters with fixed values; ``Var.name`` is the weight's name. A value may be float64 while passes
            work on it: it is stored in the parameter's dtype when the function is written.
        bindings: pairs of a variable and the expression that it names, in execution order.
        output: a variable, or a tuple of variables.
        attributes: of the function, without those that describe the weights.
    """

    inputs: tuple[Any, ...]
    weights: Mapping[Any, Array]
    bindings: tuple[tuple[Any, Any], ...]
    output: Any
    attributes: Mapping[str, Any]

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The tensors that leave the function, in order."""
        return tuple(self.output.fields) if isinstance(self.output, relax.Tuple) else (self.output,)


def read_main(mod: IRModule) -> MainFunction:
    """The parts of ``main``.

    Raises:
        ModelError: there is no Relax function ``main``, it branches, or weights are declared without their values.
    """
    if "main" not in [g.name_hint for g in mod.get_global_vars()] or not isinstance(mod["main"], relax.Function):
        names = ", ".join(g.name_hint for g in mod.get_global_vars()) or "nothing"
        raise ModelError(f'the module has no Relax function "main" (it holds {names}): name the model\'s function main')
    main = mod["main"]
    attributes = dict(main.attrs) if main.attrs else {}
    values = list(attributes.pop(WEIGHTS_ATTRIBUTE, []))
    count = int(attributes.pop(INPUT_COUNT_ATTRIBUTE, len(main.params) - len(values)))
    inputs, weights = tuple(main.params[:count]), tuple(main.params[count:])
    if len(weights) != len(values):
        raise ModelError(
            f"main has {len(weights)} parameters behind its {count} inputs but {len(values)} values for them: attach the "
            f'weights as the function attribute "{WEIGHTS_ATTRIBUTE}", or bind them with relax.transform.BindParams'
        )
    bindings = [(b.var, b.value) for b in _bindings(main)]
    definitions = {var: value for var, value in bindings if isinstance(value, relax.Tuple)}
    output = definitions.get(main.body.body, main.body.body)
    arrays = {var: np.asarray(value.numpy()) for var, value in zip(weights, values, strict=True)}
    return MainFunction(inputs, arrays, tuple(bindings), output, attributes)


def write_main(mod: IRModule, main: MainFunction) -> IRModule:
    """A module like ``mod`` with this ``main``, without dead bindings, unused weights and functions that nothing calls.

    Weights come in the order of their first use. Of two with one name, the later one gets a number behind it.
    """
    live = _live_bindings(main)
    used = _used_weights(main, live)
    renamed = _uniquely_named([p.name for p in main.inputs], used)
    parameters = [*main.inputs, *renamed.values()]
    builder = relax.BlockBuilder()
    known: dict[Any, Any] = dict(renamed)
    with builder.function("main", parameters):
        with builder.dataflow():
            # A lone output is what the last live binding computes: it is bound once, not once more under another name.
            last = live[-1][1] if live and live[-1][0].same_as(main.output) else main.output
            for var, value in live[:-1] if last is not main.output else live:
                known[var] = builder.emit(substitute(value, known), name_hint=var.name)
            result = builder.emit_output(substitute(last, known))
        builder.emit_func_output(result)
    attributes = {**main.attributes, INPUT_COUNT_ATTRIBUTE: len(main.inputs)}
    if used:
        attributes[WEIGHTS_ATTRIBUTE] = [
            tvm.runtime.tensor(np.ascontiguousarray(main.weights[w], dtype=str(w.ty.dtype))) for w in used
        ]
    functions = {g: f for g, f in mod.functions_items() if g.name_hint != "main"}
    called = _called_functions(live)
    kept = {g: f for g, f in functions.items() if not _is_private(f) or g in called or _is_relax(functions, called)}
    function = builder.finalize()["main"].with_attrs({**attributes, "global_symbol": "main"})
    return IRModule({**kept, mod.get_global_var("main"): function}, attrs=mod.attrs)


def substitute(expression: Any, known: Mapping[Any, Any]) -> Any:
    """The expression with variables replaced; calls, tuples and tuple elements are rebuilt."""
    if isinstance(expression, relax.Var):
        return known.get(expression, expression)
    if isinstance(expression, relax.Tuple):
        return relax.Tuple([substitute(f, known) for f in expression.fields])
    if isinstance(expression, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(expression.tuple_value, known), expression.index)
    if isinstance(expression, relax.Call):
        arguments = [substitute(a, known) for a in expression.args]
        return relax.Call(expression.op, arguments, expression.attrs, expression.ty_args)
    return expression


def variables(expression: Any) -> Iterator[Any]:
    """Variables that an expression reads, each as often as it is read."""
    if isinstance(expression, relax.Var):
        yield expression
    elif isinstance(expression, relax.Tuple):
        for field in expression.fields:
            yield from variables(field)
    elif isinstance(expression, relax.TupleGetItem):
        yield from variables(expression.tuple_value)
    elif isinstance(expression, relax.Call):
        for argument in expression.args:
            yield from variables(argument)


def _bindings(main: Any) -> Iterator[Any]:
    if not isinstance(main.body, relax.SeqExpr):
        return
    for block in main.body.blocks:
        for binding in block.bindings:
            if isinstance(binding, relax.MatchCast) or isinstance(binding.value, (relax.If, relax.Function)):
                raise ModelError(
                    f"{binding.var.name} in main is a {type(binding.value).__name__} or a match_cast: control flow, inner "
                    "functions and shapes known only at run time are not supported; export the model with fixed shapes"
                )
            yield binding


def _live_bindings(main: MainFunction) -> list[tuple[Any, Any]]:
    needed = set(variables(main.output))
    live: list[tuple[Any, Any]] = []
    for var, value in reversed(main.bindings):
        if var in needed:
            live.append((var, value))
            needed.update(variables(value))
    return live[::-1]


def _used_weights(main: MainFunction, live: Sequence[tuple[Any, Any]]) -> list[Any]:
    used: dict[Any, None] = {}
    for expression in [*(value for _, value in live), main.output]:
        used.update((v, None) for v in variables(expression) if v in main.weights)
    return list(used)


def _uniquely_named(taken_names: Sequence[str], weights: Sequence[Any]) -> dict[Any, Any]:
    """Fresh parameters for the weights, no two of one name."""
    taken = set(taken_names)
    result: dict[Any, Any] = {}
    for weight in weights:
        name, number = weight.name, 0
        while name in taken:
            number += 1
            name = f"{weight.name}_{number}"
        taken.add(name)
        result[weight] = relax.Var(name, weight.ty)
    return result


def _called_functions(bindings: Sequence[tuple[Any, Any]]) -> set[Any]:
    """Functions that the bindings call, by name or through ``call_tir`` and the like."""
    found: set[Any] = set()
    for _, value in bindings:
        if isinstance(value, relax.Call):
            found.update(e for e in (value.op, *value.args) if isinstance(e, tvm.ir.GlobalVar))
    return found


def _is_private(function: Any) -> bool:
    return not function.attrs or "global_symbol" not in function.attrs


def _is_relax(functions: Mapping[Any, Any], called: set[Any]) -> bool:
    """Whether a called function is itself Relax code, which may call any other function."""
    return any(isinstance(functions[g], relax.Function) for g in called if g in functions)
