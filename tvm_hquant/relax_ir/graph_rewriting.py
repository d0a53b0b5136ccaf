"""Applies local rewrite rules to ``main`` until none fits any more.

A rule is a function ``rule(call, graph) -> expression | None``. It looks at one call, whose arguments have been rewritten
already, and at what made those arguments, and returns what to put in its place, or None. Rules add; what nothing reads
any more is dropped when the function is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
from tvm import IRModule, relax

from tvm_hquant.errors import ModelError
from tvm_hquant.layers import constant_array, is_constant
from tvm_hquant.relax_ir.constant_folding import evaluate
from tvm_hquant.relax_ir.describe import operator_name
from tvm_hquant.relax_ir.main_function import MainFunction, read_main, substitute, variables, write_main

Array = npt.NDArray[Any]
Rule = Callable[[Any, "Graph"], Any | None]

_MAX_ROUNDS = 50


class Graph:
    """The body of ``main`` as far as it has been rewritten, as a rule sees it."""

    def __init__(self, mod: IRModule, weights: Mapping[Any, Array]) -> None:
        self.functions = {g: f for g, f in mod.functions_items() if g.name_hint != "main"}
        self.weights = dict(weights)
        self.bindings: list[tuple[Any, Any]] = []
        self.uses: Counter[Any] = Counter()
        self._definitions: dict[Any, Any] = {}
        self._builder = relax.BlockBuilder()

    def array(self, expression: Any) -> Array | None:
        """The value of a weight or constant, None for anything else. Folded weights may be float64."""
        if isinstance(expression, relax.Var):
            return self.weights.get(expression)
        return constant_array(expression) if is_constant(expression) else None

    def definition(self, expression: Any) -> Any:
        """What a variable is bound to, None for inputs, weights and constants."""
        return self._definitions.get(expression) if isinstance(expression, relax.Var) else None

    def definition_of(self, expression: Any, operator: str, *, used_once: bool = True) -> Any:
        """The call that made a tensor, if it is one of this operator and (by default) nothing else reads the tensor."""
        call = self.definition(expression)
        if operator_name(call) != operator or (used_once and self.uses[expression] > 1):
            return None
        return call

    def emit(self, expression: Any, name: str = "lv") -> Any:
        """Binds an expression, complete with its type, to a new variable."""
        value = self.normalized(expression)
        if isinstance(value, relax.Var):
            return value
        var = relax.DataflowVar(name, value.ty)
        self.bindings.append((var, value))
        self._definitions[var] = value
        self.uses[var] += 1
        return var

    def normalized(self, expression: Any) -> Any:
        """The expression with its type inferred; nested calls are bound first."""
        if isinstance(expression, relax.Call):
            arguments = [self.emit(a) if isinstance(a, relax.Call) and a.op is not None and _is_tensor_call(a) else a
                         for a in expression.args]  # fmt: skip
            expression = relax.Call(expression.op, arguments, expression.attrs, expression.ty_args)
        return self._builder.normalize(expression)

    def weight(self, values: Array, name: str, dtype: str = "float32") -> Any:
        """A new weight. ``values`` may be float64 for a float32 weight: they are rounded once, at the end."""
        var = relax.Var(name, relax.TensorType(values.shape, dtype))
        self.weights[var] = values
        return var

    def name_of(self, expression: Any, default: str) -> str:
        """The name of a weight, ``default`` for a constant that has none."""
        return str(expression.name) if isinstance(expression, relax.Var) else default

    def fresh_weight_name(self, kind: str) -> str:
        """A name for weights that the model gives none: the kind and a number that no other weight has."""
        taken = {str(w.name) for w in self.weights}
        number = 0
        while f"{kind}_{number}.weight" in taken:
            number += 1
        return f"{kind}_{number}.weight"

    def constant_like(self, values: Array, sources: Sequence[Any], dtype: str = "float32") -> Any:
        """What a computation on constants gives: a weight under the name of the first named source, else a constant.

        ``values`` may be float64 for float32, as in :meth:`weight`.
        """
        named = next((s for s in sources if isinstance(s, relax.Var)), None)
        if named is None or values.ndim == 0:
            return relax.const(values.astype(dtype), dtype)
        return self.weight(values, str(named.name), dtype)


def rewrite(mod: IRModule, rules: Sequence[Rule]) -> IRModule:
    """A module with all rules applied to ``main`` and constants folded, the given one untouched.

    Raises:
        ModelError: see :func:`tvm_hquant.relax_ir.main_function.read_main`, and whatever the rules raise.
    """
    main = read_main(mod)
    for _ in range(_MAX_ROUNDS):
        main, changed = _one_round(mod, main, rules)
        if not changed:
            return write_main(mod, main)
    raise ModelError(f"main did not settle within {_MAX_ROUNDS} rounds of rewriting: please report the model")


def _one_round(mod: IRModule, main: MainFunction, rules: Sequence[Rule]) -> tuple[MainFunction, bool]:
    graph = Graph(mod, main.weights)
    uses = _count_uses(main)
    known: dict[Any, Any] = {}
    changed = False
    for var, value in main.bindings:
        if not uses[var]:
            continue
        expression = graph.normalized(substitute(value, known))
        replaced = _apply(expression, rules, graph)
        changed = changed or replaced is not expression
        result = replaced if _is_leaf(replaced) else graph.emit(replaced, var.name)
        known[var] = result
        if isinstance(result, relax.Var):
            graph.uses[result] += uses[var] - (0 if _is_leaf(replaced) else 1)
    output = substitute(main.output, known)
    live = _without_dead(graph.bindings, output)
    rewritten = MainFunction(main.inputs, graph.weights, live, output, main.attributes)
    return rewritten, changed


def _apply(expression: Any, rules: Sequence[Rule], graph: Graph) -> Any:
    while not _is_leaf(expression):
        expression_before = expression
        folded = _folded(expression, graph)
        if folded is not None:
            return folded
        for rule in rules:
            result = rule(expression, graph)
            if result is not None:
                expression = result if _is_leaf(result) else graph.normalized(result)
                break
        if expression is expression_before:
            return expression
    return expression


def _folded(expression: Any, graph: Graph) -> Any | None:
    if not isinstance(expression, relax.Call) or not isinstance(expression.ty, relax.TensorType):
        return None
    values = evaluate(expression, graph.array)
    if values is None:
        return None
    return graph.constant_like(values, list(variables(expression)), str(expression.ty.dtype))


def _is_leaf(expression: Any) -> bool:
    return isinstance(expression, relax.Var) or is_constant(expression)


def _is_tensor_call(call: Any) -> bool:
    """Whether a nested call computes a tensor (and is not, say, a scalar expression in a shape)."""
    return str(getattr(call.op, "name", "")).startswith("relax.")


def _count_uses(main: MainFunction) -> Counter[Any]:
    uses: Counter[Any] = Counter(variables(main.output))
    for var, value in reversed(main.bindings):
        if uses[var]:
            uses.update(variables(value))
    return uses


def _without_dead(bindings: Sequence[tuple[Any, Any]], output: Any) -> tuple[tuple[Any, Any], ...]:
    main = MainFunction((), {}, tuple(bindings), output, {})
    uses = _count_uses(main)
    return tuple((var, value) for var, value in bindings if uses[var])
