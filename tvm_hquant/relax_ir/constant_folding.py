"""Relax operators on constants, evaluated in NumPy.

TVM's ``FoldConstant`` compiles every such call and runs it as an unscheduled loop, which takes minutes on real networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
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
}
_RESHAPES = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")


def evaluate(call: Any, array_of: Callable[[Any], Array | None]) -> Array | None:
    """The value of a call whose tensor arguments are all constants, in the call's dtype.

    Args:
        call: a call with its type, whose shape is static.
        array_of: gives the value of an argument, None where it is not constant.

    Returns:
        None where an argument is not constant, or where this operator is not one that gets folded.
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
    if name not in (*_RESHAPES, "relax.broadcast_to", "relax.permute_dims", "relax.astype", "relax.take", "relax.flip"):
        return None
    values = array_of(call.args[0])
    if values is None:
        return None
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


def _typed(result: Any, call: Any, arguments: list[Array | None]) -> Array:
    """In the call's dtype, but float64 stays where an argument is a folded weight that is not rounded yet."""
    unrounded = any(a is not None and a.dtype == np.float64 for a in arguments) and np.asarray(result).dtype.kind == "f"
    return np.asarray(result, np.float64 if unrounded else str(call.ty.dtype))


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
