"""The copy of activations in which groups of channels take turns: what dot products read whose lanes belong to several groups.

A grouped convolution whose output is shuffled writes channels of all groups side by side. If the lanes of a vector of sums
take turns among the groups, too, the vector is stored as it is; no lane is idle where a group has fewer channels than
a vector has lanes. One load then brings the operands of all groups, for in this copy they are neighbours:

    pixel:   group 0: a0 a1 a2 a3 a4 a5 …   group 1: b0 b1 b2 b3 b4 b5 …
    copy:    a0 a1 a2 a3  b0 b1 b2 b3  a4 a5 a6 a7  b4 b5 b6 b7 …              (four products a step)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.convolution.group_interleaving import interleaved
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, convert, lanes_of, vector_type, widen
from tvm_hquant.kernels.processor import Processor
from tvm_hquant.kernels.vector_loops import load, row_loop, store, vector_loop
from tvm_hquant.kernels.work import of_bytes
from tvm_hquant.operators import Conv2D

_VECTOR_BYTES = 16
_COPY = 3
"""Instructions for as many bytes that are interleaved."""


def can_interleave_groups(request: KernelRequest, dot: DotProduct) -> bool:
    """Whether lanes can take turns among the groups of a convolution of 8-bit codes or of floats."""
    conv = request.operator
    if not isinstance(conv, Conv2D) or conv.is_depthwise or not 1 < conv.groups <= dot.lanes:
        return False
    has_codes = (request.inputs[0], request.weights) == ("uint8", "int8")
    has_floats = request.inputs[0] == request.weights and request.weight_points == 1
    fits = conv.in_channels // conv.groups >= dot.products and conv.out_channels >= dot.lanes
    return fits and (has_codes or has_floats)


def saves_time(in_turns: AnchorGeometry, apart: AnchorGeometry, stored_dtype: str) -> bool:
    """Whether a convolution whose lanes take turns takes less time than one whose lanes have one group each.

    Beside the steps and epilogues of tiles it copies its activations, the other its outputs.
    """
    conv, cost = apart.conv, copying_cost(np.dtype(stored_dtype).itemsize)
    copied = 0.0 if apart.needs_copy(stored_dtype) else prod(conv.input_shape) * cost
    return in_turns.cost + copied <= apart.cost + prod(conv.output_shape) * cost


def copying_cost(element_bytes: int) -> float:
    """Instructions for an element of so many bytes that is put side by side with those of other groups."""
    return _COPY * element_bytes / _VECTOR_BYTES


@dataclass(frozen=True)
class InterleavedGroups:
    """Copies activations, flat, to ``target`` [pixel, step, group, product] in the dot product's operand dtype.

    What is missing of the last step is zero, as its weights are.
    """

    conv: Conv2D
    dot: DotProduct
    storage: str
    source: Buffer
    target: Buffer
    processor: Processor

    def emit(self, first_pixel: Expression, pixels: int) -> None:
        """Writes the loops for so many pixels from the first one on, counted over all rows and images."""
        inputs, products, groups = self.conv.in_channels // self.conv.groups, self.dot.products, self.dot.groups
        full, steps = inputs // products, -(-inputs // products)
        at_once = _VECTOR_BYTES // (products * self._element_bytes)
        while at_once > full:
            at_once //= 2
        bundles = self.conv.groups // groups
        runs = pixels * bundles
        moved = of_bytes(2 * pixels * self.conv.in_channels * self._element_bytes)
        start = T.bind(first_pixel * self.conv.in_channels)
        with row_loop(runs, moved, self.processor) as run:
            first, place = T.bind(start + run * (groups * inputs)), T.bind(run * (steps * groups * products))
            if at_once:
                with vector_loop(full, at_once) as step:
                    parts = [self._units(first + g * inputs + step * products, at_once) for g in range(groups)]
                    self._store(interleaved(parts), place + step * (groups * products))
            if steps > full:
                # The last channels are read with some before them, which are shifted out.
                missing = 8 * self._element_bytes * (steps * products - inputs)
                parts = [self._units(first + (g + 1) * inputs - products, 1) for g in range(groups)]
                parts = [part >> T.Cast(str(part.ty.dtype), T.int32(missing)) for part in parts]
                self._store(interleaved(parts), place + full * (groups * products))

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
        if self.dot.operand_dtype == "float32":
            store(self.target, place, widen(stored, self.storage), count)
            return
        store(self.target, place, convert(stored, self.dot.operand_dtype), count)
