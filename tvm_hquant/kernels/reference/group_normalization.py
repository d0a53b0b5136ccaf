"""Layer, group and instance normalization as plain loop nests."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer, kernel_function
from tvm_hquant.kernels.primitives import Expression, Primitives, widen
from tvm_hquant.kernels.reference.blocks import Axes, accumulate, block, intermediate
from tvm_hquant.kernels.weightless.elementwise import is_code, stored_float
from tvm_hquant.kernels.weightless.group_normalization import (
    mean_of,
    normalization_types,
    pack_normalization,
    reciprocal_deviation,
    sum_of_partial_sums,
)
from tvm_hquant.numerics.group_normalization import PARTIAL_SUMS
from tvm_hquant.operators import GroupNormalization
from tvm_hquant.tensor_format import STORAGE_DTYPE


def reference_group_normalization(request: KernelRequest, operator: GroupNormalization, p: Primitives) -> Kernel | None:
    """The kernel for a request; None where it reads codes."""
    if is_code(request.inputs[0]):
        return None
    storage, shape = request.inputs[0], operator.shape
    outer, positions, groups, per_group = (
        operator.outer,
        operator.positions,
        operator.groups,
        operator.group_channels,
    )
    depth = min(PARTIAL_SUMS, per_group)

    def indices(n: Expression, position: Expression, channel: Expression) -> tuple[Expression, ...]:
        """Indices into the tensor of an element of one of its three parts."""
        split = [
            (n, shape[: operator.axis]),
            (position, shape[operator.axis : operator.channel_axis]),
            (channel, shape[operator.channel_axis :]),
        ]
        found: Axes = []
        for flat, sizes in split:
            own: Axes = []
            for size in reversed(sizes):
                own.insert(0, T.floormod(flat, size) if len(sizes) > 1 else flat)
                flat = T.floordiv(flat, size)
            found += own
        return tuple(found)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        gamma, beta, *ending = constants
        partial, squares = (intermediate((outer, groups, depth), "float32") for _ in range(2))
        mean, factor = (intermediate((outer, groups), "float32") for _ in range(2))
        zero = T.Cast(STORAGE_DTYPE[storage], T.int32(0))
        summed_shape = (positions, -(-per_group // PARTIAL_SUMS))

        def element(axes: Axes, summed: Axes) -> tuple[Expression, Expression]:
            """Whether a group has the channel that is added in a step, and its stored value."""
            n, group, lane = axes
            channel = summed[1] * PARTIAL_SUMS + lane
            exists = channel < per_group
            place = indices(n, summed[0], group * per_group + T.min(channel, per_group - 1))
            return exists, inputs[0][place]

        def total(sums: Buffer, axes: Axes) -> Expression:
            """Bound, so that dlight leaves it a block of its own: what it puts into another one, each element computes."""
            return p.bind(sum_of_partial_sums(p, [sums[(*axes, T.int32(k))] for k in range(depth)]))

        with block("sums", (outer, groups, depth), summed_shape) as (axes, summed):
            exists, stored = element(axes, summed)
            x = widen(T.if_then_else(exists, stored, zero), storage)
            accumulate(partial, axes, T.float32(0), p.add(partial[tuple(axes)], x))
        with block("mean", (outer, groups)) as (axes, _):
            T.buffer_store(mean, mean_of(p, total(partial, axes), operator), axes)
        with block("squares", (outer, groups, depth), summed_shape) as (axes, summed):
            exists, stored = element(axes, summed)
            d = p.subtract(widen(stored, storage), mean[axes[0], axes[1]])
            d = T.Select(exists, d, T.float32(0))
            accumulate(squares, axes, T.float32(0), p.fma(d, d, squares[tuple(axes)]))
        with block("deviation", (outer, groups)) as (axes, _):
            variance = mean_of(p, total(squares, axes), operator)
            T.buffer_store(factor, reciprocal_deviation(p, variance, operator), axes)
        with block("normalize", (outer, positions, groups, per_group)) as (axes, _):
            n, position, group, own = axes
            channel = group * per_group + own
            place = indices(n, position, channel)
            d = p.subtract(widen(inputs[0][place], storage), mean[n, group])
            result = p.fma(p.multiply(d, factor[n, group]), gamma[channel], beta[channel])
            T.buffer_store(output, stored_float(p, result, request, ending), list(place))

    function = kernel_function(request, normalization_types(request, operator), emit)
    return Kernel(request, "reference.group_normalization", function, pack_normalization(request))
