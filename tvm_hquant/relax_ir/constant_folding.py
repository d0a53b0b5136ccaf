"""Relax operators on constants, evaluated in NumPy.

TVM's ``FoldConstant`` compiles every such call and runs it as an unscheduled loop, which takes minutes on real networks. Here
that is done only for operators that models rarely apply to their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvm_hquant.relax_ir.describe import operator_name, shape_of

Array = npt.NDArray[Any]

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.power": np.power,
    "relax.negative": np.negative,
    "relax.abs": np.abs,
    "relax.sqrt": np.sqrt,
    "relax.rsqrt": lambda x: 1 / np.sqrt(x),
    "relax.exp": np.exp,
    "relax.isnan": np.isnan,
    "relax.where": np.where,
    "relax.greater": np.greater,
    "relax.less": np.less,
    "relax.equal": np.equal,
    "relax.logical_not": np.logical_not,
    "relax.nn.relu": lambda x: np.maximum(x, 0),
    "relax.tanh": np.tanh,
    "relax.sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
_OTHERS = ("relax.broadcast_to", "relax.permute_dims", "relax.astype", "relax.take", "relax.flip", "relax.matmul")
_RESHAPES = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")


def evaluate(call: Any, array_of: Callable[[Any], Array | None]) -> Array | None:
    """The value of a call whose tensor arguments are all constants, in the call's dtype.

    Args:
        call: a call with its type, whose shape is static.
        array_of: gives the value of an argument, None where it is not constant.

    Returns:
        None where an argument is not constant, or where this is no call of an operator that gives one tensor.
    """
    name = operator_name(call)
    if name == "relax.ones":
        return np.ones(shape_of(call), str(call.ty.dtype))
    if name in ("relax.concat", "relax.stack") and isinstance(call.args[0], relax.Tuple):
        fields = [array_of(f) for f in call.args[0].fields]
        known = [f for f in fields if f is not None]
        if len(known) < len(fields):
            return None
        axis = int(call.attrs.axis) if call.attrs.axis is not None else 0
        return np.concatenate(known, axis) if name == "relax.concat" else np.stack(known, axis)
    if name in _ELEMENTWISE:
        arrays = [array_of(a) for a in call.args]
        if any(a is None for a in arrays):
            return None
        with np.errstate(all="ignore"):
            return _typed(_ELEMENTWISE[name](*arrays), call, arrays)
    if name == "relax.clip":
        values = array_of(call.args[0])
        lower, upper = (float(bound.value) for bound in call.args[1:3])
        return None if values is None else np.minimum(np.maximum(values, lower), upper)
    if name not in (*_RESHAPES, *_OTHERS):
        return _evaluated_by_tvm(call, array_of)
    values = array_of(call.args[0])
    if values is None:
        return None
    if name == "relax.matmul":
        other = array_of(call.args[1])
        # In float64: the order in which a linear algebra library adds leaves no trace in the float32 that is kept.
        return None if other is None else np.matmul(values.astype(np.float64), other.astype(np.float64))
    if name in _RESHAPES:
        return values.reshape(shape_of(call))
    if name == "relax.broadcast_to":
        return np.broadcast_to(values, shape_of(call)).copy()
    if name == "relax.flip":
        return np.flip(values, int(call.attrs.axis)).copy()
    if name == "relax.astype":
        return values.astype(str(call.attrs.dtype))
    if name == "relax.take":
        indices = array_of(call.args[1])
        return None if indices is None else np.take(values, indices, axis=_optional_int(call.attrs.axis))
    axes = call.attrs.axes
    return np.ascontiguousarray(values.transpose([int(a) for a in axes] if axes is not None else None))


def _evaluated_by_tvm(call: Any, array_of: Callable[[Any], Array | None]) -> Array | None:
    """The value of a call of any other operator whose tensors are all constants; random numbers are none."""
    name = operator_name(call)
    places = [i for i, a in enumerate(call.args) if isinstance(a, relax.Expr) and isinstance(a.ty, relax.TensorType)]
    known = [array_of(call.args[i]) for i in places]
    is_function = name.startswith("relax.") and name != "relax.call_tir" and "random" not in name
    if not is_function or not places or any(a is None for a in known):
        return None
    parameters = {i: relax.Var(f"x{i}", call.args[i].ty) for i in places}
    builder = relax.BlockBuilder()
    with builder.function("main", list(parameters.values())):
        arguments = [parameters.get(i, a) for i, a in enumerate(call.args)]
        builder.emit_func_output(builder.emit(relax.Call(call.op, arguments, call.attrs, call.ty_args)))
    machine = relax.VirtualMachine(relax.build(builder.finalize(), target="llvm"), tvm.cpu())
    values = [
        tvm.runtime.tensor(np.asarray(a).astype(str(p.ty.dtype)))
        for a, p in zip(known, parameters.values(), strict=True)
    ]
    return np.asarray(machine["main"](*values).numpy())


def _typed(result: Any, call: Any, arguments: list[Array | None]) -> Array:
    """In the call's dtype, but float64 stays where an argument is a folded weight that is not rounded yet."""
    unrounded = any(a is not None and a.dtype == np.float64 for a in arguments) and np.asarray(result).dtype.kind == "f"
    return np.asarray(result, np.float64 if unrounded else str(call.ty.dtype))


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
