"""How each Relax operator is written when its feature maps are stored channels-last.

A handler takes the model's call and returns the call that computes the same from tensors as they are stored, with the
order of its result; None where the operator has to be given its tensors in the model's order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from tvm_hquant.operators import Shape
from tvm_hquant.relax_ir.describe import normalized_axes, operator_name, permutation, shape_of
from tvm_hquant.stored_tensors import CHANNELS_LAST, StoredTensor, TensorMap

_EXPANDED: tuple[int, ...] = (0, 3, 4, 2, 1)
"""[N, 1, C, H, W] stored as [N, H, W, C, 1]: how local response normalization pools over channels."""

_ELEMENTWISE = (
    *(
        f"relax.{n}"
        for n in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "clip", "sigmoid")
    ),
    *(
        f"relax.{n}"
        for n in ("tanh", "exp", "log", "abs", "negative", "sqrt", "rsqrt", "erf", "round", "floor", "ceil")
    ),
    *(f"relax.{n}" for n in ("sign", "square", "astype", "greater", "less", "equal", "where", "isnan", "isinf")),
    *(f"relax.nn.{n}" for n in ("relu", "relu6", "leakyrelu", "gelu", "gelu_tanh", "silu", "softplus", "elu", "selu")),
)


@dataclass(frozen=True, eq=False)
class Readers:
    """Who reads each variable of the model."""

    calls: Mapping[Any, tuple[Any, ...]]
    counts: Counter[Any]

    def only_reader(self, var: Any) -> Any | None:
        """The one call that reads a variable, None if there are several or the value leaves the function."""
        return self.calls[var][0] if self.counts[var] == 1 and len(self.calls.get(var, ())) == 1 else None


Handler = Callable[[Any, Any, TensorMap, Readers], StoredTensor | None]


def convert_call(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    """The stored form of what ``var = call`` computes, emitted into the graph of ``tensors``; None: no special form."""
    name = operator_name(call)
    handler = _elementwise if name in _ELEMENTWISE else _HANDLERS.get(name)
    return None if handler is None else handler(var, call, tensors, readers)


def _emitted(call: Any, order: tuple[int, ...], tensors: TensorMap) -> StoredTensor:
    return StoredTensor(tensors.graph.emit(call), order)


def _convolution(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    attributes = call.attrs
    if str(attributes.data_layout) != "NCHW" or str(attributes.out_layout) not in ("", "NCHW"):
        return None
    converted = relax.op.nn.conv2d(
        tensors.channels_last(call.args[0]),
        tensors.plain(call.args[1]),
        strides=list(attributes.strides),
        padding=list(attributes.padding),
        dilation=list(attributes.dilation),
        groups=int(attributes.groups),
        data_layout="NHWC",
        kernel_layout=str(attributes.kernel_layout),
        out_dtype=attributes.out_dtype,
    )
    return _emitted(converted, CHANNELS_LAST, tensors)


def _pool(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    attributes = call.attrs
    if str(attributes.layout) != "NCHW" or str(attributes.out_layout) not in ("", "NCHW"):
        return None
    is_max = operator_name(call) == "relax.nn.max_pool2d"
    make = relax.op.nn.max_pool2d if is_max else relax.op.nn.avg_pool2d
    converted = make(
        tensors.channels_last(call.args[0]),
        pool_size=list(attributes.pool_size),
        strides=list(attributes.strides),
        padding=list(attributes.padding),
        dilation=list(attributes.dilation),
        ceil_mode=bool(attributes.ceil_mode),
        count_include_pad=bool(attributes.count_include_pad),
        layout="NHWC",
    )
    return _emitted(converted, CHANNELS_LAST, tensors)


def _resize(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    attributes = call.attrs
    if str(attributes.layout) != "NCHW":
        return None
    converted = relax.op.image.resize2d(
        tensors.channels_last(call.args[0]),
        size=call.args[1],
        roi=list(attributes.roi),
        layout="NHWC",
        method=str(attributes.method),
        coordinate_transformation_mode=str(attributes.coordinate_transformation_mode),
        rounding_method=str(attributes.rounding_method),
        cubic_alpha=float(attributes.cubic_alpha),
        cubic_exclude=int(attributes.cubic_exclude),
        extrapolation_value=float(attributes.extrapolation_value),
    )
    return _emitted(converted, CHANNELS_LAST, tensors)


def _channel_window_mean(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    tensor, attributes = tensors.of(call.args[0]), call.attrs
    if (
        tensor.order != _EXPANDED
        or str(attributes.layout) != "NCDHW"
        or str(attributes.out_layout) not in ("", "NCDHW")
    ):
        return None
    front, top, left, back, bottom, right = (int(p) for p in attributes.padding)

    def moved(values: Any) -> list[int]:
        channel, row, column = (int(v) for v in values)
        return [row, column, channel]

    converted = relax.op.nn.avg_pool3d(
        tensor.expression,
        pool_size=moved(attributes.pool_size),
        strides=moved(attributes.strides),
        padding=[top, left, front, bottom, right, back],
        dilation=moved(attributes.dilation),
        ceil_mode=bool(attributes.ceil_mode),
        count_include_pad=bool(attributes.count_include_pad),
        layout="NDHWC",
    )
    return _emitted(converted, _EXPANDED, tensors)


def _elementwise(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    operands = [a for a in call.args if isinstance(getattr(a, "ty", None), relax.TensorType)]
    if len(shape_of(call)) != 4 or not any(tensors.of(a).order == CHANNELS_LAST for a in operands):
        return None
    arguments = [tensors.broadcast_channels_last(a) if a in operands else a for a in call.args]
    return _emitted(relax.Call(call.op, arguments, call.attrs, call.ty_args), CHANNELS_LAST, tensors)


def _concat(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    fields = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
    if len(shape_of(call)) != 4 or not any(tensors.of(f).order == CHANNELS_LAST for f in fields):
        return None
    axis = CHANNELS_LAST.index(int(call.attrs.axis) % 4)
    return _emitted(relax.op.concat([tensors.channels_last(f) for f in fields], axis), CHANNELS_LAST, tensors)


def _pad(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    tensor = tensors.of(call.args[0])
    if tensor.order != CHANNELS_LAST:
        return None
    widths = [int(w) for w in call.attrs.pad_width]
    moved = [w for axis in CHANNELS_LAST for w in widths[2 * axis : 2 * axis + 2]]
    mode, value = str(call.attrs.pad_mode), float(call.attrs.pad_value)
    return _emitted(relax.op.nn.pad(tensor.expression, moved, pad_mode=mode, pad_value=value), CHANNELS_LAST, tensors)


def _strided_slice(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    tensor = tensors.of(call.args[0])
    lists = [[int(v) for v in a.fields] for a in call.args[1:] if isinstance(a, relax.Tuple)]
    if tensor.order != CHANNELS_LAST or len(lists) != 4:
        return None
    axes, begins, ends, strides = lists
    moved = sorted(zip((tensor.stored_axis(a) for a in axes), begins, ends, strides, strict=True))
    columns = [list(c) for c in zip(*moved, strict=True)]
    return _emitted(relax.op.strided_slice(tensor.expression, *columns), CHANNELS_LAST, tensors)


def _take(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    tensor = tensors.of(call.args[0])
    if tensor.order != CHANNELS_LAST or call.attrs.axis is None or len(shape_of(call.args[1])) != 1:
        return None
    axis = tensor.stored_axis(int(call.attrs.axis))
    taken = relax.op.take(tensor.expression, tensors.plain(call.args[1]), axis=axis, mode=str(call.attrs.mode))
    return _emitted(taken, CHANNELS_LAST, tensors)


def _reduction(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    tensor = tensors.of(call.args[0])
    if tensor.rank != 4 or call.attrs.axis is None:
        return None
    axes = [int(a) % 4 for a in call.attrs.axis]
    keepdims = bool(call.attrs.keepdims)
    if operator_name(call) == "relax.mean" and sorted(axes) == [2, 3] and keepdims:
        # The global average pool: like every pool it is written channels-last, whatever it reads.
        tensor = StoredTensor(tensors.channels_last(call.args[0]), CHANNELS_LAST)
    if tensor.order != CHANNELS_LAST:
        return None
    kept = [a for a in tensor.order if a not in axes]
    if not keepdims and kept != sorted(kept):
        return None
    make = getattr(relax.op, operator_name(call).removeprefix("relax."))
    reduced = make(tensor.expression, axis=sorted(tensor.stored_axis(a) for a in axes), keepdims=keepdims)
    return _emitted(reduced, CHANNELS_LAST if keepdims else tuple(range(len(kept))), tensors)


def _along_axis(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    tensor = tensors.of(call.args[0])
    if tensor.order != CHANNELS_LAST:
        return None
    axis = tensor.stored_axis(int(call.attrs.axis))
    name = operator_name(call)
    if name == "relax.nn.prelu":
        return _emitted(relax.op.nn.prelu(tensor.expression, tensors.plain(call.args[1]), axis), CHANNELS_LAST, tensors)
    make = relax.op.nn.softmax if name == "relax.nn.softmax" else relax.op.nn.log_softmax
    return _emitted(make(tensor.expression, axis), CHANNELS_LAST, tensors)


def _group_norm(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    if len(shape_of(call)) != 4 or int(call.attrs.channel_axis) % 4 != 1 or normalized_axes(call) != (2, 3):
        return None
    attributes = call.attrs
    converted = relax.op.nn.group_norm(
        tensors.channels_last(call.args[0]),
        *(tensors.plain(a) for a in call.args[1:3]),
        num_groups=int(attributes.num_groups),
        channel_axis=3,
        axes=[1, 2],
        epsilon=float(attributes.epsilon),
        center=bool(attributes.center),
        scale=bool(attributes.scale),
    )
    return _emitted(converted, CHANNELS_LAST, tensors)


def _permute_dims(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    """No values move where the result may just be called stored in another order."""
    tensor, axes = tensors.of(call.args[0]), permutation(call)
    if tensor.features is not None or (tensor.rank != 4 and tensor.is_plain):
        return None
    order = tuple(axes.index(axis) for axis in tensor.order)
    if tensor.rank != 4 or order in (CHANNELS_LAST, (0, 1, 2, 3)):
        return StoredTensor(tensor.expression, order)
    moved = relax.op.permute_dims(tensor.expression, [tensor.stored_axis(a) for a in axes])
    return _emitted(moved, (0, 1, 2, 3), tensors)


def _reshape(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    tensor, target = tensors.of(call.args[0]), shape_of(call)
    if tensor.order == _EXPANDED and len(target) == 4:
        _, _, channels, height, width = tensor.model_shape
        if target[1:] == (channels, height, width):
            stored = tuple(target[a] for a in CHANNELS_LAST)
            return _emitted(relax.op.reshape(tensor.expression, stored), CHANNELS_LAST, tensors)
    if tensor.order != CHANNELS_LAST:
        return None if tensor.is_plain or tensor.features is not None else _merged(tensor, target, tensors)
    batch, channels, height, width = tensor.model_shape
    plain_order = tuple(range(len(target)))
    if channels == 1 or height * width == 1:
        return _emitted(relax.op.reshape(tensor.expression, target), plain_order, tensors)
    reader = readers.only_reader(var)
    if target == (batch, 1, channels, height, width) and operator_name(reader) == "relax.nn.avg_pool3d":
        stored = tuple(target[a] for a in _EXPANDED)
        return _emitted(relax.op.reshape(tensor.expression, stored), _EXPANDED, tensors)
    if target == (batch, math.prod((channels, height, width))) and _is_dense_on(reader, var, tensors):
        features = np.arange(target[1]).reshape(channels, height, width).transpose(1, 2, 0).reshape(-1)
        flattened = tensors.graph.emit(relax.op.reshape(tensor.expression, target))
        return StoredTensor(flattened, plain_order, features)
    return _split(tensor, target, tensors)


def _split(tensor: StoredTensor, target: Shape, tensors: TensorMap) -> StoredTensor | None:
    """Each axis of the model becomes one or more: those lie where the axis lay, and no value moves."""
    parts = _parts(tensor.model_shape, target)
    if parts is None:
        return None
    order = tuple(axis for stored in tensor.order for axis in parts[stored])
    return _emitted(relax.op.reshape(tensor.expression, [target[axis] for axis in order]), order, tensors)


def _merged(tensor: StoredTensor, target: Shape, tensors: TensorMap) -> StoredTensor | None:
    """Axes of the model become a feature map of four: they are moved to where channels-last wants them, then merged."""
    parts = _parts(target, tensor.model_shape) if len(target) == 4 else None
    if parts is None:
        return None
    wanted = [axis for merged in CHANNELS_LAST for axis in parts[merged]]
    moved = tensors.graph.emit(relax.op.permute_dims(tensor.expression, [tensor.stored_axis(a) for a in wanted]))
    return _emitted(relax.op.reshape(moved, [target[axis] for axis in CHANNELS_LAST]), CHANNELS_LAST, tensors)


def _parts(whole: Shape, split: Shape) -> list[list[int]] | None:
    """The axes of ``split`` that each axis of ``whole`` was split into; None where axes were split in no such way."""
    parts: list[list[int]] = []
    position = 0
    for size in whole:
        own: list[int] = []
        while position < len(split) and (not own or math.prod(split[axis] for axis in own) < size):
            own.append(position)
            position += 1
        if not own or math.prod(split[axis] for axis in own) != size:
            return None
        parts.append(own)
    while position < len(split) and split[position] == 1:
        parts[-1].append(position)
        position += 1
    return parts if position == len(split) else None


def _is_dense_on(call: Any, var: Any, tensors: TensorMap) -> bool:
    """Whether a call multiplies a variable with constant weights of its own."""
    return (
        operator_name(call) == "relax.matmul"
        and call.args[0].same_as(var)
        and tensors.graph.array(call.args[1]) is not None
        and len(shape_of(call.args[1])) == 2
    )


def _dense(var: Any, call: Any, tensors: TensorMap, readers: Readers) -> StoredTensor | None:
    tensor = tensors.of(call.args[0])
    weights = tensors.graph.array(call.args[1])
    if tensor.features is None or weights is None:
        return None
    rows = tensors.graph.constant_like(weights[tensor.features], [call.args[1]])
    return _emitted(relax.op.matmul(tensor.expression, rows), tuple(range(tensor.rank)), tensors)


_HANDLERS: Mapping[str, Handler] = {
    "relax.nn.conv2d": _convolution,
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool2d": _pool,
    "relax.nn.avg_pool3d": _channel_window_mean,
    "relax.image.resize2d": _resize,
    "relax.concat": _concat,
    "relax.nn.pad": _pad,
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.mean": _reduction,
    "relax.sum": _reduction,
    "relax.max": _reduction,
    "relax.min": _reduction,
    "relax.variance": _reduction,
    "relax.nn.softmax": _along_axis,
    "relax.nn.log_softmax": _along_axis,
    "relax.nn.prelu": _along_axis,
    "relax.nn.group_norm": _group_norm,
    "relax.permute_dims": _permute_dims,
    "relax.reshape": _reshape,
    "relax.matmul": _dense,
}
