"""Finds channels that are laid out as pixels in a channels-last ``main``.

DepthToSpace, PixelShuffle and, after ``canonicalize`` and ``convert_layout``, transposed convolutions have this chain; axes of
one element may be missing or lie elsewhere, and the slice may be missing::

    lv = R.reshape(x, (N, H, W, groups, rows, columns, depth))
    lv1 = R.permute_dims(lv, [0, 1, 4, 2, 5, 3, 6])
    lv2 = R.reshape(lv1, (N, H · rows, W · columns, groups · depth))
    lv3 = R.strided_slice(lv2, axes=[1, 2], begin=[top, left], ...)

Where one channel leaves the graph, the second reshape went on to the model's order, (N, 1, H · rows, W · columns);
:func:`spell_single_channel_pixels` writes it apart again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax

from tvm_hquant.operators import Movement
from tvm_hquant.relax_ir.canonical_rules.movement import slice_ranges
from tvm_hquant.relax_ir.describe import is_float32, operator_name, permutation, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph


@dataclass(frozen=True, eq=False)
class FoundDepthToSpace:
    """One chain: the positions of its bindings in ascending order, the tensor that flows in, and what it computes."""

    indices: tuple[int, ...]
    data: Any
    operator: Movement


def find_depth_to_space(
    bindings: Sequence[tuple[Any, Any]], readers: Mapping[Any, Sequence[int]]
) -> list[FoundDepthToSpace]:
    """All chains among the (variable, value) pairs of ``main``, each to where its tensors are read by something else.

    ``readers`` gives the positions of the bindings that read a variable.
    """
    found = [_starting_at(index, bindings, readers) for index in range(len(bindings))]
    return [chain for chain in found if chain is not None]


def spell_single_channel_pixels(call: Any, graph: Graph) -> Any | None:
    """The end of a chain whose one channel stands before the pixels becomes the chain's own end and a reshape."""
    permute = (
        graph.definition_of(call.args[0], "relax.permute_dims") if operator_name(call) == "relax.reshape" else None
    )
    split = graph.definition_of(permute.args[0], "relax.reshape") if permute is not None else None
    after = shape_of(call)
    if split is None or len(after) != 4 or after[1] != 1 or len(before := shape_of(split.args[0])) != 4:
        return None
    pixels = (after[0], *after[2:], 1)
    if after == pixels or _block(before, shape_of(split), permutation(permute), pixels) is None:
        return None
    return relax.op.reshape(relax.op.reshape(call.args[0], pixels), after)


def _starting_at(
    index: int, bindings: Sequence[tuple[Any, Any]], readers: Mapping[Any, Sequence[int]]
) -> FoundDepthToSpace | None:
    indices = [index]

    def following(operator: str) -> Any | None:
        own = readers.get(bindings[indices[-1]][0], ())
        if len(own) != 1 or own[0] >= len(bindings) or operator_name(bindings[own[0]][1]) != operator:
            return None
        indices.append(own[0])
        return bindings[own[0]][1]

    split = bindings[index][1]
    if operator_name(split) != "relax.reshape" or not is_float32(split) or len(shape_of(split.args[0])) != 4:
        return None
    if (permute := following("relax.permute_dims")) is None or (merge := following("relax.reshape")) is None:
        return None
    block = _block(shape_of(split.args[0]), shape_of(split), permutation(permute), shape_of(merge))
    if block is None:
        return None
    output, top, left = shape_of(merge), 0, 0
    cut = following("relax.strided_slice")
    if cut is not None:
        ranges = slice_ranges(cut)
        if ranges is not None and _cuts_pixels(ranges, output):
            output, top, left = shape_of(cut), ranges[1].start, ranges[2].start
        else:
            indices.pop()
    operator = Movement("depth_to_space", shape_of(split.args[0]), output, (*block, top, left))
    return FoundDepthToSpace(tuple(indices), split.args[0], operator)


def _block(
    before: Sequence[int], split: Sequence[int], axes: Sequence[int], after: Sequence[int]
) -> tuple[int, int, int] | None:
    """Groups, rows and columns; None where axes change places in another way."""
    if len(after) != 4 or len(split) < 5:
        return None
    split, axes = _without_ones(before, split, axes)
    if tuple(split[:3]) != tuple(before[:3]) or tuple(axes[:2]) != (0, 1):
        return None
    column = axes.index(2)
    # Behind the rows stand those of a block, behind the columns those of a block and then what stays a channel.
    of_rows, others = axes[2:column], axes[column + 1 :]
    for of_columns, kept in ((others[:1], others[1:]), ([], others)):
        sizes = [math.prod(split[a] for a in part) for part in ((0,), (1, *of_rows), (2, *of_columns), kept)]
        if tuple(sizes) != tuple(after) or len(of_rows) > 1 or not (of_rows or of_columns):
            continue
        block = [*of_rows, *of_columns]
        behind = [axis for axis in kept if axis > block[-1]]
        in_front = [axis for axis in kept if axis < block[0]]
        if [*in_front, *block, *behind] == sorted([*kept, *block]) and list(kept) == sorted(kept):
            rows, columns = (math.prod(split[a] for a in part) for part in (of_rows, of_columns))
            return math.prod(split[a] for a in in_front), rows, columns
    return None


def _without_ones(
    before: Sequence[int], split: Sequence[int], axes: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    """The sizes and the order of axes without those of one element that are not images, rows or columns of the map.

    Where one channel or one group stands beside a block, its axis may lie anywhere.
    """
    of_map, position = [], 0
    for size in before[:3]:
        while size > 1 and position < len(split) and split[position] == 1:
            position += 1
        of_map.append(position)
        position += 1
    kept = [axis for axis, size in enumerate(split) if size > 1 or axis in of_map]
    return [split[axis] for axis in kept], [kept.index(axis) for axis in axes if axis in kept]


def _cuts_pixels(ranges: Sequence[range], shape: Sequence[int]) -> bool:
    whole = [range(size) for size in shape]
    return ranges[0] == whole[0] and ranges[3] == whole[3] and ranges[1].step == ranges[2].step == 1
