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

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, convert, lanes_of, vector_type
from tvm_hquant.kernels.vector_loops import load, row_loop, store, vector_loop
from tvm_hquant.operators import Conv2D

_VECTOR_BYTES = 16


def can_interleave_groups(request: KernelRequest, dot: DotProduct) -> bool:
    """Whether the lanes of a dot product can take turns among the groups of a convolution of 8-bit codes."""
    conv = request.operator
    # The packed epilogue keeps neighbouring channels together in fours, not more.
    if not isinstance(conv, Conv2D) or conv.is_depthwise or conv.groups not in (2, 4) or dot.lanes % conv.groups:
        return False
    is_plain = request.inputs == ("uint8",) and request.weights == "int8" and request.placement is None
    enough = conv.in_channels // conv.groups >= dot.products and conv.out_channels >= dot.lanes
    return is_plain and enough and not any(conv.window.padding)


@dataclass(frozen=True)
class InterleavedGroups:
    """Copies uint8 activations, flat, to ``target`` [pixel, step, group, product] in the dot product's operand dtype.

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
        at_once = _VECTOR_BYTES // products
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
                missing = 8 * (steps * products - inputs)
                parts = [self._units(first + (g + 1) * inputs - products, 1) for g in range(groups)]
                parts = [part >> T.Cast(str(part.ty.dtype), T.int32(missing)) for part in parts]
                self._store(_interleaved(parts), place + full * (groups * products))

    def _units(self, start: Expression, count: int) -> Expression:
        """The channels of ``count`` steps, each as one number."""
        products = self.dot.products
        return T.bind(
            T.reinterpret(vector_type(f"uint{8 * products}", count), load(self.source, start, count * products))
        )

    def _store(self, units: Expression, place: Expression) -> None:
        count = lanes_of(units) * self.dot.products
        store(self.target, place, convert(T.reinterpret(f"uint8x{count}", units), self.dot.operand_dtype), count)


def _interleaved(parts: Sequence[Expression]) -> Expression:
    """The first unit of every part, then the second of every part, and so on."""
    if len(parts) == 1:
        return parts[0]
    a, b = _interleaved(parts[::2]), _interleaved(parts[1::2])
    count = lanes_of(a)
    return T.bind(T.Shuffle([a, b], [source * count + i for i in range(count) for source in (0, 1)]))
