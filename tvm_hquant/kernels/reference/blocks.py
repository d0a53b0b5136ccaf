"""The shape of every reference kernel: plain loop nests around blocks that say which axes are independent.

``tvm.s_tir.dlight`` schedules such blocks for GPUs, and LLVM compiles them as they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.operators import Shape

Axes = list[Expression]


@contextmanager
def block(name: str, spatial: Shape, reduced: Shape = ()) -> Iterator[tuple[Axes, Axes]]:
    """Loops over independent and summed axes around one block; gives the block's variables of both."""
    with T.grid(*spatial, *reduced) as loops:
        variables = list(loops) if len(spatial) + len(reduced) > 1 else [loops]
        with T.sblock(name):
            count = len(spatial)
            independent = [T.axis.spatial(n, v) for n, v in zip(spatial, variables[:count], strict=True)]
            summed = [T.axis.reduce(n, v) for n, v in zip(reduced, variables[count:], strict=True)]
            yield independent, summed


def intermediate(shape: Shape, dtype: str) -> Buffer:
    """A buffer between two blocks."""
    return T.sblock_alloc_buffer(shape, dtype)


def accumulate(target: Buffer, axes: Axes, start: Expression, value: Expression) -> None:
    """Inside a block with summed axes: ``target`` begins at ``start`` and then becomes ``value``, which reads it."""
    with T.init():
        T.buffer_store(target, start, axes)
    T.buffer_store(target, value, axes)


def inside(index: Expression, size: int) -> Expression:
    """Whether an index lies on the map."""
    return T.And(index >= 0, index < size)


def within_map(
    row: Expression, column: Expression, height: int, width: int, value: Expression, fill: Expression
) -> Expression:
    """``value``, which is loaded from a row and column of a map, or ``fill`` where they lie in the padding."""
    return T.if_then_else(T.And(inside(row, height), inside(column, width)), value, fill)
