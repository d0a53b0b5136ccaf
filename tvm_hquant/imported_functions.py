"""Reads back what TVM's ONNX importer writes as loops: Clip, Pad and their relatives arrive as opaque ``call_tir``.

The loops are recognised by what they compute, not by their name, so that a function of the user's own which happens to
be called ``pad`` is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tvm
from tvm import tirx


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
    blocks: list[Any] = []
    tirx.stmt_functor.post_order_visit(
        function.body, lambda node: blocks.append(node) if isinstance(node, tvm.s_tir.SBlock) else None
    )
    stores = [b for b in blocks if isinstance(b.body, tirx.BufferStore)]
    if len(stores) != 1 or len(blocks) > 2 or stores[0].init is not None:
        return None
    block, store = stores[0], stores[0].body
    variables = [v.var for v in block.iter_vars]
    if not _is_identity(store.indices, variables):
        return None
    if isinstance(store.value, (tirx.Max, tirx.Min)):
        return _limit(store.value, variables, function)
    return _pad(store, variables, function)


def _limit(value: Any, variables: list[Any], function: Any) -> ElementwiseLimit | None:
    name: Literal["maximum", "minimum"] = "maximum" if isinstance(value, tirx.Max) else "minimum"
    buffers = [function.buffer_map[p] for p in function.params]
    if not (isinstance(value.a, tirx.BufferLoad) and value.a.buffer.same_as(buffers[0])):
        return None
    if not _is_identity(value.a.indices, variables):
        return None
    if isinstance(value.b, (tirx.FloatImm, tirx.IntImm)) and len(buffers) == 2:
        return ElementwiseLimit(name, float(value.b.value))
    if isinstance(value.b, tirx.BufferLoad) and len(buffers) == 3 and value.b.buffer.same_as(buffers[1]):
        return ElementwiseLimit(name, None) if all(int(d) == 1 for d in buffers[1].shape) else None
    return None


def _pad(store: Any, variables: list[Any], function: Any) -> ConstantPad | None:
    value = store.value
    if not (isinstance(value, tirx.Call) and getattr(value.op, "name", "") == "tirx.if_then_else"):
        return None
    condition, inside, outside = value.args
    buffers = [function.buffer_map[p] for p in function.params]
    if len(buffers) != 2 or not isinstance(outside, (tirx.FloatImm, tirx.IntImm)):
        return None
    if not (isinstance(inside, tirx.BufferLoad) and inside.buffer.same_as(buffers[0])):
        return None
    analyzer = tvm.arith.Analyzer()
    offsets = [analyzer.simplify(v - i) for v, i in zip(variables, inside.indices, strict=True)]
    if not all(isinstance(o, tirx.IntImm) for o in offsets):
        return None
    before = tuple(int(o) for o in offsets)
    sizes = [int(d) for d in buffers[0].shape]
    after = tuple(int(o) - s - b for o, s, b in zip(buffers[1].shape, sizes, before, strict=True))
    expected = [
        test
        for v, b, a, size in zip(variables, before, after, sizes, strict=True)
        for test in (tirx.all(b <= v), tirx.all(v < b + size))
    ]
    if not _same_condition(condition, expected, analyzer, variables, buffers[1].shape):
        return None
    return ConstantPad(before, after, float(outside.value))


def _same_condition(condition: Any, tests: list[Any], analyzer: Any, variables: list[Any], extents: Any) -> bool:
    """Whether a condition is true exactly where all the tests are, for variables that run over the output."""
    for variable, extent in zip(variables, extents, strict=True):
        analyzer.bind(variable, tvm.ir.Range(0, extent))
    given = [analyzer.simplify(c) for c in _conjuncts(condition)]
    wanted = [analyzer.simplify(t) for t in tests]
    given, wanted = [[c for c in side if not _is_true(c)] for side in (given, wanted)]
    return all(any(tvm.ir.structural_equal(g, w) for w in wanted) for g in given) and all(
        any(tvm.ir.structural_equal(g, w) for g in given) for w in wanted
    )


def _conjuncts(condition: Any) -> list[Any]:
    if isinstance(condition, tirx.And):
        return _conjuncts(condition.a) + _conjuncts(condition.b)
    return [condition]


def _is_true(condition: Any) -> bool:
    return isinstance(condition, tirx.IntImm) and bool(condition.value)


def _is_identity(indices: Any, variables: list[Any]) -> bool:
    return len(indices) == len(variables) and all(i.same_as(v) for i, v in zip(indices, variables, strict=True))
