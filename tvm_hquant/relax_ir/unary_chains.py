"""Finds activations that a model spells as chains of elementwise operators in ``main``.

HardSwish, for which Relax has no operator, arrives as::

    lv1 = R.add(x, 3)
    lv2 = R.clip(lv1, 0, 6)
    lv3 = R.divide(lv2, 6)
    lv4 = R.multiply(x, lv3)

and exporters spell GELU, ELU and others in many ways of their own. A chain is recognised by what it computes, not by
its spelling: every group of elementwise operators that depends on one tensor and on numbers alone is a function of one
variable, which is evaluated on a grid and compared with the functions that kernels have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special
from tvm import relax

from tvm_hquant.layers import constant_array, is_constant
from tvm_hquant.numerics.functions import unary_float64
from tvm_hquant.operators import Unary
from tvm_hquant.relax_ir.describe import clip_bounds, is_float32, operator_name, shape_of
from tvm_hquant.relax_ir.main_function import variables

Doubles = npt.NDArray[np.float64]

_LONGEST_CHAIN = 12
_GRID: Doubles = np.concatenate([np.linspace(-30.0, 30.0, 1201), np.linspace(-4.0, 4.0, 1601), [-0.001, 0.0, 0.001]])
_TOLERANCE = 2e-6
"""Of the largest of 1, |x| and |f(x)|: constants such as √2 stand in models with float32's seven digits, or fewer."""

_ARITHMETIC: Mapping[str, Callable[..., Doubles]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.power": np.power,
    "relax.abs": np.abs,
    "relax.negative": np.negative,
    "relax.exp": np.exp,
    "relax.tanh": np.tanh,
    "relax.sigmoid": special.expit,
    "relax.erf": special.erf,
}


@dataclass(frozen=True, eq=False)
class FoundActivation:
    """One chain: the positions of its bindings in ascending order, the tensor that flows in, and what it computes."""

    indices: tuple[int, ...]
    data: Any
    operator: Unary


def find_activations(bindings: Sequence[tuple[Any, Any]]) -> list[FoundActivation]:
    """All chains of at least two of the (variable, value) pairs whose tensors in between nothing else reads."""
    position = {var: i for i, (var, _) in enumerate(bindings)}
    readers: dict[Any, list[int]] = {}
    for index, (_, value) in enumerate(bindings):
        for var in variables(value):
            readers.setdefault(var, []).append(index)
    found: list[FoundActivation] = []
    taken: set[int] = set()
    # The longest chain that ends at a binding contains those that end before it.
    for index in reversed(range(len(bindings))):
        if index in taken or (activation := _ending_at(index, bindings, position, readers)) is None:
            continue
        taken.update(activation.indices)
        found.append(activation)
    return found[::-1]


def _ending_at(
    last: int, bindings: Sequence[tuple[Any, Any]], position: Mapping[Any, int], readers: Mapping[Any, list[int]]
) -> FoundActivation | None:
    shape = shape_of(bindings[last][1]) if is_float32(bindings[last][0]) else None
    if shape is None or not _is_elementwise(bindings[last][1]):
        return None
    chain = {last}
    frontier = set(variables(bindings[last][1]))
    while len(chain) <= _LONGEST_CHAIN:
        if len(frontier) == 1 and len(chain) > 1:
            (data,) = frontier
            if not is_float32(data) or shape_of(data) != shape:
                return None
            members = sorted(chain)
            matched = _matching_function(data, [bindings[i] for i in members])
            if matched is not None and _is_private(chain, last, bindings, readers):
                return FoundActivation(tuple(members), data, Unary(shape, *matched))
        known = [v for v in frontier if v in position]
        if not known:
            return None
        latest = max(known, key=lambda v: position[v])
        if not _is_elementwise(bindings[position[latest]][1]):
            return None
        chain.add(position[latest])
        frontier = (frontier - {latest}) | set(variables(bindings[position[latest]][1]))
    return None


def _is_elementwise(value: Any) -> bool:
    if clip_bounds(value) is not None:
        return True
    if operator_name(value) not in _ARITHMETIC or not is_float32(value):
        return False
    return all(isinstance(a, relax.Var) or _number(a) is not None for a in value.args)


def _number(expression: Any) -> float | None:
    """The number that a constant holds in all its elements."""
    if not is_constant(expression):
        return None
    values = constant_array(expression)
    return float(values.flat[0]) if values.size and np.all(values == values.flat[0]) else None


def _matching_function(data: Any, chain: Sequence[tuple[Any, Any]]) -> tuple[str, tuple[float, ...]] | None:
    values = _evaluate(data, chain, _GRID)
    if not np.all(np.isfinite(values)):
        return None
    slope_below = float(np.float32(-_evaluate(data, chain, np.array([-30.0]))[0]))
    candidates: list[tuple[str, tuple[float, ...]]] = [
        (name, ()) for name in ("hard_swish", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
    ]
    candidates += [("elu", (slope_below,)), ("leaky_relu", (float(np.float32(slope_below / 30.0)),))]
    scale = np.maximum(np.maximum(np.abs(_GRID), np.abs(values)), 1.0)
    for function, parameters in candidates:
        if np.all(np.abs(values - unary_float64(function, parameters, _GRID)) <= _TOLERANCE * scale):
            return function, parameters
    return None


def _evaluate(data: Any, chain: Sequence[tuple[Any, Any]], x: Doubles) -> Doubles:
    known: dict[Any, Any] = {data: x}
    with np.errstate(all="ignore"):
        for var, value in chain:
            arguments: list[Any] = [known[a] if isinstance(a, relax.Var) else _number(a) for a in value.args[:2]]
            bounds = clip_bounds(value)
            if bounds is not None:
                known[var] = np.clip(arguments[0], *bounds)
            else:
                known[var] = _ARITHMETIC[operator_name(value)](*arguments)
    result: Doubles = np.broadcast_to(known[chain[-1][0]], x.shape)
    return result


def _is_private(
    chain: set[int], last: int, bindings: Sequence[tuple[Any, Any]], readers: Mapping[Any, list[int]]
) -> bool:
    """Whether only the chain itself reads what its members but the last compute (``main`` gives out none of them)."""
    return all(set(readers.get(bindings[i][0], ())) <= chain and bindings[i][0] in readers for i in chain - {last})
