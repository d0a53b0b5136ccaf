"""Finds functions of one variable that a model spells as chains of elementwise operators in ``main``.

HardSwish, for which Relax has no operator, arrives as::

    lv1 = R.add(x, 3)
    lv2 = R.clip(lv1, 0, 6)
    lv3 = R.divide(lv2, 6)
    lv4 = R.multiply(x, lv3)

and exporters spell GELU, ELU and others in many ways of their own. A chain is recognised by what it computes, not by
its spelling: every group of elementwise operators that depends on one tensor and on numbers alone is a function of one
variable, which is evaluated on a grid and compared with the functions that kernels have. One that is none of them
(Softplus, Mish, or what a model makes up) is a :class:`~tvm_hquant.operators.Composition` of the operators it is spelled
with, if there is one among them that has no kernel by itself: it is taken as long as it gets, but clamps and additions
that the layer before absorbs stay out of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvm_hquant.layers import constant_array, is_constant
from tvm_hquant.numerics.functions import unary_float64
from tvm_hquant.operators import Composition, Step, Unary
from tvm_hquant.relax_ir.describe import (
    UNARY_WITHOUT_PARAMETERS,
    clip_bounds,
    is_conv2d_anchor,
    is_dense_anchor,
    is_float32,
    operator_name,
    shape_of,
)
from tvm_hquant.relax_ir.main_function import variables

Doubles = npt.NDArray[np.float64]

_LONGEST_CHAIN = 12
_GRID: Doubles = np.concatenate([np.linspace(-30.0, 30.0, 1201), np.linspace(-4.0, 4.0, 1601), [-0.001, 0.0, 0.001]])
_TOLERANCE = 2e-6
"""Of the largest of 1, |x| and |f(x)|: constants such as √2 stand in models with float32's seven digits, or fewer."""

_OPERATIONS: Mapping[str, str] = {
    **{f"relax.{name}": name for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")},
    "relax.greater": "greater",
    "relax.where": "where",
    "relax.log": "log",
}
"""Operators that have a kernel only as steps of a composition."""

_LARGEST_POWER = 4
"""Up to which x · x · … stands for a power; others are computed by TVM."""


@dataclass(frozen=True, eq=False)
class FoundActivation:
    """One chain: the positions of its bindings in ascending order, the tensor that flows in, and what it computes."""

    indices: tuple[int, ...]
    data: Any
    operator: Unary


@dataclass(frozen=True, eq=False)
class _Chain:
    """Elementwise bindings at ``members``, in ascending order, that depend on ``data`` alone."""

    members: tuple[int, ...]
    data: Any


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
        if index in taken:
            continue
        chains = [
            chain
            for chain in _ending_at(index, bindings, position)
            if taken.isdisjoint(chain.members) and _is_private(chain, bindings, readers)
        ]
        if (activation := _named(chains, bindings) or _composed(chains, bindings, position)) is not None:
            taken.update(activation.indices)
            found.append(activation)
    return found[::-1]


def _ending_at(last: int, bindings: Sequence[tuple[Any, Any]], position: Mapping[Any, int]) -> Iterator[_Chain]:
    """The chains of two bindings and more that end at one, shortest first."""
    if not is_float32(bindings[last][0]):
        return
    shape = shape_of(bindings[last][1])
    members: set[int] = set()
    frontier = {bindings[last][0]}
    while len(members) <= _LONGEST_CHAIN:
        if len(frontier) == 1 and len(members) > 1:
            (data,) = frontier
            if is_float32(data) and shape_of(data) == shape:
                yield _Chain(tuple(sorted(members)), data)
        known = [v for v in frontier if v in position]
        if not known:
            return
        latest = max(known, key=lambda v: position[v])
        value = bindings[position[latest]][1]
        if not _is_elementwise(value) or shape_of(value) != shape:
            return
        members.add(position[latest])
        frontier = (frontier - {latest}) | set(variables(value))


def _is_elementwise(value: Any) -> bool:
    if clip_bounds(value) is not None:
        return True
    name = operator_name(value)
    if name == "relax.greater":
        return all(is_float32(a) and _is_operand(a) for a in value.args)
    if not is_float32(value):
        return False
    if name == "relax.astype":
        return isinstance(value.args[0], relax.Var) and _is_truth(value.args[0])
    if name == "relax.power":
        return isinstance(value.args[0], relax.Var) and _number(value.args[1]) in range(2, _LARGEST_POWER + 1)
    return (name in UNARY_WITHOUT_PARAMETERS or name in _OPERATIONS) and all(_is_operand(a) for a in value.args)


def _has_kernel(value: Any) -> bool:
    name = operator_name(value)
    of_two_tensors = name in ("relax.add", "relax.multiply") and not any(is_constant(a) for a in value.args)
    return of_two_tensors or name in UNARY_WITHOUT_PARAMETERS or clip_bounds(value) is not None


def _is_truth(expression: Any) -> bool:
    return str(getattr(expression.ty, "dtype", "")) == "bool"


def _is_operand(expression: Any) -> bool:
    return isinstance(expression, relax.Var) or _number(expression) is not None


def _number(expression: Any) -> float | None:
    """The number that a constant holds in all its elements."""
    if not is_constant(expression):
        return None
    values = constant_array(expression)
    return float(values.flat[0]) if values.size and np.all(values == values.flat[0]) else None


def _named(chains: Sequence[_Chain], bindings: Sequence[tuple[Any, Any]]) -> FoundActivation | None:
    """The shortest chain that is a function which kernels have by name."""
    for chain in chains:
        function, parameters = _composition(chain, bindings)
        if (matched := _matching_function(function, parameters)) is not None:
            return FoundActivation(chain.members, chain.data, Unary(shape_of(chain.data), *matched))
    return None


def _composed(
    chains: Sequence[_Chain], bindings: Sequence[tuple[Any, Any]], position: Mapping[Any, int]
) -> FoundActivation | None:
    """The longest chain with an operator that has no kernel by itself, without what the layer before absorbs."""
    for chain in reversed(chains):
        values = [bindings[i][1] for i in chain.members]
        source = bindings[position[chain.data]][1] if chain.data in position else None
        if not all(map(_has_kernel, values)) and not _begins_in_the_layer_of(source, chain, values):
            return FoundActivation(
                chain.members, chain.data, Unary(shape_of(chain.data), *_composition(chain, bindings))
            )
    return None


def _begins_in_the_layer_of(source: Any, chain: _Chain, values: Sequence[Any]) -> bool:
    """Whether convolutions, dense layers and additions absorb the only operator of a chain that reads its tensor."""
    if source is None:
        return False
    is_anchor = is_conv2d_anchor(source) or is_dense_anchor(source)
    reading = [value for value in values if chain.data in set(variables(value))]
    if len(reading) > 1 or not (is_anchor or operator_name(source) == "relax.add"):
        return False
    adds_numbers = operator_name(reading[0]) == "relax.add" and any(is_constant(a) for a in reading[0].args)
    return clip_bounds(reading[0]) is not None or (is_anchor and adds_numbers)


def _composition(chain: _Chain, bindings: Sequence[tuple[Any, Any]]) -> tuple[Composition, tuple[float, ...]]:
    """The operators of a chain as steps, and the numbers they take."""
    steps: list[Step] = []
    numbers: list[float] = []
    value_of: dict[Any, int] = {chain.data: 0}

    def number(value: float) -> int:
        numbers.append(float(np.float32(value)))
        return -len(numbers)

    def operand(expression: Any) -> int:
        constant = _number(expression)
        return value_of[expression] if constant is None else number(constant)

    for var, value in (bindings[i] for i in chain.members):
        name, bounds = operator_name(value), clip_bounds(value)
        if name == "relax.astype":
            value_of[var] = value_of[value.args[0]]
            continue
        if bounds is not None:
            steps.append(Step("clip", (operand(value.args[0]), *(number(b) for b in bounds))))
        elif name == "relax.power":
            base, exponent = value_of[value.args[0]], round(_number(value.args[1]) or 0.0)
            steps.append(Step("multiply", (base, base)))
            steps.extend(Step("multiply", (len(steps) + k, base)) for k in range(exponent - 2))
        else:
            function = UNARY_WITHOUT_PARAMETERS.get(name) or _OPERATIONS[name]
            steps.append(Step(function, tuple(operand(a) for a in value.args)))
        value_of[var] = len(steps)
    return Composition(tuple(steps)), tuple(numbers)


def _matching_function(composition: Composition, numbers: tuple[float, ...]) -> tuple[str, tuple[float, ...]] | None:
    values = unary_float64(composition, numbers, _GRID)
    if not np.all(np.isfinite(values)):
        return None
    slope_below = float(np.float32(-unary_float64(composition, numbers, np.array([-30.0]))[0]))
    candidates: list[tuple[str, tuple[float, ...]]] = [
        (name, ()) for name in ("hard_swish", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
    ]
    candidates += [("elu", (slope_below,)), ("leaky_relu", (float(np.float32(slope_below / 30.0)),))]
    scale = np.maximum(np.maximum(np.abs(_GRID), np.abs(values)), 1.0)
    for function, parameters in candidates:
        if np.all(np.abs(values - unary_float64(function, parameters, _GRID)) <= _TOLERANCE * scale):
            return function, parameters
    return None


def _is_private(chain: _Chain, bindings: Sequence[tuple[Any, Any]], readers: Mapping[Any, list[int]]) -> bool:
    """Whether only the chain itself reads what its members but the last compute (``main`` gives out none of them)."""
    members = set(chain.members)
    inner = [bindings[i][0] for i in chain.members[:-1]]
    return all(var in readers and set(readers[var]) <= members for var in inner)
