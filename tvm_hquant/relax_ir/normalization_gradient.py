"""The gradient of layer and group normalization with respect to what is normalized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from tvm_hquant.relax_ir.describe import normalized_axes, operator_name, shape_of


def normalization_gradient(builder: Any, call: Any, gradient: Any) -> Any:
    """dx = r · (h − mean(h) − n · mean(h · n)), with n = (x − mean(x)) · r the normalized x and h = gamma · g.

    Lei Ba, Kiros and Hinton, arXiv:1607.06450, section 4.2. ``call`` is ``R.nn.layer_norm`` or ``R.nn.group_norm``; means are
    over what it normalizes.
    """
    data, gamma, _ = call.args
    shape = shape_of(data)
    grouped, axes = _groups(call, shape)

    def mean(tensor: Any) -> Any:
        return builder.emit(relax.op.mean(builder.emit(tensor), axis=list(axes), keepdims=True))

    def split(tensor: Any) -> Any:
        return builder.emit(relax.op.reshape(builder.emit(tensor), grouped))

    x, h = split(data), split(relax.op.multiply(gradient, _aligned(call, gamma, shape)))
    deviation = builder.emit(relax.op.subtract(x, mean(x)))
    variance = mean(relax.op.multiply(deviation, deviation))
    epsilon = relax.const(float(call.attrs.epsilon), str(data.ty.dtype))
    r = builder.emit(relax.op.rsqrt(builder.emit(relax.op.add(variance, epsilon))))
    n = builder.emit(relax.op.multiply(deviation, r))
    along = builder.emit(relax.op.multiply(n, mean(relax.op.multiply(h, n))))
    left = builder.emit(relax.op.subtract(builder.emit(relax.op.subtract(h, mean(h))), along))
    return builder.emit(relax.op.reshape(builder.emit(relax.op.multiply(left, r)), shape))


def _groups(call: Any, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """The shape with the axis of the channels split into groups and what these hold, and the axes that are normalized."""
    axes = normalized_axes(call)
    if operator_name(call) == "relax.nn.layer_norm":
        return list(shape), list(axes)
    channel, groups = int(call.attrs.channel_axis) % len(shape), int(call.attrs.num_groups)
    split = [*shape[:channel], groups, shape[channel] // groups, *shape[channel + 1 :]]
    return split, [channel + 1, *(axis if axis < channel else axis + 1 for axis in axes)]


def _aligned(call: Any, gamma: Any, shape: Sequence[int]) -> Any:
    """Gamma with an axis for each of the tensor."""
    axes = normalized_axes(call)
    if operator_name(call) == "relax.nn.group_norm":
        axes = (int(call.attrs.channel_axis) % len(shape),)
    return relax.op.reshape(gamma, [size if axis in axes else 1 for axis, size in enumerate(shape)])
