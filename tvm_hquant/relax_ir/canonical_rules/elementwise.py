"""Elementwise operators: clamps, sums of several tensors, SiLU, and what does nothing at inference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax, tirx

from tvm_hquant.relax_ir.describe import clip_bounds, is_float32, operator_name, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph
from tvm_hquant.relax_ir.imported_functions import ConstantPad, ElementwiseLimit, recognize


def drop_identity(call: Any, graph: Graph) -> Any | None:
    """Dropout, casts to the own dtype, x + 0, x · 1, concatenation of one tensor."""
    if isinstance(call, relax.TupleGetItem):
        source = graph.definition(call.tuple_value)
        return source.args[0] if call.index == 0 and operator_name(source) == "relax.nn.dropout" else None
    name = operator_name(call)
    if name == "relax.astype" and str(call.args[0].ty.dtype) == str(call.ty.dtype):
        return call.args[0]
    if name == "relax.concat" and isinstance(call.args[0], relax.Tuple) and len(call.args[0].fields) == 1:
        return call.args[0].fields[0]
    if name in ("relax.add", "relax.multiply") and shape_of(call.args[0]) == shape_of(call):
        values = graph.array(call.args[1])
        if values is not None and graph.array(call.args[0]) is None:
            return call.args[0] if np.all(values == (0 if name == "relax.add" else 1)) else None
    return None


def recover_imported_function(call: Any, graph: Graph) -> Any | None:
    """``R.call_tir`` of an imported Clip or Pad becomes ``R.clip`` or ``R.nn.pad``."""
    if operator_name(call) != "relax.call_tir" or not isinstance(call.args[1], relax.Tuple):
        return None
    tensors = list(call.args[1].fields)
    found = recognize(graph.functions.get(call.args[0]))
    if isinstance(found, ConstantPad):
        widths = [width for pair in zip(found.before, found.after, strict=True) for width in pair]
        return relax.op.nn.pad(tensors[0], widths, pad_value=found.value)
    if isinstance(found, ElementwiseLimit):
        bound = found.bound
        if bound is None:
            values = graph.array(tensors[1])
            bound = None if values is None else float(values.reshape(()))
        if bound is None or not is_float32(tensors[0]):
            return None
        return _limited(tensors[0], found.function, bound)
    return None


def spell_limits_as_clip(call: Any, graph: Graph) -> Any | None:
    """``R.maximum`` and ``R.minimum`` with a number, and ``R.nn.relu6``, become ``R.clip``."""
    name = operator_name(call)
    if name == "relax.nn.relu6":
        return relax.op.clip(call.args[0], 0.0, 6.0)
    if name not in ("relax.maximum", "relax.minimum") or not is_float32(call):
        return None
    for tensor, limit in (call.args, reversed(call.args)):
        values = graph.array(limit)
        if values is not None and values.size == 1 and shape_of(tensor) == shape_of(call):
            return _limited(tensor, name.removeprefix("relax."), float(values.reshape(())))
    return None


def merge_clips(call: Any, graph: Graph) -> Any | None:
    """A clamp of a clamp is one clamp; [0, ∞) is ``R.nn.relu``; (−∞, ∞) is nothing; bounds are floats."""
    bounds = clip_bounds(call)
    if bounds is None or not is_float32(call):
        return None
    inner = graph.definition(call.args[0])
    inner_bounds = clip_bounds(inner) if inner is not None else None
    if inner_bounds is not None and graph.uses[call.args[0]] <= 1:
        lower, upper = (min(max(b, bounds[0]), bounds[1]) for b in inner_bounds)
        return _clamp(inner.args[0], lower, upper)
    if operator_name(call) == "relax.clip" and any(isinstance(b, tirx.IntImm) for b in call.args[1:3]):
        return _clamp(call.args[0], *bounds)
    if operator_name(call) == "relax.clip" and bounds in ((0.0, math.inf), (-math.inf, math.inf)):
        return _clamp(call.args[0], *bounds)
    return None


def spell_silu(call: Any, graph: Graph) -> Any | None:
    """x · sigmoid(x) becomes ``R.nn.silu(x)``."""
    if operator_name(call) != "relax.multiply":
        return None
    for tensor, gate in (call.args, reversed(call.args)):
        sigmoid = graph.definition_of(gate, "relax.sigmoid")
        if sigmoid is not None and isinstance(tensor, relax.Var) and sigmoid.args[0].same_as(tensor):
            return relax.op.nn.silu(tensor)
    return None


def spell_reduced_stack_as_chain(call: Any, graph: Graph) -> Any | None:
    """ONNX Sum, Max, Min and Mean of several tensors, imported as a reduction over ``R.stack``, become a chain."""
    operators = {"sum": relax.op.add, "max": relax.op.maximum, "min": relax.op.minimum, "mean": relax.op.add}
    name = operator_name(call).removeprefix("relax.")
    if (
        name not in operators
        or call.attrs.axis is None
        or [int(a) for a in call.attrs.axis] != [0]
        or call.attrs.keepdims
    ):
        return None
    stack = graph.definition_of(call.args[0], "relax.stack")
    if stack is None or not isinstance(stack.args[0], relax.Tuple) or int(stack.attrs.axis or 0) != 0:
        return None
    first, *others = stack.args[0].fields
    if not others:
        return first
    result = first
    for index, tensor in enumerate(others):
        result = operators[name](result if index == 0 else graph.emit(result), tensor)
    if name == "mean":
        factor = relax.const(1.0 / (len(others) + 1), str(call.ty.dtype))
        result = relax.op.multiply(graph.emit(result), factor)
    return result


def _limited(tensor: Any, function: str, bound: float) -> Any:
    if math.isnan(bound):
        # ONNX Runtime takes a NaN limit for no limit, and so does TVM's importer.
        return tensor
    return _clamp(tensor, bound, math.inf) if function == "maximum" else _clamp(tensor, -math.inf, bound)


def _clamp(tensor: Any, lower: float, upper: float) -> Any:
    if (lower, upper) == (-math.inf, math.inf):
        return tensor
    if (lower, upper) == (0.0, math.inf):
        return relax.op.nn.relu(tensor)
    return relax.op.clip(tensor, lower, upper)
