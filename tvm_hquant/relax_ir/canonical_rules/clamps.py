"""Clamps move to where a layer absorbs them, and go where they change nothing."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from tvm_hquant.relax_ir.describe import clip_bounds, is_float32, operator_name
from tvm_hquant.relax_ir.graph_rewriting import Graph

_KEEPS_VALUES = frozenset(
    f"relax.{name}" for name in ("nn.max_pool2d", "reshape", "permute_dims", "take", "strided_slice")
)
_MEANS = frozenset(f"relax.{name}" for name in ("nn.avg_pool2d", "mean"))
_ABSORBING = frozenset(f"relax.{name}" for name in ("add", "nn.conv2d", "matmul"))


def drop_kept_clamp(call: Any, graph: Graph) -> Any | None:
    """A clamp of what lies within its bounds already is nothing."""
    bounds = clip_bounds(call)
    if bounds is None or not is_float32(call):
        return None
    return call.args[0] if _lies_within(call.args[0], bounds, graph) else None


def move_clamp_before_concat(call: Any, graph: Graph) -> Any | None:
    """A clamp of joined tensors becomes clamps of those that need one, if layers absorb all of these."""
    bounds = clip_bounds(call)
    if bounds is None or not is_float32(call):
        return None
    concat = graph.definition_of(call.args[0], "relax.concat")
    if concat is None or not isinstance(concat.args[0], relax.Tuple):
        return None
    fields = list(concat.args[0].fields)
    kept = [_lies_within(field, bounds, graph) for field in fields]
    if not all(is_kept or _absorbs(field, graph) for field, is_kept in zip(fields, kept, strict=True)):
        return None
    clamped = [
        field if is_kept else graph.emit(relax.Call(call.op, [field, *call.args[1:]], call.attrs, call.ty_args))
        for field, is_kept in zip(fields, kept, strict=True)
    ]
    return relax.op.concat(clamped, int(concat.attrs.axis))


def _absorbs(tensor: Any, graph: Graph) -> bool:
    """Whether an addition, convolution or dense layer that nothing else reads makes a tensor."""
    return operator_name(graph.definition(tensor)) in _ABSORBING and graph.uses[tensor] <= 1


def _lies_within(tensor: Any, bounds: tuple[float, float], graph: Graph) -> bool:
    """Whether all values of a tensor surely lie within bounds."""
    definition = graph.definition(tensor)
    name = operator_name(definition)
    if name == "relax.concat" and isinstance(definition.args[0], relax.Tuple):
        return all(_lies_within(field, bounds, graph) for field in definition.args[0].fields)
    # A mean of values that are not negative is not, but rounding may take one above the largest of them.
    if name in _KEEPS_VALUES or (name in _MEANS and bounds == (0.0, math.inf)):
        return _lies_within(definition.args[0], bounds, graph)
    inner = clip_bounds(definition) if definition is not None else None
    return inner is not None and bounds[0] <= inner[0] and inner[1] <= bounds[1]
