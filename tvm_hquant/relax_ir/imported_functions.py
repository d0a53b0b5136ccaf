"""Reads back what TVM's ONNX importer writes as loops: Clip, Pad and their relatives arrive as opaque ``call_tir``.

The loops are recognised by what they compute, not by their name, so that a function of the user's own which happens to
be called ``pad`` is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm import tirx
from tvm.ir.expr import Call, TensorLoad


@dataclass(frozen=True)
class ElementwiseLimit:
    """output = max(input, bound), or min. ``bound`` is a number, or None where it is the second tensor argument."""

    function: Literal["maximum", "minimum"]
    bound: float | None


@dataclass(frozen=True)
class ConstantPad:
    """The input with ``before[i]`` and ``after[i]`` elements of ``value`` added on axis i."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    value: float


def recognize(function: Any) -> ElementwiseLimit | ConstantPad | None:
    """What a TIR function computes, None where it is something else."""
    if not isinstance(function, tirx.PrimFunc):
        return None
    block = _innermost_block(function.body)
    if block is None or block.init is not None or not isinstance(block.body, tirx.BufferStore):
        return None
    store = block.body
    variables = [v.var for v in block.iter_vars]
    if not _is_identity(store.indices, variables):
        return None
    if isinstance(store.value, (tirx.Max, tirx.Min)):
        return _limit(store.value, variables, function)
    return _pad(store, variables, function)


def _innermost_block(statement: Any) -> Any | None:
    """The block of a plain loop nest, None where loops or blocks do not simply nest."""
    block = None
    while True:
        if hasattr(statement, "block"):
            block = statement.block
            statement = block.body
        elif isinstance(statement, tirx.For):
            statement = statement.body
        else:
            return block


def _limit(value: Any, variables: list[Any], function: Any) -> ElementwiseLimit | None:
    name: Literal["maximum", "minimum"] = "maximum" if isinstance(value, tirx.Max) else "minimum"
    buffers = list(function.params)
    if not (isinstance(value.a, TensorLoad) and value.a.source.same_as(buffers[0])):
        return None
    if not _is_identity(value.a.indices, variables):
        return None
    if isinstance(value.b, (tirx.FloatImm, tirx.IntImm)) and len(buffers) == 2:
        return ElementwiseLimit(name, float(value.b.value))
    if isinstance(value.b, TensorLoad) and len(buffers) == 3 and value.b.source.same_as(buffers[1]):
        return ElementwiseLimit(name, None) if all(int(d) == 1 for d in buffers[1].shape) else None
    return None


def _pad(store: Any, variables: list[Any], function: Any) -> ConstantPad | None:
    value = store.value
    buffers = list(function.params)
    if isinstance(value, TensorLoad) and len(buffers) == 2 and value.source.same_as(buffers[0]):
        nothing = (0,) * len(variables)
        return ConstantPad(nothing, nothing, 0.0) if _is_identity(value.indices, variables) else None
    if not (isinstance(value, Call) and getattr(value.op, "name", "") == "prim.if_then_else"):
        return None
    condition, inside, outside = value.args
    if len(buffers) != 2 or not isinstance(outside, (tirx.FloatImm, tirx.IntImm)):
        return None
    if not (isinstance(inside, TensorLoad) and inside.source.same_as(buffers[0])):
        return None
    offsets = [_offset(i, v) for v, i in zip(variables, inside.indices, strict=True)]
    if any(o is None for o in offsets):
        return None
    before = tuple(o for o in offsets if o is not None)
    sizes = [int(d) for d in buffers[0].shape]
    after = tuple(int(o) - s - b for o, s, b in zip(buffers[1].shape, sizes, before, strict=True))
    bounds = [_inner_range(v, extent, condition) for v, extent in zip(variables, buffers[1].shape, strict=True)]
    if bounds != [(b, b + size) for b, size in zip(before, sizes, strict=True)] or min(*before, *after) < 0:
        return None
    if len(_conjuncts(condition)) != sum(_limits_one_of(c, variables) for c in _conjuncts(condition)):
        return None
    return ConstantPad(before, after, float(outside.value))


def _offset(index: Any, variable: Any) -> int | None:
    """b of an index ``variable - b``."""
    if index.same_as(variable):
        return 0
    if isinstance(index, tirx.Sub) and index.a.same_as(variable) and isinstance(index.b, tirx.IntImm):
        return int(index.b.value)
    return None


def _inner_range(variable: Any, extent: Any, condition: Any) -> tuple[int, int]:
    """Where a variable that runs over [0, extent) may be under a condition made of ``a <= v`` and ``v < b``."""
    lower, upper = 0, int(extent)
    for test in _conjuncts(condition):
        if isinstance(test, tirx.LE) and test.b.same_as(variable) and isinstance(test.a, tirx.IntImm):
            lower = max(lower, int(test.a.value))
        if isinstance(test, tirx.LT) and test.a.same_as(variable) and isinstance(test.b, tirx.IntImm):
            upper = min(upper, int(test.b.value))
    return lower, upper


def _limits_one_of(test: Any, variables: list[Any]) -> bool:
    """Whether a test is one that :func:`_inner_range` understands."""
    if isinstance(test, tirx.LE):
        return isinstance(test.a, tirx.IntImm) and any(test.b.same_as(v) for v in variables)
    return isinstance(test, tirx.LT) and isinstance(test.b, tirx.IntImm) and any(test.a.same_as(v) for v in variables)


def _conjuncts(condition: Any) -> list[Any]:
    if isinstance(condition, tirx.And):
        return _conjuncts(condition.a) + _conjuncts(condition.b)
    return [condition]


def _is_identity(indices: Any, variables: list[Any]) -> bool:
    return len(indices) == len(variables) and all(i.same_as(v) for i, v in zip(indices, variables, strict=True))
