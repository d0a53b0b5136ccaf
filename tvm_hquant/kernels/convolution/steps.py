"""The inner part of a convolution's tile: the steps over kernel positions and input channels that add to its sums.

A step multiplies one operand of each pixel with one weight vector of each vector of channels. Steps are taken in the order
of memory, or in one that the packed weights decide (:mod:`.step_groups`); where sums of a chain of steps
surely fit into short ones, those stay in registers until they are widened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.convolution.tile_order import UpcomingElements
from tvm_hquant.kernels.dot_product import ShortSums
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import STACK, Expression, vector_type
from tvm_hquant.kernels.vector_loops import load, store


def register(dtype: str, lanes: int) -> Buffer:
    """A vector of a tile. Each is a buffer of its own: TVM puts nothing on the stack that has 1024 bytes or more."""
    return T.alloc_buffer((lanes,), dtype, scope=STACK)


def unrolled(count: int, most: int, fewest: int = 1) -> int:
    """How many of ``count`` equal parts a loop's body takes: up to ``most``, but so that there are ``fewest`` bodies."""
    return max(1, min(most, count // fewest))


@dataclass(frozen=True)
class StepEmitter:
    """Writes the steps of tiles. Accumulators are named by pixel and vector of channels.

    Attributes:
        geometry: of the convolution.
        weights: packed, flat.
        source: activations in the form of the operands, flat.
    """

    geometry: AnchorGeometry
    weights: Buffer
    source: Buffer

    @property
    def take_one_run(self) -> bool:
        """Whether all steps of a tile are one run that asks for memory, with a full load of operands or more for each pixel."""
        geometry = self.geometry
        return (
            geometry.dot.prefetches
            and geometry.all_steps == geometry.steps
            and geometry.passes == 1
            and not (geometry.groups_steps or geometry.skips_padding)
            and geometry.parts(geometry.full_steps)[0] >= geometry.tile.pixels
        )

    def run(
        self,
        pixels: int,
        accumulators: Mapping[tuple[int, int], Buffer],
        activation: Expression,
        weight: Expression,
        steps: int,
        upcoming: Sequence[UpcomingElements],
        done: Expression,
        between: Callable[[Expression], None] | None = None,
    ) -> None:
        """A run of steps of a tile of so many pixels, for the accumulators that take part.

        ``done`` counts the steps of the tile before it. What ``between`` writes for the number of a pixel is written for every
        pixel, spread over the run.
        """
        geometry, dot = self.geometry, self.geometry.dot
        step_weights = geometry.step_weights
        full_steps = max(dot.operand_steps, geometry.chain)
        overlapping = steps == geometry.steps and geometry.full_steps < steps
        full, rest = geometry.parts(steps - overlapping)

        def part(first: Expression, count: int, size: int = full_steps) -> None:
            """``count`` loads of operands for ``size`` steps each, from step ``first``."""
            for elements in upcoming:
                elements.prefetch(done + first, count * size)
            for number in range(count):
                step = first + number * size
                at = activation + step * (dot.products * dot.groups)
                self._steps(pixels, accumulators, at, weight + step * step_weights, size)

        fewest = pixels if between is not None else 1
        at_once = unrolled(full, max(1, dot.unrolled // full_steps), fewest)
        bodies, left = divmod(full, at_once)
        if between is not None:
            # Loops of equal length have one body.
            loops = next((size for size in range(pixels, bodies) if bodies % size == 0), bodies)
            with T.serial(loops) as number:
                between(T.min(number, pixels - 1))
                with T.serial(bodies // loops) as body:
                    part((number * (bodies // loops) + body) * (at_once * full_steps), at_once)
        elif bodies > 1:
            with T.serial(bodies) as body:
                part(body * (at_once * full_steps), at_once)
        elif bodies:
            part(0, at_once)
        if left:
            part(bodies * at_once * full_steps, left)
        first = full * full_steps
        for size in rest:
            part(first, 1, size)
            first += size
        if overlapping:
            last = activation + (geometry.run_inputs - dot.products)
            self._steps(pixels, accumulators, last, weight + first * step_weights, 1)

    def in_table_order(
        self,
        table: Buffer,
        accumulators: Mapping[tuple[int, int], Buffer],
        corner: Expression,
        weight: Expression,
        channel_block: Expression,
    ) -> None:
        """All steps of a tile in the order of the packed weights: groups, pairs, then the steps without a partner."""
        geometry = self.geometry
        size = geometry.tile.vectors * self.geometry.dot.lanes * self.geometry.dot.products
        row = T.bind(channel_block * (2 + geometry.all_steps))
        groups, pairs = T.bind(table[row]), T.bind(table[row + 1])
        stages = [(geometry.group, groups)] if geometry.group > 2 else []
        left = geometry.all_steps - geometry.group * groups - 2 * pairs
        first: Expression = 0
        for chain, count in (*stages, (2, pairs), (1, left)):
            with T.serial(count) as number:
                step = T.bind(first + number * chain)
                starts = [T.bind(corner + table[row + 2 + step + c]) for c in range(chain)]
                short_sums = self.geometry.dot.short_sums(chain)
                if short_sums is None:
                    self._sum_steps(accumulators, starts, weight + step * size)
                else:
                    self._add_chain(short_sums, accumulators, starts, T.bind(weight + step * size))
            first = T.bind(first + chain * count)

    def _sum_steps(
        self, accumulators: Mapping[tuple[int, int], Buffer], activations: Sequence[Expression], weight: Expression
    ) -> None:
        """A chain of steps, whose activations start at several places, for one accumulator after the other."""
        dot, conv, vectors = self.geometry.dot, self.geometry.conv, self.geometry.tile.vectors
        pixel = conv.window.strides[1] * self.geometry.pixel_elements
        count = dot.lanes * dot.products
        weight = T.bind(weight)
        of_vectors = [
            [T.bind(load(self.weights, weight + (c * vectors + j) * count, count)) for c in range(len(activations))]
            for j in range(vectors)
        ]
        turns = self.geometry.turns
        for (i, j), accumulator in accumulators.items():
            loaded = [dot.operands(self.source, [start + i * pixel], 1)[0] for start in activations]
            operands = [dot.in_turns(operand, turns[j]) for operand in loaded]
            value = dot.accumulate(load(accumulator, 0, dot.lanes), operands, of_vectors[j])
            store(accumulator, 0, value, dot.lanes)

    def _steps(
        self,
        pixels: int,
        accumulators: Mapping[tuple[int, int], Buffer],
        activation: Expression,
        weight: Expression,
        steps: int,
    ) -> None:
        """Some steps, whose operands are loaded at once, for all accumulators."""
        geometry, dot, conv = self.geometry, self.geometry.dot, self.geometry.conv
        vectors = geometry.tile.vectors
        pixel = conv.window.strides[1] * geometry.pixel_elements
        vector_weights, chain = dot.lanes * dot.products, geometry.chain
        activation, weight = T.bind(activation), T.bind(weight)
        loaded: dict[int, list[Expression]] = {}
        operands: dict[tuple[int, Sequence[int]], list[Expression]] = {}
        weight_type = vector_type(dot.weight_dtype, vector_weights)
        size = dot.accumulator_elements
        short_sums = dot.short_sums(chain)
        for first in range(0, steps, chain):
            if short_sums is not None:
                starts = [
                    activation + step * dot.products * dot.groups for step in range(first, min(first + chain, steps))
                ]
                self._add_chain(short_sums, accumulators, starts, weight + first * vectors * vector_weights)
                continue
            of_vectors = [
                [
                    T.bind(self.weights.vload([weight + ((first + c) * vectors + j) * vector_weights], weight_type))
                    for c in range(min(chain, steps - first))
                ]
                for j in range(vectors)
            ]
            for (i, j), accumulator in accumulators.items():
                if i not in loaded:
                    indices = [activation + min(i + k, pixels - 1) * pixel for k in range(dot.pixels)]
                    loaded[i] = [T.bind(operand) for operand in dot.operands(self.source, indices, steps)]
                turns = geometry.turns[j]
                if (i, turns) not in operands:
                    operands[i, turns] = [T.bind(dot.in_turns(operand, turns)) for operand in loaded[i]]
                of_chain = operands[i, turns][first : first + chain]
                value = dot.accumulate(load(accumulator, 0, size), of_chain, of_vectors[j])
                store(accumulator, 0, value, size)
        for accumulator in accumulators.values():
            fenced = dot.fence(load(accumulator, 0, size))
            if fenced is not None:
                store(accumulator, 0, fenced, size)

    def _add_chain(
        self,
        short_sums: ShortSums,
        accumulators: Mapping[tuple[int, int], Buffer],
        activations: Sequence[Expression],
        weight: Expression,
    ) -> None:
        """A chain of steps whose activations start at several places. Their sums stay in registers until the last step."""
        dot, conv, vectors = self.geometry.dot, self.geometry.conv, self.geometry.tile.vectors
        pixel = conv.window.strides[1] * self.geometry.pixel_elements
        count = dot.lanes * dot.products
        weight_type = vector_type(dot.weight_dtype, count)
        sums = {place: register(short_sums.dtype, short_sums.lanes) for place in accumulators}
        pixels = [i for i, j in accumulators if j == 0]
        for step, activation in enumerate(activations):
            at = weight + step * vectors * count
            of_vectors = [T.bind(self.weights.vload([at + j * count], weight_type)) for j in range(vectors)]
            for i in pixels:
                (loaded,) = dot.operands(self.source, [activation + i * pixel], 1)
                loaded, operands = T.bind(loaded), {}
                for j, turns in enumerate(self.geometry.turns):
                    if turns not in operands:
                        operands[turns] = T.bind(dot.in_turns(loaded, turns))
                    total = load(sums[i, j], 0, short_sums.lanes) if step else None
                    store(sums[i, j], 0, short_sums.add(total, operands[turns], of_vectors[j]), short_sums.lanes)
        for place, accumulator in accumulators.items():
            total = load(sums[place], 0, short_sums.lanes)
            store(accumulator, 0, short_sums.widen(load(accumulator, 0, dot.lanes), total), dot.lanes)
