"""Padding and pooling: explicit padding inside the operator, ceil mode resolved, one spelling for global means."""

from __future__ import annotations

from typing import Any

from tvm import relax

from tvm_hquant.operators import Window
from tvm_hquant.relax_ir.describe import operator_name, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph

_POOLS = ("relax.nn.max_pool2d", "relax.nn.avg_pool2d")


def merge_pad_into_window(call: Any, graph: Graph) -> Any | None:
    """A pad of rows and columns with zeros in front of a convolution or an average pool becomes its padding.

    An average pool that has padding of its own keeps the pad, unless it counts its padding. A max pool always does: it
    pads with −∞.
    """
    name = operator_name(call)
    if name not in ("relax.nn.conv2d", "relax.nn.avg_pool2d"):
        return None
    pad = graph.definition_of(call.args[0], "relax.nn.pad")
    if pad is None or str(pad.attrs.pad_mode) != "constant" or float(pad.attrs.pad_value) != 0.0:
        return None
    widths = [int(w) for w in pad.attrs.pad_width]
    layout = str(call.attrs.data_layout if name == "relax.nn.conv2d" else call.attrs.layout)
    if len(widths) != 8 or layout != "NCHW" or any(widths[:4]) or min(widths) < 0:
        return None
    own = _padding(call)
    merged = [own[0] + widths[4], own[1] + widths[6], own[2] + widths[5], own[3] + widths[7]]
    if name == "relax.nn.conv2d":
        return _convolution(call, pad.args[0], merged)
    if bool(call.attrs.ceil_mode) or (any(own) and not bool(call.attrs.count_include_pad)):
        return None
    return _pool(call, pad.args[0], merged, ceil_mode=False, count_include_pad=True)


def resolve_ceil_mode(call: Any, graph: Graph) -> Any | None:
    """Rows and columns that ceil mode lets a pool read beyond its padding become padding.

    An average pool whose padding counts keeps ceil mode where there are such rows or columns: they do not count.
    """
    if operator_name(call) not in _POOLS or not bool(call.attrs.ceil_mode) or str(call.attrs.layout) != "NCHW":
        return None
    top, left, bottom, right = _padding(call)
    kernel, strides, dilation = (_pair(getattr(call.attrs, f)) for f in ("pool_size", "strides", "dilation"))
    extent = Window(kernel, strides, (0, 0, 0, 0), dilation).extent
    (_, _, height, width), (_, _, out_height, out_width) = shape_of(call.args[0]), shape_of(call)
    needed_bottom = (out_height - 1) * strides[0] + extent[0] - height - top
    needed_right = (out_width - 1) * strides[1] + extent[1] - width - left
    reads_beyond = needed_bottom > bottom or needed_right > right
    counts_padding = operator_name(call) == "relax.nn.avg_pool2d" and bool(call.attrs.count_include_pad)
    if reads_beyond and counts_padding and any((top, left, bottom, right)):
        return None
    padding = [top, left, max(bottom, needed_bottom), max(right, needed_right)]
    return _pool(call, call.args[0], padding, ceil_mode=False, count_include_pad=counts_padding and not reads_beyond)


def drop_uncounted_padding_flag(call: Any, graph: Graph) -> Any | None:
    """``count_include_pad`` means nothing without padding, and nothing for a max pool."""
    if operator_name(call) not in _POOLS or not bool(call.attrs.count_include_pad):
        return None
    if operator_name(call) == "relax.nn.avg_pool2d" and any(_padding(call)):
        return None
    return _pool(call, call.args[0], _padding(call), ceil_mode=bool(call.attrs.ceil_mode), count_include_pad=False)


def spell_global_mean(call: Any, graph: Graph) -> Any | None:
    """The mean over all rows and columns is ``R.mean(x, axis=[2, 3], keepdims=True)``, reshaped where they are dropped."""
    name = operator_name(call)
    if name == "relax.nn.avg_pool2d" and str(call.attrs.layout) == "NCHW":
        _, _, height, width = shape_of(call.args[0])
        if (height, width) != _pair(call.attrs.pool_size) or any(_padding(call)) or shape_of(call)[2:] != (1, 1):
            return None
        return relax.op.mean(call.args[0], axis=[2, 3], keepdims=True)
    if name != "relax.mean" or len(shape_of(call.args[0])) != 4 or call.attrs.axis is None:
        return None
    axes, keepdims = [int(a) for a in call.attrs.axis], bool(call.attrs.keepdims)
    if sorted(a % 4 for a in axes) != [2, 3] or (axes == [2, 3] and keepdims):
        return None
    mean = relax.op.mean(call.args[0], axis=[2, 3], keepdims=True)
    return mean if keepdims else relax.op.reshape(graph.emit(mean), shape_of(call))


def _padding(call: Any) -> list[int]:
    """(top, left, bottom, right)"""
    values = [int(v) for v in call.attrs.padding]
    return (values * 4)[:4] if len(values) < 4 else values


def _pair(values: Any) -> tuple[int, int]:
    return int(values[0]), int(values[-1])


def _convolution(call: Any, data: Any, padding: list[int]) -> Any:
    attributes = call.attrs
    return relax.op.nn.conv2d(
        data,
        call.args[1],
        strides=list(attributes.strides),
        padding=padding,
        dilation=list(attributes.dilation),
        groups=int(attributes.groups),
        data_layout=str(attributes.data_layout),
        kernel_layout=str(attributes.kernel_layout),
    )


def _pool(call: Any, data: Any, padding: list[int], *, ceil_mode: bool, count_include_pad: bool) -> Any:
    make = relax.op.nn.max_pool2d if operator_name(call) == "relax.nn.max_pool2d" else relax.op.nn.avg_pool2d
    attributes = call.attrs
    return make(
        data,
        pool_size=list(attributes.pool_size),
        strides=list(attributes.strides),
        padding=padding,
        dilation=list(attributes.dilation),
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        layout=str(attributes.layout),
    )
