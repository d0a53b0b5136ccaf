"""Relax modules of any origin, brought to the form that the passes start from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import IRModule, relax

from tvm_hquant.errors import ModelError
from tvm_hquant.frontend.signature import static_shape
from tvm_hquant.layers import INPUTS_ATTRIBUTE, OUTPUTS_ATTRIBUTE, constant_array, is_constant
from tvm_hquant.relax_ir.main_function import MainFunction, read_main, write_main

Array = Any


def import_relax(mod: IRModule) -> IRModule:
    """A module like the given one, which is not changed, in the form that :mod:`tvm_hquant.frontend` describes.

    Weights may be constants in ``main`` or trailing parameters with their values in the attribute ``params``. Constants
    get names made from the operator that reads them first (``conv2d_0.weight``). Private Relax functions are inlined.

    Raises:
        ModelError: there is no ``main``, it branches, a shape is open, or weights are declared without values.
    """
    if not isinstance(mod, IRModule):
        raise ModelError(f"import_relax takes a Relax IRModule, not a {type(mod).__name__}")
    read_main(mod)
    normal = relax.transform.InlinePrivateFunctions()(relax.transform.Normalize()(mod.clone()))
    others = [
        g.name_hint for g, f in normal.functions_items() if g.name_hint != "main" and isinstance(f, relax.Function)
    ]
    if others:
        raise ModelError(
            f"the module has the Relax function {others[0]} beside main: make it private, so that it can be inlined, "
            "or remove it"
        )
    main = read_main(normal)
    lifted = _with_named_constants(main)
    names = {
        INPUTS_ATTRIBUTE: [str(p.name) for p in main.inputs],
        OUTPUTS_ATTRIBUTE: _output_names(len(main.outputs)),
    }
    attributes = {**names, **lifted.attributes}
    imported = write_main(
        normal, MainFunction(lifted.inputs, lifted.weights, lifted.bindings, lifted.output, attributes)
    )
    check_static(imported, "the Relax module")
    return imported


def check_static(mod: IRModule, label: str) -> None:
    """Raises a ModelError if a tensor in ``main`` has a shape that is not known before running."""
    main = read_main(mod)
    for var in main.inputs:
        if static_shape(var.ty) is None:
            raise ModelError(f"{label}: input {var.name} is not one tensor of fixed shape: fix all its dimensions")
    for var, value in main.bindings:
        types = list(var.ty.fields) if isinstance(var.ty, relax.TupleType) else [var.ty]
        if any(isinstance(t, relax.TensorType) and static_shape(t) is None for t in types):
            operator = getattr(getattr(value, "op", None), "name", type(value).__name__)
            raise ModelError(
                f"{label}: the shape of what {operator} computes ({var.name}: {var.ty}) is known only at run time: "
                "export the model with fixed shapes"
            )


def _output_names(count: int) -> list[str]:
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _with_named_constants(main: MainFunction) -> MainFunction:
    """Float constants of at least one axis become named weights."""
    weights: dict[Any, Array] = dict(main.weights)
    numbers: Counter[str] = Counter()
    lifted: dict[Any, Any] = {}
    bindings = [(var, _lifted(value, weights, numbers, lifted)) for var, value in main.bindings]
    return MainFunction(main.inputs, weights, tuple(bindings), main.output, main.attributes)


def _lifted(value: Any, weights: dict[Any, Array], numbers: Counter[str], lifted: dict[Any, Any]) -> Any:
    if not isinstance(value, relax.Call):
        return value
    arguments = []
    for argument in value.args:
        if is_constant(argument) and _is_weight(constant_array(argument)):
            if argument not in lifted:
                name = _fresh_name(value, numbers, weights)
                lifted[argument] = relax.Var(name, argument.ty)
                weights[lifted[argument]] = constant_array(argument)
            arguments.append(lifted[argument])
        else:
            arguments.append(argument)
    return relax.Call(value.op, arguments, value.attrs, value.ty_args)


def _is_weight(values: Array) -> bool:
    return bool(values.ndim > 0 and values.dtype == np.float32)


def _fresh_name(call: Any, numbers: Counter[str], weights: Mapping[Any, Array]) -> str:
    operator = str(getattr(call.op, "name", "constant")).rsplit(".", 1)[-1]
    kind = {"permute_dims": "dense", "matmul": "dense"}.get(operator, operator)
    suffix = "weight" if kind in ("dense", "conv1d", "conv2d", "conv3d") else "constant"
    taken = {str(w.name) for w in weights}
    while True:
        name = f"{kind}_{numbers[kind]}.{suffix}"
        numbers[kind] += 1
        if name not in taken:
            return name
