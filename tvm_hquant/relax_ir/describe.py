"""Relax calls as operators: the one place that knows how TVM spells what a layer computes.

Expects channels-last calls (the form that ``convert_layout`` leaves). What is not recognised is ``Opaque``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, tirx

from tvm_hquant.layers import constant_array, is_constant
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    BatchMatmul,
    BiasAdd,
    Concat,
    Conv2D,
    Dense,
    Epilogue,
    GroupNormalization,
    MaxPool2D,
    Movement,
    Multiply,
    Opaque,
    Operator,
    Positions,
    Resize2D,
    Shape,
    Softmax,
    Unary,
    Window,
)

UNARY_WITHOUT_PARAMETERS = {
    "relax.sigmoid": "sigmoid",
    "relax.tanh": "tanh",
    "relax.exp": "exp",
    "relax.erf": "erf",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.silu": "silu",
    "relax.abs": "abs",
    "relax.negative": "negative",
    "relax.round": "round",
    "relax.floor": "floor",
    "relax.ceil": "ceil",
}


def shape_of(expression: Any) -> Shape:
    """The static shape of a tensor expression."""
    return tuple(int(d) for d in expression.ty.shape)


def operator_name(value: Any) -> str:
    """``relax.add`` for a call of that operator, ``""`` for anything but an operator call."""
    if not isinstance(value, relax.Call):
        return ""
    return str(getattr(value.op, "name", ""))


def clip_bounds(call: Any) -> tuple[float, float] | None:
    """Bounds of a relu or clip call, None for other calls."""
    name = operator_name(call)
    if name == "relax.nn.relu":
        return 0.0, math.inf
    if name == "relax.nn.relu6":
        return 0.0, 6.0
    if name == "relax.clip" and all(isinstance(a, (tirx.FloatImm, tirx.IntImm)) for a in call.args[1:3]):
        return float(call.args[1].value), float(call.args[2].value)
    return None


def is_float32(expression: Any) -> bool:
    """Whether an expression is one float32 tensor of static shape."""
    ty = expression.ty
    return (
        isinstance(ty, relax.TensorType)
        and str(ty.dtype) == "float32"
        and ty.shape is not None
        and all(isinstance(d, tirx.IntImm) for d in ty.shape)
    )


def is_conv2d_anchor(call: Any) -> bool:
    """A channels-last convolution with constant weights."""
    return (
        operator_name(call) == "relax.nn.conv2d"
        and str(call.attrs.data_layout) == "NHWC"
        and is_constant(call.args[1])
        and is_float32(call)
    )


def is_dense_anchor(call: Any) -> bool:
    """A product with a constant matrix on the right."""
    return (
        operator_name(call) == "relax.matmul"
        and is_constant(call.args[1])
        and len(shape_of(call.args[1])) == 2
        and len(shape_of(call.args[0])) >= 2
        and is_float32(call)
    )


def describe_anchor(call: Any, epilogue: Epilogue) -> Conv2D | Dense:
    """The operator of an anchor call with what was fused behind it."""
    if operator_name(call) == "relax.matmul":
        in_features, out_features = shape_of(call.args[1])
        leading = shape_of(call.args[0])[:-1]
        return Dense(math.prod(leading), in_features, out_features, epilogue, () if len(leading) == 1 else leading)
    layout = str(call.attrs.kernel_layout)
    weight_shape = shape_of(call.args[1])
    kernel = (weight_shape[layout.index("H")], weight_shape[layout.index("W")])
    return Conv2D(
        shape_of(call.args[0]),
        weight_shape[layout.index("O")],
        Window(kernel, _pair(call.attrs.strides), _padding(call.attrs.padding), _pair(call.attrs.dilation)),
        int(call.attrs.groups),
        epilogue,
    )


def describe_call(call: Any) -> Operator:
    """The operator of an anchorless call."""
    name = operator_name(call)
    if not is_float32(call) or not all(is_float32(a) for a in tensor_arguments(call)):
        return _opaque(call)
    if (bounds := clip_bounds(call)) is not None:
        return Unary(shape_of(call), "clip", bounds)
    if name in UNARY_WITHOUT_PARAMETERS:
        return Unary(shape_of(call), UNARY_WITHOUT_PARAMETERS[name])
    describe = _DESCRIPTIONS.get(name)
    operator = describe(call) if describe else None
    return operator if operator is not None else _opaque(call)


def describe_batch_matmul(call: Any) -> BatchMatmul | None:
    """The operator of a product of two activations; None for other calls."""
    if operator_name(call) != "relax.matmul" or not is_float32(call) or any(is_constant(a) for a in call.args):
        return None
    first, second = (shape_of(a) for a in call.args)
    if min(len(first), len(second)) < 2:
        return None
    orders = (tuple(range(len(first))), tuple(range(len(second))))
    return BatchMatmul((first, second), orders, tuple(range(len(shape_of(call)))))


def permutation(call: Any) -> tuple[int, ...]:
    """The axes of a ``R.permute_dims`` call, none negative."""
    rank = len(shape_of(call.args[0]))
    axes = call.attrs.axes
    return tuple(range(rank))[::-1] if axes is None else tuple(int(a) % rank for a in axes)


def scalar_factor(call: Any, array: Callable[[Any], Any]) -> float | None:
    """The number that a call multiplies its first argument by; None for other calls.

    ``array`` gives the values of a constant and None for what is none.
    """
    name = operator_name(call)
    if name not in ("relax.multiply", "relax.divide") or not is_float32(call):
        return None
    values = array(call.args[1])
    if values is None or values.size != 1 or array(call.args[0]) is not None:
        return None
    number = float(values.reshape(()))
    if name == "relax.multiply":
        return number
    return 1.0 / number if number else None


def tensor_arguments(call: Any) -> list[Any]:
    """Tensor arguments of a call that are not constants, tuples opened."""
    result: list[Any] = []
    for argument in call.args:
        fields = list(argument.fields) if isinstance(argument, relax.Tuple) else [argument]
        result += [f for f in fields if isinstance(getattr(f, "ty", None), relax.TensorType) and not is_constant(f)]
    return result


def _opaque(call: Any) -> Operator:
    name = operator_name(call) or "call"
    shape = shape_of(call) if isinstance(call.ty, relax.TensorType) else ()
    return Opaque(name, tuple(shape_of(a) for a in tensor_arguments(call)), shape, _products(call))


def _products(call: Any) -> int:
    """Multiply-accumulates of a convolution or a product of matrices; 0 for other calls."""
    name = operator_name(call)
    if name == "relax.matmul":
        return math.prod(shape_of(call)) * shape_of(call.args[0])[-1]
    if not name.startswith("relax.nn.conv"):
        return 0
    kernel, layout = shape_of(call.args[1]), str(call.attrs.kernel_layout)
    if name.endswith("_transpose"):  # every element of the input meets all weights of its channel
        return math.prod(shape_of(call.args[0])) * math.prod(kernel) // kernel[layout.index("I")]
    return math.prod(shape_of(call)) * math.prod(kernel) // kernel[layout.index("O")]


def _pair(values: Sequence[Any]) -> tuple[int, int]:
    return int(values[0]), int(values[-1])


def _padding(values: Sequence[Any]) -> tuple[int, int, int, int]:
    v = [int(x) for x in values]
    if len(v) == 1:
        v = v * 4
    if len(v) == 2:
        v = [v[0], v[1], v[0], v[1]]
    return v[0], v[1], v[2], v[3]


def _add(call: Any) -> Operator | None:
    a, b = call.args
    for data, other in ((a, b), (b, a)):
        if is_constant(other) and not is_constant(data) and shape_of(data) == shape_of(call):
            return BiasAdd(shape_of(call), shape_of(other))
    if shape_of(a) != shape_of(b):
        return None
    return Add(shape_of(call))


def _multiply(call: Any) -> Operator | None:
    if any(is_constant(a) for a in call.args):
        return None
    a, b = call.args
    return Multiply((shape_of(a), shape_of(b)))


def _pool_window(call: Any) -> tuple[Window, tuple[int, int, int, int]] | None:
    """The window with ceil-mode overhang in its padding, and the padding that the model itself asks for."""
    if str(call.attrs.layout) != "NHWC":
        return None
    kernel, strides, dilation = (_pair(getattr(call.attrs, f)) for f in ("pool_size", "strides", "dilation"))
    asked = _padding(call.attrs.padding)
    window = Window(kernel, strides, asked, dilation)
    _, height, width, _ = shape_of(call.args[0])
    _, out_height, out_width, _ = shape_of(call)
    top, left, bottom, right = asked
    (span_height, span_width) = window.extent
    need_bottom = (out_height - 1) * strides[0] + span_height - height - top
    need_right = (out_width - 1) * strides[1] + span_width - width - left
    return Window(kernel, strides, (top, left, max(bottom, need_bottom), max(right, need_right)), dilation), asked


def _max_pool(call: Any) -> Operator | None:
    if (found := _pool_window(call)) is None:
        return None
    return MaxPool2D(shape_of(call.args[0]), found[0])


def _average_pool(call: Any) -> Operator | None:
    if (found := _pool_window(call)) is None:
        return None
    window, asked = found
    counted = asked if bool(call.attrs.count_include_pad) else (0, 0, 0, 0)
    return AveragePool2D(shape_of(call.args[0]), window, counted)


def _mean(call: Any) -> Operator | None:
    shape = shape_of(call.args[0])
    axes = call.attrs.axis if call.attrs.axis is not None else range(len(shape))
    if len(shape) != 4 or sorted(int(a) % 4 for a in axes) != [1, 2] or not bool(call.attrs.keepdims):
        return None
    return AveragePool2D(shape, Window((shape[1], shape[2])))


def _max(call: Any) -> Operator | None:
    average = _mean(call)
    return MaxPool2D(average.input_shape, average.window) if isinstance(average, AveragePool2D) else None


def _prelu(call: Any) -> Operator | None:
    slopes = constant_array(call.args[1]) if is_constant(call.args[1]) else None
    if slopes is None or not slopes.size or (slopes != slopes.flat[0]).any():
        return None
    return Unary(shape_of(call), "leaky_relu", (float(slopes.flat[0]),))


def _resize(call: Any) -> Operator | None:
    attributes = call.attrs
    if str(attributes.layout) != "NHWC" or str(attributes.method) != "linear":
        return None
    (_, height, width, _), (_, out_height, out_width, _) = shape_of(call.args[0]), shape_of(call)
    mode = str(attributes.coordinate_transformation_mode)
    rows, columns = resize_positions(mode, height, out_height), resize_positions(mode, width, out_width)
    if rows is None or columns is None:
        return None
    return Resize2D(shape_of(call.args[0]), (out_height, out_width), rows, columns)


def resize_positions(mode: str, size: int, out_size: int) -> Positions | None:
    """Where the outputs of an axis lie, by ONNX's name of a coordinate transformation; None for those with a region."""
    match mode:
        case "asymmetric":
            return size, 0, out_size
        case "align_corners":
            return size - 1, 0, max(out_size - 1, 1)
        case "pytorch_half_pixel" if out_size == 1:
            return 0, 0, 1
        case "half_pixel" | "pytorch_half_pixel":
            return 2 * size, size - out_size, 2 * out_size
        case _:
            return None


def _concat(call: Any) -> Operator | None:
    shapes = tuple(shape_of(a) for a in tensor_arguments(call))
    if len(shapes) != len(call.args[0].fields):
        return None
    return Concat(shapes, int(call.attrs.axis) % len(shapes[0]))


def _reshape(call: Any) -> Operator:
    return Movement("reshape", shape_of(call.args[0]), shape_of(call))


def _permute_dims(call: Any) -> Operator:
    return Movement("permute_dims", shape_of(call.args[0]), shape_of(call), permutation(call))


def _strided_slice(call: Any) -> Operator | None:
    shape = shape_of(call.args[0])
    lists = [[int(v) for v in a.fields] for a in call.args[1:] if isinstance(a, relax.Tuple)]
    if len(lists) < 3 or any(v <= 0 for v in (lists[3] if len(lists) > 3 else [])):
        return None
    axes, begins = lists[0], lists[1]
    strides = lists[3] if len(lists) > 3 else [1] * len(axes)
    parameters: list[int] = []
    for axis, begin, stride in zip(axes, begins, strides, strict=True):
        size = shape[axis % len(shape)]
        parameters += [axis % len(shape), min(max(begin + size if begin < 0 else begin, 0), size), stride]
    return Movement("strided_slice", shape, shape_of(call), tuple(parameters))


def _take(call: Any) -> Operator | None:
    if not is_constant(call.args[1]) or constant_array(call.args[1]).ndim != 1 or call.attrs.axis is None:
        return None
    shape = shape_of(call.args[0])
    axis = int(call.attrs.axis) % len(shape)
    indices = [int(i) % shape[axis] for i in constant_array(call.args[1])]
    return Movement("take", shape, shape_of(call), (axis, *indices))


def _pad(call: Any) -> Operator | None:
    if str(call.attrs.pad_mode) != "constant":
        return None
    widths = tuple(int(w) for w in call.attrs.pad_width)
    if any(w < 0 for w in widths):
        return None
    return Movement("pad", shape_of(call.args[0]), shape_of(call), widths, float(call.attrs.pad_value))


def _leaky_relu(call: Any) -> Operator:
    return Unary(shape_of(call), "leaky_relu", (float(call.attrs.alpha),))


def _softmax(call: Any) -> Operator:
    shape = shape_of(call)
    return Softmax(shape, int(call.attrs.axis) % len(shape))


def _layer_norm(call: Any) -> Operator | None:
    shape, axes = shape_of(call), normalized_axes(call)
    first = len(shape) - len(axes)
    if axes != tuple(range(first, len(shape))) or not _has_gamma_and_beta(call, shape[first:]):
        return None
    return GroupNormalization(shape, first, first, float(call.attrs.epsilon))


def _group_norm(call: Any) -> Operator | None:
    shape, axes = shape_of(call), normalized_axes(call)
    channel_axis = len(shape) - 1
    first = channel_axis - len(axes)
    if int(call.attrs.channel_axis) % len(shape) != channel_axis or axes != tuple(range(first, channel_axis)):
        return None
    if not _has_gamma_and_beta(call, shape[channel_axis:]):
        return None
    return GroupNormalization(shape, first, channel_axis, float(call.attrs.epsilon), int(call.attrs.num_groups))


def normalized_axes(call: Any) -> tuple[int, ...]:
    """The axes of a normalization, none negative, ascending."""
    rank = len(shape_of(call.args[0]))
    return tuple(sorted(int(axis) % rank for axis in call.attrs.axes))


def _has_gamma_and_beta(call: Any, shape: Shape) -> bool:
    return (
        bool(call.attrs.center)
        and bool(call.attrs.scale)
        and all(is_constant(a) and shape_of(a) == shape for a in call.args[1:3])
    )


_DESCRIPTIONS = {
    "relax.add": _add,
    "relax.multiply": _multiply,
    "relax.nn.max_pool2d": _max_pool,
    "relax.nn.avg_pool2d": _average_pool,
    "relax.mean": _mean,
    "relax.image.resize2d": _resize,
    "relax.max": _max,
    "relax.nn.prelu": _prelu,
    "relax.concat": _concat,
    "relax.reshape": _reshape,
    "relax.flatten": _reshape,
    "relax.squeeze": _reshape,
    "relax.expand_dims": _reshape,
    "relax.permute_dims": _permute_dims,
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.nn.pad": _pad,
    "relax.nn.leakyrelu": _leaky_relu,
    "relax.nn.softmax": _softmax,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.group_norm": _group_norm,
}
