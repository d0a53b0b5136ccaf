"""Layer, instance and group normalization: chains of operators become one call, scales and shifts its gamma and beta.

Exporters write (x − mean) / √(variance + epsilon) with elementwise operators where the opset has no such normalization, and
TVM imports ONNX's InstanceNormalization so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvm_hquant.relax_ir.describe import is_float32, normalized_axes, operator_name, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph

Array = npt.NDArray[Any]

_NORMALIZATIONS = ("relax.nn.layer_norm", "relax.nn.group_norm")


def spell_normalization(call: Any, graph: Graph) -> Any | None:
    """``(x − mean(x)) / sqrt(mean((x − mean(x))²) + epsilon)``, over trailing axes or over all behind the channels."""
    if operator_name(call) not in ("relax.divide", "relax.multiply") or not is_float32(call):
        return None
    for deviation, factor in (tuple(call.args), tuple(call.args)[::-1]):
        root = _root(factor, graph, operator_name(call) == "relax.divide")
        data = _deviating(deviation, graph)
        if data is None or root is None:
            continue
        x, axes = data
        epsilon = _epsilon_of(root, x, axes, graph)
        if epsilon is not None and shape_of(call) == shape_of(x):
            return _normalization(x, axes, epsilon)
    return None


def spell_instance_norm(call: Any, graph: Graph) -> Any | None:
    """``R.nn.instance_norm`` is ``R.nn.group_norm`` with a group for each channel."""
    if operator_name(call) != "relax.nn.instance_norm":
        return None
    attributes, shape = call.attrs, shape_of(call)
    axis = int(attributes.channel_axis) % len(shape)
    return relax.op.nn.group_norm(
        *call.args,
        num_groups=shape[axis],
        channel_axis=axis,
        axes=[int(a) % len(shape) for a in attributes.axes],
        epsilon=float(attributes.epsilon),
        center=bool(attributes.center),
        scale=bool(attributes.scale),
    )


def spell_group_norm(call: Any, graph: Graph) -> Any | None:
    """``reshape(layer_norm(reshape(x, [N, groups, …])))`` over all that a group has, without gamma and beta."""
    if operator_name(call) != "relax.reshape":
        return None
    # Readers that another rule dropped in this round, products with ones, still count.
    inner = graph.definition_of(call.args[0], "relax.nn.layer_norm", used_once=False)
    outer = graph.definition_of(inner.args[0], "relax.reshape", used_once=False) if inner is not None else None
    if outer is None or not is_float32(outer.args[0]):
        return None
    x = outer.args[0]
    shape, grouped = shape_of(x), shape_of(outer)
    gamma, beta = (graph.array(a) for a in inner.args[1:3])
    if gamma is None or beta is None or np.any(gamma != 1) or np.any(beta != 0):
        return None
    if shape_of(call) != shape or len(shape) < 3 or len(grouped) < 3 or shape[0] != grouped[0]:
        return None
    if normalized_axes(inner) != tuple(range(2, len(grouped))) or shape[1] % grouped[1]:
        return None
    return _group_norm(x, grouped[1], float(inner.attrs.epsilon))


def fold_scale_and_shift(call: Any, graph: Graph) -> Any | None:
    """``layer_norm(x, gamma, beta) · scale`` becomes ``layer_norm(x, gamma · scale, beta · scale)``; sums change beta."""
    name = operator_name(call)
    if name not in ("relax.add", "relax.subtract", "relax.multiply", "relax.divide") or not is_float32(call):
        return None
    data, other = call.args
    if graph.array(data) is not None and name in ("relax.add", "relax.multiply"):
        data, other = other, data
    values = graph.array(other)
    inner = next((c for n in _NORMALIZATIONS if (c := graph.definition_of(data, n)) is not None), None)
    if values is None or inner is None or shape_of(data) != shape_of(call):
        return None
    gamma, beta = (graph.array(a) for a in inner.args[1:3])
    if gamma is None or beta is None or not (bool(inner.attrs.center) and bool(inner.attrs.scale)):
        return None
    aligned = _as_gamma(values, inner, gamma)
    if aligned is None:
        return None
    gamma, beta = gamma.astype(np.float64), beta.astype(np.float64)
    if name in ("relax.add", "relax.subtract"):
        arrays = gamma, beta + (aligned if name == "relax.add" else -aligned)
    else:
        with np.errstate(divide="ignore"):
            scale = aligned if name == "relax.multiply" else 1.0 / aligned
        if not np.all(np.isfinite(scale)):
            return None
        arrays = gamma * scale, beta * scale
    is_shift = name in ("relax.add", "relax.subtract")
    named = ((inner.args[1],), (other, inner.args[2])) if is_shift else ((other, inner.args[1]), (inner.args[2],))
    weights = [graph.constant_like(v, sources) for v, sources in zip(arrays, named, strict=True)]
    return relax.Call(inner.op, [inner.args[0], *weights], inner.attrs)


def _as_gamma(values: Array, call: Any, gamma: Array) -> Array | None:
    """A constant beside a normalization's result as float64 of gamma's shape; None where it varies along other axes."""
    shape = shape_of(call)
    axes = normalized_axes(call)
    if operator_name(call) == "relax.nn.group_norm":
        axes = (int(call.attrs.channel_axis) % len(shape),)
    if values.ndim > len(shape):
        return None
    full = (1,) * (len(shape) - values.ndim) + values.shape
    if any(size != 1 for axis, size in enumerate(full) if axis not in axes):
        return None
    own = values.astype(np.float64).reshape([full[axis] for axis in axes])
    return np.ascontiguousarray(np.broadcast_to(own, gamma.shape))


def _root(factor: Any, graph: Graph, divides: bool) -> Any | None:
    """What is under the root in a factor: v of √v where it divides, of 1 / √v where it multiplies."""
    if divides:
        root = graph.definition_of(factor, "relax.sqrt", used_once=False)
        if root is not None:
            return root.args[0]
        power = graph.definition_of(factor, "relax.power", used_once=False)
        return power.args[0] if power is not None and _number(power.args[1], graph) == 0.5 else None
    reciprocal = graph.definition_of(factor, "relax.rsqrt", used_once=False)
    if reciprocal is not None:
        return reciprocal.args[0]
    quotient = graph.definition_of(factor, "relax.divide", used_once=False)
    if quotient is not None and _number(quotient.args[0], graph) == 1:
        return _root(quotient.args[1], graph, True)
    return None


def _deviating(tensor: Any, graph: Graph) -> tuple[Any, tuple[int, ...]] | None:
    """x and the axes of its mean, of x − mean(x)."""
    difference = graph.definition_of(tensor, "relax.subtract", used_once=False)
    if difference is None:
        return None
    x, mean = difference.args
    axes = _mean_axes(graph.definition_of(mean, "relax.mean", used_once=False), x)
    return None if axes is None else (x, axes)


def _mean_axes(call: Any, x: Any) -> tuple[int, ...] | None:
    """The axes of a mean or a variance of a tensor that keeps them; None for another call."""
    if call is None or not call.args[0].same_as(x) or call.attrs.axis is None or not bool(call.attrs.keepdims):
        return None
    rank = len(shape_of(x))
    return tuple(sorted(int(axis) % rank for axis in call.attrs.axis))


def _epsilon_of(root: Any, x: Any, axes: tuple[int, ...], graph: Graph) -> float | None:
    """Epsilon of variance(x) + epsilon; None where that is something else."""
    total = graph.definition_of(root, "relax.add", used_once=False)
    if total is None:
        return None
    for variance, epsilon in (tuple(total.args), tuple(total.args)[::-1]):
        number = _number(epsilon, graph)
        if number is not None and _is_variance(variance, x, axes, graph):
            return number
    return None


def _is_variance(tensor: Any, x: Any, axes: tuple[int, ...], graph: Graph) -> bool:
    if _mean_axes(graph.definition_of(tensor, "relax.variance", used_once=False), x) == axes:
        return True
    mean = graph.definition_of(tensor, "relax.mean", used_once=False)
    if mean is None or _mean_axes(mean, mean.args[0]) != axes:
        return False
    squared = _squared(mean.args[0], graph)
    found = None if squared is None else _deviating(squared, graph)
    return found is not None and found[0].same_as(x) and found[1] == axes


def _squared(tensor: Any, graph: Graph) -> Any | None:
    """d of d², d · d or square(d)."""
    call = graph.definition(tensor)
    match operator_name(call):
        case "relax.power" if _number(call.args[1], graph) == 2:
            return call.args[0]
        case "relax.multiply" if call.args[0].same_as(call.args[1]):
            return call.args[0]
        case "relax.square":
            return call.args[0]
    return None


def _number(expression: Any, graph: Graph) -> float | None:
    values = graph.array(expression)
    return float(values.reshape(())) if values is not None and values.size == 1 else None


def _normalization(x: Any, axes: tuple[int, ...], epsilon: float) -> Any | None:
    shape = shape_of(x)
    if len(shape) >= 4 and axes == tuple(range(2, len(shape))):
        return _group_norm(x, shape[1], epsilon)
    if axes != tuple(range(len(shape) - len(axes), len(shape))):
        return None
    own = [shape[axis] for axis in axes]
    gamma, beta = (relax.const(v, "float32") for v in (np.ones(own, np.float32), np.zeros(own, np.float32)))
    return relax.op.nn.layer_norm(x, gamma, beta, list(axes), epsilon)


def _group_norm(x: Any, groups: int, epsilon: float) -> Any:
    shape = shape_of(x)
    gamma, beta = (relax.const(v, "float32") for v in (np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)))
    axes = list(range(2, len(shape)))
    return relax.op.nn.group_norm(x, gamma, beta, num_groups=groups, channel_axis=1, axes=axes, epsilon=epsilon)
