"""The copy of activations in which groups of channels take turns: what dot products read whose lanes belong to several groups.

A grouped convolution whose output is shuffled writes channels of all groups side by side. If the lanes of a vector of sums
take turns among the groups, too, the vector is stored as it is; no lane is idle where a group has fewer channels than
a vector has lanes. One load then brings the operands of all groups, for in this copy they are neighbours:

    pixel:   group 0: a0 a1 a2 a3 a4 a5 …   group 1: b0 b1 b2 b3 b4 b5 …
    copy:    a0 a1 a2 a3  b0 b1 b2 b3  a4 a5 a6 a7  b4 b5 b6 b7 …              (four products a step)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, convert, lanes_of, vector_type
from tvm_hquant.kernels.vector_loops import load, row_loop, store, vector_loop
from tvm_hquant.operators import Conv2D

_VECTOR_BYTES = 16
_PRODUCT = 1.5
"""What a multiply-add of a vector takes, in floats that are copied or shuffled."""


def can_interleave_groups(request: KernelRequest, dot: DotProduct) -> bool:
    """Whether lanes can take turns, and do so at a gain, among the groups of a convolution of 8-bit codes or of float32."""
    conv = request.operator
    # The epilogue that packs codes keeps neighbouring channels together in fours, not more.
    most = {("uint8", "int8"): 4, ("float32", "float32"): 8}.get((request.inputs[0], request.weights), 1)
    if not isinstance(conv, Conv2D) or conv.is_depthwise or conv.groups not in (2, 4, 8) or conv.groups > most:
        return False
    is_plain = len(request.inputs) == 1 and request.placement is None and request.overwritten is None
    fits = conv.in_channels // conv.groups >= dot.products and conv.out_channels >= dot.lanes
    if not (is_plain and fits and dot.lanes % conv.groups == 0):
        return False
    return request.weights == "int8" or _saves_time(conv, dot.lanes)


def _saves_time(conv: Conv2D, lanes: int) -> bool:
    """Whether a float convolution gains by the copy, which takes the place of a shuffle and leaves no lanes idle."""
    apart = conv.groups * -(-conv.out_channels // (conv.groups * lanes))
    saved_vectors = apart - -(-conv.out_channels // lanes)
    outputs = prod(conv.output_shape)
    saved = outputs // conv.out_channels * saved_vectors * prod(conv.weight_shape[1:])
    return prod(conv.input_shape) <= outputs + _PRODUCT * saved


@dataclass(frozen=True)
class InterleavedGroups:
    """Copies activations, flat, to ``target`` [pixel, step, group, product] in the dot product's operand dtype.

    What is missing of the last step is zero, as its weights are.
    """

    conv: Conv2D
    dot: DotProduct
    source: Buffer
    target: Buffer

    def emit(self) -> None:
        """Writes the loops."""
        inputs, products, groups = self.conv.in_channels // self.conv.groups, self.dot.products, self.dot.groups
        n, height, width, channels = self.conv.input_shape
        full, steps = inputs // products, -(-inputs // products)
        at_once = _VECTOR_BYTES // (products * self._element_bytes)
        while at_once > full:
            at_once //= 2
        bundles = self.conv.groups // groups
        runs = n * height * width * bundles
        with row_loop(runs, n * height * width * channels) as run:
            first, place = T.bind(run * (groups * inputs)), T.bind(run * (steps * groups * products))
            if at_once:
                with vector_loop(full, at_once) as step:
                    parts = [self._units(first + g * inputs + step * products, at_once) for g in range(groups)]
                    self._store(_interleaved(parts), place + step * (groups * products))
            if steps > full:
                # The last channels are read with some before them, which are shifted out.
                missing = 8 * self._element_bytes * (steps * products - inputs)
                parts = [self._units(first + (g + 1) * inputs - products, 1) for g in range(groups)]
                parts = [part >> T.Cast(str(part.ty.dtype), T.int32(missing)) for part in parts]
                self._store(_interleaved(parts), place + full * (groups * products))

    @property
    def _element_bytes(self) -> int:
        return np.dtype(str(self.source.dtype)).itemsize

    def _units(self, start: Expression, count: int) -> Expression:
        """The channels of ``count`` steps, each as one number."""
        products = self.dot.products
        unit = vector_type(f"uint{8 * self._element_bytes * products}", count)
        return T.bind(T.reinterpret(unit, load(self.source, start, count * products)))

    def _store(self, units: Expression, place: Expression) -> None:
        count = lanes_of(units) * self.dot.products
        stored = T.reinterpret(vector_type(str(self.source.dtype), count), units)
        store(self.target, place, convert(stored, self.dot.operand_dtype), count)


def _interleaved(parts: Sequence[Expression]) -> Expression:
    """The first unit of every part, then the second of every part, and so on."""
    if len(parts) == 1:
        return parts[0]
    a, b = _interleaved(parts[::2]), _interleaved(parts[1::2])
    count = lanes_of(a)
    return T.bind(T.Shuffle([a, b], [source * count + i for i in range(count) for source in (0, 1)]))
