"""Batch normalization and other per-channel scales and shifts, folded into the layer before them in float64.

y = scale · (W x + b) + shift becomes (scale · W) x + (scale · b + shift) [Jacob et al. 2018, arXiv 1712.05877, §3.2].
Where no convolution or dense layer comes before, a scale per channel of a feature map becomes a depthwise 1×1
convolution, which can be quantized like any other (DenseNet has one in front of every convolution).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvm_hquant.errors import ModelError
from tvm_hquant.relax_ir.describe import is_float32, operator_name, permutation, scalar_factor, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Anchor:
    """A convolution or dense layer with constant weights, and its bias if it has one already."""

    call: Any
    bias: Any | None

    @property
    def is_convolution(self) -> bool:
        return operator_name(self.call) == "relax.nn.conv2d"

    @property
    def channels(self) -> int:
        return shape_of(self.call)[1 if self.is_convolution else -1]

    @property
    def bias_shape(self) -> tuple[int, ...]:
        return (1, self.channels, 1, 1) if self.is_convolution else (self.channels,)


def fold_batch_norm(element: Any, graph: Graph) -> Any | None:
    """The first result of ``R.nn.batch_norm``."""
    if not isinstance(element, relax.TupleGetItem) or element.index != 0:
        return None
    call = graph.definition(element.tuple_value)
    if operator_name(call) != "relax.nn.batch_norm":
        return None
    data = call.args[0]
    arrays = [graph.array(a) for a in call.args[1:5]]
    gamma, beta, mean, variance = arrays
    if gamma is None or beta is None or mean is None or variance is None or not is_float32(data):
        return None
    name = graph.name_of(call.args[1], "batch_norm")
    if bool(getattr(call.attrs, "training", False)):
        raise ModelError(
            f"the batch normalization with weight {name} is in training mode: export the model for inference"
        )
    with np.errstate(all="ignore"):
        scale = 1.0 / np.sqrt(variance.astype(np.float64) + float(call.attrs.epsilon))
    if not np.all(np.isfinite(scale)):
        raise ModelError(
            f"the batch normalization with weight {name} has a variance + epsilon that is not positive: repair the model"
        )
    scale = scale * gamma if bool(call.attrs.scale) else scale
    shift = (beta.astype(np.float64) if bool(call.attrs.center) else 0.0) - mean.astype(np.float64) * scale
    axis = int(call.attrs.axis) % len(shape_of(data))
    names = (call.args[1], call.args[2])
    return _scaled_and_shifted(data, scale, np.asarray(shift), axis, names, graph)


def fold_scale_and_shift(call: Any, graph: Graph) -> Any | None:
    """Addition, subtraction, multiplication or division of a tensor and a constant per channel (or one for all)."""
    name = operator_name(call)
    if name not in ("relax.add", "relax.subtract", "relax.multiply", "relax.divide") or not is_float32(call):
        return None
    data, other = call.args
    if graph.array(data) is not None:
        # Constants go to the right; what remains, constant − x and constant / x, is no scale or shift.
        return relax.Call(call.op, [other, data], call.attrs) if name in ("relax.add", "relax.multiply") else None
    values = graph.array(other)
    if values is None or shape_of(data) != shape_of(call):
        return None
    if name == "relax.subtract":
        return relax.op.add(data, graph.constant_like(-values, [other]))
    rank = len(shape_of(data))
    anchor = _find_anchor(data, graph)
    axis = 1 if rank == 4 and (anchor is None or anchor.is_convolution) else rank - 1
    vector = _per_channel(values, rank, axis, shape_of(data)[axis])
    if vector is None:
        return None
    if name == "relax.add":
        return None if anchor is None else _shifted(call, anchor, vector, other, graph)
    scale = 1.0 / vector if name == "relax.divide" else vector
    if anchor is None and (rank != 4 or values.size == 1):
        return None
    return _scaled_and_shifted(data, scale, None, axis, (other, other), graph)


def fold_scale_before_dense(call: Any, graph: Graph) -> Any | None:
    """``R.matmul(x · number, W)`` becomes ``R.matmul(x, number · W)`` (the alpha of ONNX Gemm)."""
    if operator_name(call) != "relax.matmul":
        return None
    weights, product = graph.array(call.args[1]), graph.definition_of(call.args[0], "relax.multiply")
    if weights is None or product is None:
        return None
    factor = graph.array(product.args[1])
    if factor is None or factor.size != 1:
        return None
    scaled = weights.astype(np.float64) * factor.astype(np.float64).reshape(())
    return relax.op.matmul(product.args[0], graph.weight(scaled, graph.name_of(call.args[1], "dense.weight")))


def move_factor_behind_matmul(call: Any, graph: Graph) -> Any | None:
    """``R.matmul(a · number, b)`` of two activations becomes ``R.matmul(a, b) · number`` (attention scales its queries).

    The number may stand before reshapes and permutations of a matrix.
    """
    if operator_name(call) != "relax.matmul" or any(graph.array(a) is not None for a in call.args):
        return None
    for index, matrix in enumerate(call.args):
        found = _without_factor(matrix, graph)
        if found is not None:
            moved, factor = found
            matrices = [moved if i == index else a for i, a in enumerate(call.args)]
            return relax.op.multiply(graph.emit(relax.op.matmul(*matrices)), relax.const(factor, "float32"))
    return None


def _without_factor(tensor: Any, graph: Graph) -> tuple[Any, float] | None:
    """A tensor without the number that it was multiplied by, and that number."""
    for name in ("relax.multiply", "relax.divide"):
        scaled = graph.definition_of(tensor, name)
        factor = scalar_factor(scaled, graph.array) if scaled is not None else None
        if factor is not None and shape_of(scaled.args[0]) == shape_of(scaled):
            return scaled.args[0], factor
    for name in ("relax.permute_dims", "relax.reshape"):
        moved = graph.definition_of(tensor, name)
        inner = _without_factor(moved.args[0], graph) if moved is not None else None
        if inner is not None:
            bare, factor = inner
            if name == "relax.reshape":
                return graph.emit(relax.op.reshape(bare, shape_of(moved))), factor
            return graph.emit(relax.op.permute_dims(bare, permutation(moved))), factor
    return None


def _scaled_and_shifted(
    data: Any, scale: Array, shift: Array | None, axis: int, names: tuple[Any, Any], graph: Graph
) -> Any | None:
    """scale · data + shift, all vectors over the channels on ``axis``."""
    anchor = _find_anchor(data, graph)
    shape = shape_of(data)
    if anchor is not None and axis == (1 if anchor.is_convolution else len(shape) - 1):
        return _with_affine(anchor, scale, shift, graph)
    if len(shape) == 4 and axis == 1:
        return _depthwise(data, scale, shift, names, graph)
    constant_shape = [1] * (len(shape) - axis)
    constant_shape[0] = shape[axis]
    scaled = relax.op.multiply(data, _named(scale.reshape(constant_shape), names[0], graph, "scale"))
    if shift is None:
        return scaled
    return relax.op.add(graph.emit(scaled), _named(shift.reshape(constant_shape), names[1], graph, "shift"))


def _depthwise(data: Any, scale: Array, shift: Array | None, names: tuple[Any, Any], graph: Graph) -> Any:
    channels = shape_of(data)[1]
    before = graph.definition_of(data, "relax.add")
    if before is not None and (values := graph.array(before.args[1])) is not None:
        vector = _per_channel(values, 4, 1, channels)
        if vector is not None and shape_of(before.args[0]) == shape_of(data):
            data = before.args[0]
            shift = vector * scale + (0.0 if shift is None else shift)
    weights = _named(scale.reshape(channels, 1, 1, 1), names[0], graph, "depthwise")
    result = relax.op.nn.conv2d(data, weights, groups=channels)
    if shift is None:
        return result
    name = names[1] if not names[1].same_as(names[0]) else None
    bias_name = graph.name_of(name, "") if name is not None else ""
    bias = graph.weight(shift.reshape(1, channels, 1, 1), bias_name or f"{weights.name}.bias")
    return relax.op.add(graph.emit(result), bias)


def _with_affine(anchor: _Anchor, scale: Array, shift: Array | None, graph: Graph) -> Any:
    weights = graph.array(anchor.call.args[1])
    assert weights is not None
    along_output = (-1, 1, 1, 1) if anchor.is_convolution else (1, -1)
    name = graph.name_of(anchor.call.args[1], "") or graph.fresh_weight_name(_kind(anchor))
    scaled = graph.weight(weights.astype(np.float64) * scale.reshape(along_output), name)
    call = relax.Call(anchor.call.op, [anchor.call.args[0], scaled], anchor.call.attrs)
    old = _bias_values(anchor, graph)
    if old is None and shift is None:
        return call
    total = (0.0 if old is None else old * scale) + (0.0 if shift is None else shift)
    return relax.op.add(graph.emit(call), _bias(anchor, np.asarray(total), anchor.bias, name, graph))


def _shifted(call: Any, anchor: _Anchor, vector: Array, constant: Any, graph: Graph) -> Any | None:
    """The bias addition ``call`` behind an anchor, in its one spelling; None where it has that already."""
    if anchor.bias is None and shape_of(constant) == anchor.bias_shape:
        return None
    name = graph.name_of(anchor.call.args[1], _kind(anchor))
    old = _bias_values(anchor, graph)
    total = vector if old is None else old + vector
    named = constant if anchor.bias is None else anchor.bias
    data = call.args[0] if anchor.bias is None else graph.definition(call.args[0]).args[0]
    return relax.op.add(data, _bias(anchor, total, named, name, graph))


def _bias(anchor: _Anchor, values: Array, source: Any | None, weight_name: str, graph: Graph) -> Any:
    name = graph.name_of(source, "") if source is not None else ""
    return graph.weight(values.reshape(anchor.bias_shape), name or f"{weight_name}.bias")


def _bias_values(anchor: _Anchor, graph: Graph) -> Array | None:
    values = graph.array(anchor.bias) if anchor.bias is not None else None
    return None if values is None else values.astype(np.float64).reshape(-1)


def _named(values: Array, source: Any, graph: Graph, kind: str) -> Any:
    return graph.weight(values, graph.name_of(source, "") or graph.fresh_weight_name(kind))


def _kind(anchor: _Anchor) -> str:
    return "conv2d" if anchor.is_convolution else "dense"


def _find_anchor(tensor: Any, graph: Graph) -> _Anchor | None:
    """The convolution or dense layer that makes a tensor which nothing else reads, directly or with a bias."""
    call, bias = graph.definition(tensor), None
    if call is None or graph.uses[tensor] > 1:
        return None
    if operator_name(call) == "relax.add" and graph.array(call.args[1]) is not None:
        inner = graph.definition(call.args[0])
        if not _is_anchor(inner, graph) or graph.uses[call.args[0]] > 1:
            return None
        anchor = _Anchor(inner, call.args[1])
        return anchor if shape_of(call.args[1]) == anchor.bias_shape else None
    return _Anchor(call, bias) if _is_anchor(call, graph) else None


def _is_anchor(call: Any, graph: Graph) -> bool:
    name = operator_name(call)
    if name == "relax.nn.conv2d":
        is_plain = str(call.attrs.data_layout) == "NCHW" and str(call.attrs.kernel_layout) == "OIHW"
        return is_plain and graph.array(call.args[1]) is not None and is_float32(call)
    return (
        name == "relax.matmul"
        and graph.array(call.args[1]) is not None
        and len(shape_of(call.args[1])) == 2
        and len(shape_of(call.args[0])) >= 2
        and is_float32(call)
    )


def _per_channel(values: Array, rank: int, axis: int, channels: int) -> Array | None:
    """A constant as float64 vector over the channels, None where it varies along another axis."""
    if values.ndim > rank:
        return None
    shape = (1,) * (rank - values.ndim) + values.shape
    if any(size != 1 for i, size in enumerate(shape) if i != axis) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(values.astype(np.float64).reshape(-1), (channels,))
