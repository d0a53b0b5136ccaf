"""Gradients that ``relax.transform.Gradient`` lacks, registered with TVM's own ``register_gradient`` when this is imported.

Of ``y = op(x)`` with the gradient g of a scalar with respect to y, they give that with respect to x:

==========================  ===================================================================================
clip, relu6                 where(lower < y < upper, g, 0)
leaky_relu, prelu           where(x > 0, g, slope · g)
gelu                        g · (Φ(x) + x · φ(x)), the normal distribution and its density
erf                         g · 2/√π · exp(−x²)
nn.pad (constant)           the slice of g that x was put into
strided_slice               g with zeros between its elements (strides), padded to the shape of x
concat                      the slices of g
avg_pool3d (stride 1)       the same mean of g, with the padding the other way round (local response normalization)
layer_norm, group_norm      :mod:`tvm_hquant.relax_ir.normalization_gradient`
max_pool2d, channels-last   g at the largest elements of its window, shared equally among equal ones
conv2d, channels-last       a convolution of stride 1 with the weights turned by 180° and input and output channels
                            exchanged, over g with stride − 1 zeros between its pixels
==========================  ===================================================================================

TVM's rule for ``conv2d`` (tvm/relax/op/_op_gradient.py) asks for channels-first and makes a ``conv2d_transpose``, for which
there is only an unscheduled loop; the plain ``conv2d`` here becomes a layer with a kernel of the project. Channels-first calls
are left to TVM's rule. For ``concat`` TVM makes a ``split``, which gives a tuple; slices have kernels. What TVM makes for
``max_pool2d`` reads beyond its buffers where the window is padded (TVM 0.27). Gradients with respect
to the weights of channels-last convolutions are computed elsewhere (:mod:`tvm_hquant.sensitivity.weight_gradient`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax.op._op_gradient import conv2d_grad, max_pool2d_grad
from tvm.relax.op.base import register_gradient
from tvm.relax.op.grad import no_grad

from tvm_hquant.errors import ModelError
from tvm_hquant.operators import Window
from tvm_hquant.relax_ir.normalization_gradient import normalization_gradient
from tvm_hquant.relax_ir.pool_gradient import max_pool2d_gradient

_LEVEL = 11
"""TVM's own rules have 10: the one for channels-last convolutions takes their place."""


def _shape(expression: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in expression.ty.shape)


def _masked(builder: Any, condition: Any, gradient: Any) -> Any:
    return builder.emit(relax.op.where(builder.emit(condition), gradient, relax.const(0.0, _dtype(gradient))))


def _dtype(expression: Any) -> str:
    return str(expression.ty.dtype)


def _clip(output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    lower, upper = float(call.args[1].value), float(call.args[2].value)
    return [_within(output, lower, upper, gradient, builder), no_grad(call.args[1]), no_grad(call.args[2])]


def _relu6(output: Any, _call: Any, gradient: Any, builder: Any) -> list[Any]:
    return [_within(output, 0.0, 6.0, gradient, builder)]


def _within(output: Any, lower: float, upper: float, gradient: Any, builder: Any) -> Any:
    """The gradient where a clamp let the value through. Its output tells, so that clamps stay fused with what is clamped."""
    if lower > -math.inf:
        gradient = _masked(builder, relax.op.greater(output, relax.const(lower, _dtype(output))), gradient)
    if upper < math.inf:
        gradient = _masked(builder, relax.op.less(output, relax.const(upper, _dtype(output))), gradient)
    return gradient


def _leaky_relu(_output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    slope = relax.const(float(call.attrs.alpha), _dtype(gradient))
    return [_two_slopes(call.args[0], slope, gradient, builder)]


def _prelu(_output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    data, slopes = call.args
    axis = int(call.attrs.axis) % len(_shape(data))
    aligned = relax.op.reshape(slopes, [-1 if i == axis else 1 for i in range(len(_shape(data)))])
    return [_two_slopes(data, builder.emit(aligned), gradient, builder), no_grad(slopes)]


def _two_slopes(data: Any, slope: Any, gradient: Any, builder: Any) -> Any:
    is_positive = builder.emit(relax.op.greater(data, relax.const(0.0, _dtype(data))))
    return builder.emit(relax.op.where(is_positive, gradient, builder.emit(relax.op.multiply(gradient, slope))))


def _gelu(_output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    (x,) = call.args
    dtype = _dtype(x)
    scaled = builder.emit(relax.op.multiply(x, relax.const(math.sqrt(0.5), dtype)))
    below = builder.emit(
        relax.op.add(relax.const(0.5, dtype), relax.op.multiply(relax.const(0.5, dtype), relax.op.erf(scaled)))
    )
    density = builder.emit(
        relax.op.multiply(relax.const(1 / math.sqrt(2 * math.pi), dtype), _gaussian(scaled, builder))
    )
    slope = builder.emit(relax.op.add(below, relax.op.multiply(x, density)))
    return [builder.emit(relax.op.multiply(gradient, slope))]


def _erf(_output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    (x,) = call.args
    slope = relax.op.multiply(relax.const(2 / math.sqrt(math.pi), _dtype(x)), _gaussian(x, builder))
    return [builder.emit(relax.op.multiply(gradient, builder.emit(slope)))]


def _gaussian(x: Any, builder: Any) -> Any:
    """exp(−x²)."""
    return builder.emit(relax.op.exp(relax.op.negative(relax.op.multiply(x, x))))


def _pad(output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    if str(call.attrs.pad_mode) != "constant":
        raise ModelError(
            f"{output.name} pads with the mode {call.attrs.pad_mode}, which has no gradient: use constant padding"
        )
    shape = _shape(call.args[0])
    before = [int(w) for w in call.attrs.pad_width][::2]
    ends = [b + size for b, size in zip(before, shape, strict=True)]
    return [builder.emit(relax.op.strided_slice(gradient, list(range(len(shape))), before, ends))]


def _strided_slice(_output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    shape = _shape(call.args[0])
    lists = [[int(v) for v in a.fields] for a in call.args[1:]]
    axes, begins = [a % len(shape) for a in lists[0]], lists[1]
    strides = lists[3] if len(lists) > 3 else [1] * len(axes)
    if min(strides) < 1:
        raise ModelError("a strided_slice with a negative stride has no gradient here")
    step, start = [1] * len(shape), [0] * len(shape)
    for axis, begin, stride in zip(axes, begins, strides, strict=True):
        step[axis] = stride
        start[axis] = min(max(begin + shape[axis] if begin < 0 else begin, 0), shape[axis])
    spread = dilated(gradient, step, builder)
    after = [size - s - d for size, s, d in zip(shape, start, _shape(spread), strict=True)]
    data = fitted(spread, start, after, builder)
    return [data, *(no_grad(a) for a in call.args[1:])]


def _concat(_output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    axis = int(call.attrs.axis or 0) % len(_shape(gradient))
    parts, begin = [], 0
    for field in call.args[0].ty.fields:
        end = begin + int(field.shape[axis])
        parts.append(builder.emit(relax.op.strided_slice(gradient, [axis], [begin], [end])))
        begin = end
    return [relax.Tuple(parts)]


def _avg_pool3d(output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    attributes = call.attrs
    strides, padding = [int(s) for s in attributes.strides], [int(p) for p in attributes.padding]
    if max(strides) > 1 or not bool(attributes.count_include_pad) or _shape(output) != _shape(call.args[0]):
        raise ModelError(
            f"{output.name}: an avg_pool3d has a gradient only with stride 1, counting its padding, of one size"
        )
    # The transpose of a window mean is a window mean; before and behind change places.
    mirrored = [*padding[3:], *padding[:3]]
    data_gradient = relax.op.nn.avg_pool3d(
        gradient, attributes.pool_size, strides, mirrored, count_include_pad=True, layout=str(attributes.layout)
    )
    return [builder.emit(data_gradient)]


def _max_pool2d(output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    attributes = call.attrs
    if str(attributes.layout) != "NHWC" or bool(attributes.ceil_mode):
        return list(max_pool2d_grad(output, call, gradient, builder))
    pool, strides, padding, dilation = (
        [int(v) for v in values]
        for values in (attributes.pool_size, attributes.strides, attributes.padding, attributes.dilation)
    )
    window = Window(
        (pool[0], pool[1]),
        (strides[0], strides[1]),
        (padding[0], padding[1], padding[2], padding[3]),
        (dilation[0], dilation[1]),
    )
    return [builder.emit(max_pool2d_gradient(builder, gradient, call.args[0], output, window))]


def _normalization(_output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    return [normalization_gradient(builder, call, gradient), no_grad(call.args[1]), no_grad(call.args[2])]


def _conv2d(output: Any, call: Any, gradient: Any, builder: Any) -> list[Any]:
    if str(call.attrs.data_layout) != "NHWC":
        return list(conv2d_grad(output, call, gradient, builder))
    data, weights = call.args
    if str(call.attrs.kernel_layout) != "OIHW":
        raise ModelError(f"{output.name}: the gradient of a channels-last convolution wants weights as OIHW")
    groups = int(call.attrs.groups)
    _, height, width, _ = _shape(data)
    top, left = (int(p) for p in list(call.attrs.padding)[:2])
    strides, dilation = [int(s) for s in call.attrs.strides], [int(d) for d in call.attrs.dilation]
    kernel = _shape(weights)[2:]
    window = Window((kernel[0], kernel[1]), (1, 1), (0, 0, 0, 0), (dilation[0], dilation[1]))
    spread = dilated(gradient, [1, *strides, 1], builder)
    _, spread_height, spread_width, _ = _shape(spread)
    # A window of extent e over n rows gives n − e + 1: padding makes this the rows of the input.
    before = [window.extent[0] - 1 - top, window.extent[1] - 1 - left]
    after = [
        height - spread_height - before[0] + window.extent[0] - 1,
        width - spread_width - before[1] + window.extent[1] - 1,
    ]
    cropped = fitted(spread, [0, *(min(b, 0) for b in before), 0], [0, *(min(a, 0) for a in after), 0], builder)
    turned = builder.emit(turned_weights(weights, groups, builder))
    padding = [*(max(b, 0) for b in before), *(max(a, 0) for a in after)]
    data_gradient = relax.op.nn.conv2d(
        cropped,
        turned,
        1,
        padding,
        dilation,
        groups,
        data_layout="NHWC",
        kernel_layout="OIHW",
        out_dtype=_dtype(gradient),
    )
    return [builder.emit(data_gradient), no_grad(weights)]


def turned_weights(weights: Any, groups: int, builder: Any) -> Any:
    """Convolution weights turned by 180°, input and output channels exchanged within each group, as Relax operators."""
    out_channels, per_group, height, width = _shape(weights)
    turned = builder.emit(relax.op.flip(builder.emit(relax.op.flip(weights, 2)), 3))
    if groups == 1:
        return relax.op.permute_dims(turned, [1, 0, 2, 3])
    grouped = builder.emit(relax.op.reshape(turned, (groups, out_channels // groups, per_group, height, width)))
    exchanged = builder.emit(relax.op.permute_dims(grouped, [0, 2, 1, 3, 4]))
    return relax.op.reshape(exchanged, (groups * per_group, out_channels // groups, height, width))


def turned_weight_values(weights: np.ndarray[Any, Any], groups: int) -> np.ndarray[Any, Any]:
    """:func:`turned_weights` of values: [groups · o, i, kh, kw] to [groups · i, o, kh, kw]."""
    out_channels, per_group, height, width = weights.shape
    grouped = weights[:, :, ::-1, ::-1].reshape(groups, out_channels // groups, per_group, height, width)
    exchanged = grouped.transpose(0, 2, 1, 3, 4).reshape(groups * per_group, out_channels // groups, height, width)
    return np.ascontiguousarray(exchanged)


def dilated(tensor: Any, steps: Sequence[int], builder: Any) -> Any:
    """``step`` − 1 zeros behind every element along every axis.

    By a reshape, a pad and a reshape: only the pad moves anything. Relax has no operator for it.
    """
    shape = _shape(tensor)
    if all(step == 1 for step in steps):
        return tensor
    split: list[int] = []
    widths: list[int] = []
    for size, step in zip(shape, steps, strict=True):
        split += [size, 1] if step > 1 else [size]
        widths += [0, 0, 0, step - 1] if step > 1 else [0, 0]
    spaced = builder.emit(relax.op.nn.pad(builder.emit(relax.op.reshape(tensor, split)), widths))
    return builder.emit(relax.op.reshape(spaced, [size * step for size, step in zip(shape, steps, strict=True)]))


def fitted(tensor: Any, before: Sequence[int], after: Sequence[int], builder: Any) -> Any:
    """Zeros before and behind each axis; a negative number cuts that many elements off."""
    shape = _shape(tensor)
    if min(*before, *after) < 0:
        begins = [max(-b, 0) for b in before]
        ends = [size - max(-a, 0) for size, a in zip(shape, after, strict=True)]
        tensor = builder.emit(relax.op.strided_slice(tensor, list(range(len(shape))), begins, ends))
    if max(*before, *after) <= 0:
        return tensor
    widths = [w for b, a in zip(before, after, strict=True) for w in (max(b, 0), max(a, 0))]
    return builder.emit(relax.op.nn.pad(tensor, widths))


_RULES = {
    "relax.clip": _clip,
    "relax.nn.relu6": _relu6,
    "relax.nn.leakyrelu": _leaky_relu,
    "relax.nn.prelu": _prelu,
    "relax.nn.gelu": _gelu,
    "relax.erf": _erf,
    "relax.nn.pad": _pad,
    "relax.strided_slice": _strided_slice,
    "relax.concat": _concat,
    "relax.nn.avg_pool3d": _avg_pool3d,
    "relax.nn.max_pool2d": _max_pool2d,
    "relax.nn.layer_norm": _normalization,
    "relax.nn.group_norm": _normalization,
    "relax.nn.conv2d": _conv2d,
}

for _operator, _rule in _RULES.items():
    register_gradient(_operator, _rule, _LEVEL)
