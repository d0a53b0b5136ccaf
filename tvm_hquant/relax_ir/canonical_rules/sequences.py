"""One-dimensional convolutions and pools become those of maps with one row, and what stands between them follows.

A tensor [N, C, W] is the map [N, C, 1, W]. Operators on the map are followed by a reshape back, which then moves behind the
elementwise operators, sums and joins that read it, until it meets the next one or an operator that needs the sequence::

    lv = R.nn.conv1d(x, W)                        lv = R.reshape(x, (N, C, 1, W))
    lv1 = R.add(lv, bias [1, C, 1])               lv1 = R.nn.conv2d(lv, W [O, I, 1, K])
    lv2 = R.nn.relu(lv1)                     →    lv2 = R.add(lv1, bias [1, C, 1, 1])
    lv3 = R.nn.max_pool1d(lv2)                    lv3 = R.nn.relu(lv2)
                                                  lv4 = R.nn.max_pool2d(lv3)
                                                  lv5 = R.reshape(lv4, (N, C, W))

The same numbers are added in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from tvm_hquant.relax_ir.describe import is_float32, operator_name, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph

_POOLS = {"relax.nn.max_pool1d": relax.op.nn.max_pool2d, "relax.nn.avg_pool1d": relax.op.nn.avg_pool2d}
_ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in (
        "add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "clip", "abs", "negative", "floor", "ceil",
        "round", "exp", "log", "sqrt", "tanh", "sigmoid", "erf", "nn.relu", "nn.relu6", "nn.leakyrelu", "nn.prelu", "nn.gelu",
        "nn.gelu_tanh", "nn.silu", "nn.softplus", "nn.selu", "nn.dropout",
    )
)  # fmt: skip


def spell_convolution_of_sequences(call: Any, graph: Graph) -> Any | None:
    """``R.nn.conv1d`` with constant weights becomes ``R.nn.conv2d`` with a window of one row."""
    if operator_name(call) != "relax.nn.conv1d" or not is_float32(call):
        return None
    weights, attributes = graph.array(call.args[1]), call.attrs
    if weights is None or (str(attributes.data_layout), str(attributes.kernel_layout)) != ("NCW", "OIW"):
        return None
    convolution = relax.op.nn.conv2d(
        map_of_sequence(call.args[0], graph),
        graph.constant_like(weights[:, :, None, :], [call.args[1]]),
        strides=_row_of(attributes.strides),
        padding=_padding(attributes.padding),
        dilation=_row_of(attributes.dilation),
        groups=int(attributes.groups),
    )
    return relax.op.reshape(graph.emit(convolution), shape_of(call))


def spell_pool_of_sequences(call: Any, graph: Graph) -> Any | None:
    """``R.nn.max_pool1d`` and ``R.nn.avg_pool1d`` become pools with a window of one row."""
    make = _POOLS.get(operator_name(call))
    if make is None or not is_float32(call) or str(call.attrs.layout) != "NCW":
        return None
    attributes = call.attrs
    pool = make(
        map_of_sequence(call.args[0], graph),
        pool_size=_row_of(attributes.pool_size),
        strides=_row_of(attributes.strides),
        padding=_padding(attributes.padding),
        dilation=_row_of(attributes.dilation),
        ceil_mode=bool(attributes.ceil_mode),
        count_include_pad=bool(attributes.count_include_pad),
    )
    return relax.op.reshape(graph.emit(pool), shape_of(call))


def move_sequence_behind_operator(call: Any, graph: Graph) -> Any | None:
    """The reshape of a map to a sequence moves behind an operator that can as well compute on the map."""
    if isinstance(call, relax.TupleGetItem):
        return _batch_norm(call, graph)
    name = operator_name(call)
    if name in ("relax.mean", "relax.max") and is_float32(call):
        return _reduction(call, graph)
    if not isinstance(call.ty, relax.TensorType) or len(call.ty.shape or ()) != 3 or not is_float32(call):
        return None
    if name in _ELEMENTWISE:
        moved = _elementwise(call, graph)
    elif name == "relax.concat":
        moved = _concat(call, graph)
    else:
        return None
    return None if moved is None else relax.op.reshape(graph.emit(moved), shape_of(call))


def _elementwise(call: Any, graph: Graph) -> Any | None:
    operands = [a for a in call.args if isinstance(a.ty, relax.TensorType)]
    tensors = [a for a in operands if graph.array(a) is None]
    if not any(_known_map(t, graph) is not None for t in tensors):
        return None
    if any(shape_of(t) != shape_of(call) for t in tensors):
        return None
    arguments = [_operand(a, graph) if isinstance(a.ty, relax.TensorType) else a for a in call.args]
    return relax.Call(call.op, arguments, call.attrs, call.ty_args)


def _operand(tensor: Any, graph: Graph) -> Any:
    values = graph.array(tensor)
    if values is None:
        return map_of_sequence(tensor, graph)
    if values.ndim < 2:
        return tensor  # broadcast along the sequence as along the row
    shape = (1,) * (3 - values.ndim) + values.shape
    return graph.constant_like(values.reshape(*shape[:2], 1, shape[2]), [tensor])


def _reduction(call: Any, graph: Graph) -> Any | None:
    """The mean or maximum along a sequence, of which the axis may be dropped."""
    inner = _known_map(call.args[0], graph)
    if inner is None or call.attrs.axis is None or [int(a) % 3 for a in call.attrs.axis] != [2]:
        return None
    make = relax.op.mean if operator_name(call) == "relax.mean" else relax.op.max
    return relax.op.reshape(graph.emit(make(inner, axis=[2, 3], keepdims=True)), shape_of(call))


def _concat(call: Any, graph: Graph) -> Any | None:
    axis = int(call.attrs.axis) % 3
    if axis == 0 or not isinstance(call.args[0], relax.Tuple):
        return None
    fields = list(call.args[0].fields)
    if not all(_known_map(field, graph) is not None for field in fields):
        return None
    return relax.op.concat([map_of_sequence(field, graph) for field in fields], axis=(0, 1, 3)[axis])


def _batch_norm(element: Any, graph: Graph) -> Any | None:
    call = graph.definition(element.tuple_value)
    if element.index != 0 or operator_name(call) != "relax.nn.batch_norm" or int(call.attrs.axis) != 1:
        return None
    inner = _known_map(call.args[0], graph)
    if inner is None:
        return None
    normalized = graph.emit(relax.Call(call.op, [inner, *call.args[1:]], call.attrs, call.ty_args))
    return relax.op.reshape(graph.emit(relax.TupleGetItem(normalized, 0)), shape_of(element))


def _known_map(tensor: Any, graph: Graph) -> Any | None:
    """The map with one row that a sequence was made of by a reshape."""
    reshape = graph.definition_of(tensor, "relax.reshape", used_once=False)
    if reshape is None or len(shape_of(tensor)) != 3:
        return None
    batch, channels, width = shape_of(tensor)
    return reshape.args[0] if shape_of(reshape.args[0]) == (batch, channels, 1, width) else None


def map_of_sequence(tensor: Any, graph: Graph) -> Any:
    """A sequence [N, C, W] as [N, C, 1, W]."""
    known = _known_map(tensor, graph)
    if known is not None:
        return known
    batch, channels, width = shape_of(tensor)
    shape = (batch, channels, 1, width)
    for var, value in graph.bindings:  # of another operator that reads the same sequence
        if operator_name(value) == "relax.reshape" and value.args[0].same_as(tensor) and shape_of(var) == shape:
            graph.uses[var] += 1
            return var
    return graph.emit(relax.op.reshape(tensor, shape))


def _row_of(values: Sequence[Any]) -> list[int]:
    """A window's size, stride or dilation along a row, and 1 along the column."""
    return [1, int(values[-1])]


def _padding(values: Sequence[Any]) -> list[int]:
    """(top, left, bottom, right) of (before, after)."""
    return [0, int(values[0]), 0, int(values[-1])]
