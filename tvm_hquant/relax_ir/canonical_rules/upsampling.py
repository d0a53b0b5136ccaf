"""Transposed convolutions become convolutions whose channels are then laid out as pixels.

Output ``y`` of an axis with stride s gets input ``x`` through weight ``y + pad − s·x``. So all outputs with one remainder
by s read the same weights of one convolution at stride 1, and the s remainders of an axis are channels of it
[W. Shi et al., "Is the deconvolution layer the same as a convolutional layer?", arXiv 1609.07009]::

    lv = R.nn.conv2d_transpose(x, W [I, O, 4, 4], strides=2, padding=1)      # x is [N, I, H, W]

becomes::

    lv = R.nn.conv2d(x, V [4·O, I, 2, 2], padding=1)
    lv1 = R.reshape(lv, (N, 2, 2, O, H + 1, W + 1))
    lv2 = R.permute_dims(lv1, [0, 3, 4, 1, 5, 2])
    lv3 = R.reshape(lv2, (N, O, 2·H + 2, 2·W + 2))
    lv4 = R.strided_slice(lv3, axes=[2, 3], begin=[1, 1], end=[2·H + 1, 2·W + 1])

The kernel has ⌈k / s⌉ rows; where s does not divide k some weights are zeros. Which output comes first is chosen so that the
kernel is as small as it can be, and then that as little as possible is cut off: nothing for k = s, or for k = 3, s = 2, pad 1.
At stride 1 it is the same convolution with the kernel turned round. With groups, a group's pixels are among its own channels.

What scales, shifts or clamps the pixels does so to the channels instead, where the convolution absorbs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvm_hquant.relax_ir.canonical_rules.movement import slice_ranges
from tvm_hquant.relax_ir.canonical_rules.sequences import map_of_sequence
from tvm_hquant.relax_ir.describe import clip_bounds, is_float32, operator_name, permutation, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph

Array = npt.NDArray[Any]
_AFFINE = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


@dataclass(frozen=True)
class _Axis:
    """Rows or columns of a transposed convolution as those of a convolution.

    Attributes:
        taps: rows of its kernel; row i reads input q + first + i for output q.
        first: where the window starts; its padding in front is −first, less than none where the input is cut off.
        positions: outputs q that are computed.
        phases: pixels for each of them, which is the stride.
        cut: pixels that are cut off in front.
        weights: [phases, taps], which weight each tap of each phase takes; −1 stands for none.
        dilation: of the kernel.
    """

    taps: int
    first: int
    positions: int
    phases: int
    cut: int
    weights: Array
    dilation: int

    def padding(self, size: int) -> tuple[int, int]:
        """Before and after an input of ``size``; negative where it is cut off."""
        return -self.first, self.positions - size + self.first + (self.taps - 1) * self.dilation

    def reads_nothing(self, size: int) -> bool:
        """Whether no output gets anything of an input of ``size``."""
        before, after = self.padding(size)
        return max(0, -before) + max(0, -after) >= size


def _resolve_axis(kernel: int, stride: int, dilation: int, pad: int, output: int) -> _Axis:
    """The axis of a transposed convolution with ``output`` outputs of which ``pad`` are cut off in front."""
    extent = (kernel - 1) * dilation + 1
    if stride == 1:
        weights = np.arange(kernel)[None, ::-1]
        return _Axis(kernel, pad - extent + 1, output, 1, 0, weights, dilation)
    best: _Axis | None = None
    for cut in range(stride):
        # Output s·q + r − cut gets input q + u through weight r + offset − s·u.
        offset = pad - cut
        first, last = -((extent - 1 - offset) // stride), (stride - 1 + offset) // stride
        positions = -(-(output + cut) // stride)
        steps = np.arange(first, last + 1)
        weight = np.arange(stride)[:, None] + offset - stride * steps[None, :]
        is_weight = (weight >= 0) & (weight < extent) & (weight % dilation == 0)
        found = _Axis(len(steps), first, positions, stride, cut, np.where(is_weight, weight // dilation, -1), 1)
        if best is None or (found.taps, found.positions) < (best.taps, best.positions):
            best = found
    assert best is not None
    return best


def spell_transposed_convolution(call: Any, graph: Graph) -> Any | None:
    """``R.nn.conv2d_transpose`` with constant weights becomes ``R.nn.conv2d``, and pixels made of its channels."""
    if operator_name(call) != "relax.nn.conv2d_transpose" or not is_float32(call):
        return None
    weights, attributes = graph.array(call.args[1]), call.attrs
    layouts = (str(attributes.data_layout), str(attributes.kernel_layout), str(attributes.out_layout))
    if weights is None or layouts[:2] != ("NCHW", "IOHW") or layouts[2] not in ("", "NCHW"):
        return None
    shape, padding = shape_of(call), [int(p) for p in attributes.padding]
    rows, columns = (
        _resolve_axis(
            weights.shape[2 + axis], int(attributes.strides[axis]), int(attributes.dilation[axis]), padding[axis],
            shape[2 + axis],
        )
        for axis in range(2)
    )  # fmt: skip
    if any(axis.reads_nothing(size) for axis, size in zip((rows, columns), shape_of(call.args[0])[2:], strict=True)):
        return None  # All outputs are zeros, and a convolution would read an empty map.
    groups = int(attributes.groups)
    packed = _packed(weights, rows, columns, groups)
    data, pads = _cut_input(call.args[0], [rows, columns], graph)
    name = graph.name_of(call.args[1], "") or graph.fresh_weight_name("conv2d")
    convolution = relax.op.nn.conv2d(
        data,
        graph.weight(packed, name),
        padding=pads,
        dilation=[rows.dilation, columns.dilation],
        groups=groups,
    )
    if rows.phases == columns.phases == 1:
        return convolution
    return _as_pixels(graph.emit(convolution), rows, columns, groups, shape, graph)


def spell_transposed_convolution_of_sequences(call: Any, graph: Graph) -> Any | None:
    """``R.nn.conv1d_transpose`` becomes ``R.nn.conv2d_transpose`` with a window of one row."""
    if operator_name(call) != "relax.nn.conv1d_transpose" or not is_float32(call):
        return None
    weights, attributes = graph.array(call.args[1]), call.attrs
    if weights is None or (str(attributes.data_layout), str(attributes.kernel_layout)) != ("NCW", "IOW"):
        return None
    before, after = int(attributes.padding[0]), int(attributes.padding[-1])
    convolution = relax.op.nn.conv2d_transpose(
        map_of_sequence(call.args[0], graph),
        graph.constant_like(weights[:, :, None, :], [call.args[1]]),
        strides=[1, int(attributes.strides[0])],
        padding=[0, before, 0, after],
        output_padding=[0, int(attributes.output_padding[0])],
        dilation=[1, int(attributes.dilation[0])],
        groups=int(attributes.groups),
    )
    return relax.op.reshape(graph.emit(convolution), shape_of(call))


def move_operator_before_pixels(call: Any, graph: Graph) -> Any | None:
    """What is done to every pixel of a channel alike is done to the channels that the pixels are made of."""
    if isinstance(call, relax.TupleGetItem):
        return _batch_norm(call, graph)
    name = operator_name(call)
    if (name not in _AFFINE and clip_bounds(call) is None) or not is_float32(call):
        return None
    pixels = _pixels(call.args[0], graph)
    if pixels is None or shape_of(call.args[0]) != shape_of(call):
        return None
    if name not in _AFFINE:
        moved = relax.Call(call.op, [pixels.channels, *call.args[1:]], call.attrs, call.ty_args)
        return pixels.remade(graph.emit(moved), graph)
    vector = _per_channel(graph.array(call.args[1]), shape_of(call)[1])
    if vector is None:
        return None
    constant = graph.constant_like(pixels.repeated(vector).reshape(1, -1, 1, 1), [call.args[1]])
    return pixels.remade(graph.emit(relax.Call(call.op, [pixels.channels, constant], call.attrs)), graph)


def _batch_norm(element: Any, graph: Graph) -> Any | None:
    call = graph.definition(element.tuple_value)
    if element.index != 0 or operator_name(call) != "relax.nn.batch_norm" or int(call.attrs.axis) != 1:
        return None
    pixels = _pixels(call.args[0], graph)
    values = [graph.array(a) for a in call.args[1:5]]
    known = [v for v in values if v is not None]
    if pixels is None or len(known) < len(values):
        return None
    vectors = [graph.constant_like(pixels.repeated(v), [a]) for v, a in zip(known, call.args[1:5], strict=True)]
    normalized = graph.emit(relax.Call(call.op, [pixels.channels, *vectors], call.attrs, call.ty_args))
    return pixels.remade(graph.emit(relax.TupleGetItem(normalized, 0)), graph)


@dataclass(frozen=True, eq=False)
class _Pixels:
    """A tensor whose pixels were made of channels.

    Attributes:
        channels: what they were made of.
        calls: the reshape, permute_dims, reshape, and the slice if there is one.
        kept: of the axes that the channels were split into, those that stay channels, in their new order.
    """

    channels: Any
    calls: tuple[Any, ...]
    kept: tuple[int, ...]

    def repeated(self, vector: Array) -> Array:
        """A number for each channel of the pixels as one for each channel that they were made of."""
        split = shape_of(self.calls[0])[1:-2]
        own = vector.reshape([split[axis] for axis in self.kept])
        in_order = own.transpose(np.argsort(self.kept))
        shape = [size if axis in self.kept else 1 for axis, size in enumerate(split)]
        return np.ascontiguousarray(np.broadcast_to(in_order.reshape(shape), split)).reshape(-1)

    def remade(self, channels: Any, graph: Graph) -> Any:
        """The same pixels of other channels."""
        made = channels
        for call in self.calls:
            source = made if made is channels else graph.emit(made)
            made = relax.Call(call.op, [source, *call.args[1:]], call.attrs, call.ty_args)
        return made


def _pixels(tensor: Any, graph: Graph) -> _Pixels | None:
    calls: list[Any] = []
    cut = graph.definition_of(tensor, "relax.strided_slice")
    if cut is not None:
        ranges, shape = slice_ranges(cut), shape_of(cut.args[0])
        if ranges is None or len(shape) != 4 or ranges[:2] != (range(shape[0]), range(shape[1])):
            return None
        calls.append(cut)
        tensor = cut.args[0]
    for name in ("relax.reshape", "relax.permute_dims", "relax.reshape"):
        call = graph.definition_of(tensor, name)
        if call is None:
            return None
        calls.append(call)
        tensor = call.args[0]
    split, permute, merge = calls[::-1][:3]
    before, after, axes = shape_of(split), shape_of(merge), permutation(permute)
    row, column = len(before) - 2, len(before) - 1
    if len(shape_of(tensor)) != 4 or len(after) != 4 or len(before) < 5 or axes[0] != 0:
        return None
    if (before[0], *before[-2:]) != (shape_of(tensor)[0], *shape_of(tensor)[2:]) or axes.index(row) > axes.index(
        column
    ):
        return None
    kept, high, wide = axes[1 : axes.index(row)], axes[axes.index(row) : axes.index(column)], axes[axes.index(column) :]
    sizes = [math.prod(before[axis] for axis in part) for part in ((0,), kept, high, wide)]
    if tuple(sizes) != after:
        return None
    return _Pixels(tensor, tuple(calls[::-1]), tuple(axis - 1 for axis in kept))


def _packed(weights: Array, rows: _Axis, columns: _Axis, groups: int) -> Array:
    """[I, O / groups, kh, kw] as [groups · phases · O / groups, I / groups, rows, columns] in that order of channels."""
    by_group = weights.reshape(groups, weights.shape[0] // groups, *weights.shape[1:])
    taken = by_group[:, :, :, rows.weights][..., columns.weights]  # [g, i, o, row phase, row, column phase, column]
    is_weight = (rows.weights >= 0)[:, :, None, None] & (columns.weights >= 0)
    ordered = np.where(is_weight, taken, 0).transpose(0, 3, 5, 2, 1, 4, 6)
    return np.ascontiguousarray(ordered).reshape(-1, by_group.shape[1], rows.taps, columns.taps)


def _cut_input(data: Any, axes: Sequence[_Axis], graph: Graph) -> tuple[Any, list[int]]:
    """The input without what no output reads, and the padding of the convolution."""
    sizes = shape_of(data)[2:]
    pads = [axis.padding(size) for axis, size in zip(axes, sizes, strict=True)]
    if any(p < 0 for pair in pads for p in pair):
        begin, end = (
            [max(0, -p) for p, _ in pads],
            [size - max(0, -p) for size, (_, p) in zip(sizes, pads, strict=True)],
        )
        data = graph.emit(relax.op.strided_slice(data, [2, 3], begin, end, [1, 1]))
    before, after = zip(*[(max(0, p), max(0, q)) for p, q in pads], strict=True)
    return data, [*before, *after]


def _as_pixels(channels: Any, rows: _Axis, columns: _Axis, groups: int, shape: Sequence[int], graph: Graph) -> Any:
    batch, out_channels, height, width = shape
    kept = [groups, out_channels // groups] if groups > 1 else [out_channels]
    split = [batch, *kept[:-1], rows.phases, columns.phases, kept[-1], rows.positions, columns.positions]
    order = [0, 1, 4, 5, 2, 6, 3] if groups > 1 else [0, 3, 4, 1, 5, 2]
    whole = (batch, out_channels, rows.positions * rows.phases, columns.positions * columns.phases)
    permuted = graph.emit(relax.op.permute_dims(graph.emit(relax.op.reshape(channels, split)), order))
    pixels = relax.op.reshape(permuted, whole)
    if whole == tuple(shape):
        return pixels
    begin = [rows.cut, columns.cut]
    return relax.op.strided_slice(graph.emit(pixels), [2, 3], begin, [begin[0] + height, begin[1] + width], [1, 1])


def _per_channel(values: Array | None, channels: int) -> Array | None:
    """A constant operand of [N, C, H, W] as vector over the channels, None where it is no constant of that kind."""
    if values is None or values.ndim > 4:
        return None
    shape = (1,) * (4 - values.ndim) + values.shape
    if shape[1] not in (1, channels) or values.size != shape[1]:
        return None
    return np.broadcast_to(values.reshape(-1), (channels,))
