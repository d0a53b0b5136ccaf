"""Operators that move values: reshape, permute, slice, pad, split, and the channel shuffle made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tvm import relax, tirx

from tvm_hquant.relax_ir.describe import operator_name, permutation, resize_positions, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph

_ROUNDINGS: Mapping[str, Callable[[Any], Any]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}
"""ONNX's ways to the nearest pixel."""


def spell_reshape(call: Any, graph: Graph) -> Any | None:
    """Flatten, squeeze and expand_dims are reshapes; a reshape of a reshape is one; one to the own shape is nothing."""
    name = operator_name(call)
    if name in ("relax.flatten", "relax.squeeze", "relax.expand_dims"):
        return relax.op.reshape(call.args[0], shape_of(call))
    if name == "relax.broadcast_to" and shape_of(call.args[0]) == shape_of(call):
        return call.args[0]
    if name != "relax.reshape":
        return None
    if shape_of(call.args[0]) == shape_of(call):
        return call.args[0]
    inner = graph.definition_of(call.args[0], "relax.reshape")
    return None if inner is None else relax.op.reshape(inner.args[0], shape_of(call))


def merge_permutations(call: Any, graph: Graph) -> Any | None:
    """A permutation of a permutation is one; one that only moves axes of length 1 is a reshape."""
    if operator_name(call) != "relax.permute_dims":
        return None
    shape = shape_of(call.args[0])
    axes = permutation(call)
    if axes == tuple(range(len(shape))):
        return call.args[0]
    inner = graph.definition_of(call.args[0], "relax.permute_dims")
    if inner is not None:
        before = permutation(inner)
        return relax.op.permute_dims(inner.args[0], [before[a] for a in axes])
    long = [a for a in axes if shape[a] != 1]
    return relax.op.reshape(call.args[0], shape_of(call)) if long == sorted(long) else None


def spell_channel_shuffle(call: Any, graph: Graph) -> Any | None:
    """Reshape, permute, reshape back (ShuffleNet, arXiv 1707.01083) becomes ``R.take`` of channels."""
    if operator_name(call) != "relax.reshape" or len(shape_of(call)) != 4:
        return None
    permute = graph.definition_of(call.args[0], "relax.permute_dims")
    if permute is None:
        return None
    split = graph.definition_of(permute.args[0], "relax.reshape")
    if split is None or shape_of(split.args[0]) != shape_of(call):
        return None
    shape, grouped, axes = shape_of(call), shape_of(split), permutation(permute)
    last = len(grouped) - 2
    groups = grouped[1:last]
    keeps_the_rest = (axes[0], *axes[last:]) == (0, last, last + 1)
    if not keeps_the_rest or (grouped[0], *grouped[last:]) != (shape[0], *shape[2:]) or math.prod(groups) != shape[1]:
        return None
    indices = np.arange(shape[1]).reshape(groups).transpose([a - 1 for a in axes[1:last]]).reshape(-1)
    return relax.op.take(split.args[0], relax.const(indices, "int64"), axis=1, mode="clip")


def merge_slices(call: Any, graph: Graph) -> Any | None:
    """A slice of a slice is one slice, written with ascending axes and without those that are taken whole."""
    ranges = slice_ranges(call)
    if ranges is None:
        return None
    source = call.args[0]
    inner = graph.definition_of(source, "relax.strided_slice")
    inner_ranges = slice_ranges(inner) if inner is not None else None
    if inner is not None and inner_ranges is not None:
        source = inner.args[0]
        ranges = tuple(_within(a, b) for a, b in zip(inner_ranges, ranges, strict=True))
    sliced = [i for i, (r, size) in enumerate(zip(ranges, shape_of(source), strict=True)) if r != range(size)]
    if not sliced:
        return source
    if source.same_as(call.args[0]) and [int(a) for a in call.args[1].fields] == sliced and _is_plain(call, ranges):
        return None
    begin, end, strides = zip(*((ranges[i].start, ranges[i].stop, ranges[i].step) for i in sliced), strict=True)
    return relax.op.strided_slice(source, sliced, list(begin), list(end), list(strides))


def slice_ranges(call: Any) -> tuple[range, ...] | None:
    """For each axis the indices that a ``R.strided_slice`` keeps; None for other calls and negative strides."""
    if operator_name(call) != "relax.strided_slice":
        return None
    shape = shape_of(call.args[0])
    lists = [list(a.fields) for a in call.args[1:] if isinstance(a, relax.Tuple)]
    if len(lists) < 3 or not all(isinstance(v, tirx.IntImm) for values in lists for v in values):
        return None
    axes, begins, ends, *rest = [[int(v) for v in values] for values in lists]
    strides = rest[0] if rest else [1] * len(axes)
    result = [range(size) for size in shape]
    for axis, begin, end, stride in zip(axes, begins, ends, strides, strict=True):
        if stride <= 0:
            return None
        indices = range(shape[axis])[begin:end:stride]
        result[axis % len(shape)] = range(indices.start, _stop(indices), stride)
    return tuple(result)


def spell_split_as_slices(element: Any, graph: Graph) -> Any | None:
    """An element of ``R.split`` becomes a slice."""
    if not isinstance(element, relax.TupleGetItem):
        return None
    call = graph.definition(element.tuple_value)
    if operator_name(call) != "relax.split":
        return None
    axis = int(call.attrs.axis) % len(shape_of(call.args[0]))
    lengths = [int(field.shape[axis]) for field in call.ty.fields]
    begin = sum(lengths[: element.index])
    return relax.op.strided_slice(call.args[0], [axis], [begin], [begin + lengths[element.index]], [1])


def spell_single_take(call: Any, graph: Graph) -> Any | None:
    """``R.take`` of one index without an axis of its own (ONNX Gather of a number) becomes a slice."""
    if operator_name(call) != "relax.take" or call.attrs.axis is None:
        return None
    indices = graph.array(call.args[1])
    if indices is None or indices.ndim:
        return None
    shape = shape_of(call.args[0])
    axis = int(call.attrs.axis) % len(shape)
    index = int(indices) % shape[axis]
    sliced = graph.emit(relax.op.strided_slice(call.args[0], [axis], [index], [index + 1], [1]))
    return relax.op.reshape(sliced, shape_of(call))


def spell_nearest_resize(call: Any, graph: Graph) -> Any | None:
    """``R.image.resize2d`` to nearest neighbours becomes ``R.take`` of rows and of columns."""
    if operator_name(call) != "relax.image.resize2d" or str(call.attrs.layout) != "NCHW":
        return None
    if str(call.attrs.method) != "nearest_neighbor" or str(call.attrs.rounding_method) not in _ROUNDINGS:
        return None
    result = call.args[0]
    for axis in (2, 3):
        size, out_size = shape_of(call.args[0])[axis], shape_of(call)[axis]
        positions = resize_positions(str(call.attrs.coordinate_transformation_mode), size, out_size)
        if positions is None:
            return None
        step, start, denominator = positions
        exact = (step * np.arange(out_size) + start) / denominator
        nearest = np.clip(_ROUNDINGS[str(call.attrs.rounding_method)](exact), 0, size - 1).astype(np.int64)
        if list(nearest) != list(range(size)):
            result = graph.emit(relax.op.take(result, relax.const(nearest, "int64"), axis=axis, mode="clip"))
    return result


def spell_static_shape(call: Any, graph: Graph) -> Any | None:
    """The shape of a tensor as numbers, which the importer of Gather computes with, is constant."""
    if operator_name(call) != "relax.shape_to_tensor":
        return None
    source = graph.definition_of(call.args[0], "relax.shape_of", used_once=False)
    return None if source is None else relax.const(np.array(shape_of(source.args[0]), np.int64), "int64")


def drop_empty_pad(call: Any, graph: Graph) -> Any | None:
    """A pad by nothing."""
    if operator_name(call) != "relax.nn.pad":
        return None
    return call.args[0] if all(int(w) == 0 for w in call.attrs.pad_width) else None


def _stop(indices: range) -> int:
    """One behind the last index kept, so that equal slices are written alike."""
    return indices[-1] + 1 if len(indices) else indices.start


def _within(outer: range, inner: range) -> range:
    indices = outer[inner.start : inner.stop : inner.step]
    return range(indices.start, _stop(indices), indices.step)


def _is_plain(call: Any, ranges: tuple[range, ...]) -> bool:
    """Whether begins, ends and strides are written as ``merge_slices`` would write them."""
    axes = [int(a) for a in call.args[1].fields]
    wanted = [[ranges[a].start for a in axes], [ranges[a].stop for a in axes], [ranges[a].step for a in axes]]
    return [[int(v) for v in a.fields] for a in call.args[2:5]] == wanted
