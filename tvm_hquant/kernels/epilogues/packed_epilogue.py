"""The end of an anchor's kernel where the output has uint8 codes: four vectors of sums become one vector of bytes.

Instructions that narrow saturate, which is most of the clamp (:mod:`tvm_hquant.kernels.epilogues.saturating_clamp` on x86,
:mod:`tvm_hquant.kernels.arm.codes`), and leave a quarter of the stores. On x86 they work within parts of 16 bytes; the order
in which channels are packed into vectors makes up for it. The four vectors are those of one, two or four pixels, with four,
two or one vectors of channels each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.epilogues.turns import Turns
from tvm_hquant.kernels.interface import ProvenEnding
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, LlvmPrimitives, broadcast
from tvm_hquant.kernels.vector_loops import load, store
from tvm_hquant.kernels.word_vectors import GROUPS, CodeVectors

_BIASED = 2**23
"""A float32 with this exponent and an integer in its low bits is this much larger than the integer."""
_BIASED_HIGH_BYTE = 0x4B


def vector_groups(vectors: int, channels: int, lanes: int) -> list[tuple[int, int]]:
    """The vectors of a tile over ``channels`` in groups that are packed together, as (first vector, 4, 2 or 1).

    No group has more lanes than there are channels.
    """
    groups, first = [], 0
    for size in (4, 2, 1):
        while vectors - first >= size and size * lanes <= channels:
            groups.append((first, size))
            first += size
    return groups


def channel_order(vectors: int, channels: int, lanes: int) -> npt.NDArray[np.int64]:
    """int64 [vectors, lanes]: the channel, from the first of a tile, in every lane of its vectors of sums.

    Where the vectors have more lanes than there are channels, the last group is moved back to end with them.
    """
    order = np.empty((vectors, lanes), np.int64)
    parts, words = np.divmod(np.arange(lanes), 4)
    for first, size in vector_groups(vectors, channels, lanes):
        for i in range(size):
            order[first + i] = min(first * lanes, channels - size * lanes) + parts * 4 * size + 4 * i + words
    return order


@dataclass(frozen=True)
class PackedEpilogue:
    """Finishes groups of vectors.

    ``residual``, ``limits``, ``zero_points``, ``output`` and ``turns`` are as for
    :class:`tvm_hquant.kernels.epilogues.epilogue.Epilogue`.
    """

    vectors: CodeVectors
    residual: Buffer | None
    limits: Buffer
    zero_points: Buffer
    output: Buffer
    ending: ProvenEnding
    turns: Turns | None = None

    def finish(
        self,
        values: Sequence[Sequence[Expression]],
        places: Sequence[Expression],
        residuals: Sequence[Expression] = (),
        others: Sequence[Expression] = (),
    ) -> None:
        """Adds the residual to float32 values, clamps, rounds and stores.

        Args:
            values: [pixel][vector], 4, 2 or 1 vectors of channels of at most 1, 2 or 4 pixels.
            places: where the channels of each pixel start in the output.
            residuals: where they start in the residual, if not there.
            others: where those start that are stored in turns with them.
        """
        size = len(values[0])
        # Where pixels are missing, others stand in; they are not stored.
        flat = [value for pixel in values for value in pixel]
        flat += [flat[-1]] * (GROUPS - len(flat))
        if self.residual is not None:
            flat = self._add_residual(flat, size, residuals or places)
        clamp = self.vectors.clamp(self.limits, self.zero_points, self.ending)
        sums = [clamp.rounded(value) for value in flat]
        codes = clamp.codes(clamp.half(sums[0], sums[1]), clamp.half(sums[2], sums[3]))
        if size == GROUPS:
            self._store(codes, self.vectors.width, 0, places, others)
            return
        units = reinterpret_units(codes, size, self.vectors.width)
        for number in range(len(places)):
            chosen = T.Shuffle([units], [part * GROUPS // size + number for part in range(self.vectors.width // 16)])
            count = self.vectors.width * size // GROUPS
            self._store(T.reinterpret(f"uint8x{count}", chosen), count, number, places, others)

    def _store(
        self,
        codes: Expression,
        count: int,
        number: int,
        places: Sequence[Expression],
        others: Sequence[Expression],
    ) -> None:
        """Stores ``count`` codes of the pixel of that number, in turns with others if there are any."""
        if self.turns is None:
            store(self.output, places[number], codes, count)
            return
        other = T.bind(load(self.turns.other, others[number], count))
        store(self.output, places[number], self.turns.pairs(T.bind(codes), other), 2 * count)

    def _add_residual(self, values: Sequence[Expression], size: int, places: Sequence[Expression]) -> list[Expression]:
        assert self.residual is not None
        p, words, width = LlvmPrimitives(), self.vectors.words, self.vectors.width
        count = width * size // GROUPS
        stored = [load(self.residual, place, count) for place in places]
        if size < GROUPS:
            units = [reinterpret_units(value, size, count) for value in stored]
            units += [units[-1]] * (GROUPS // size - len(units))
            per_pixel = width // 16
            order = [pixel * per_pixel + part for part in range(per_pixel) for pixel in range(GROUPS // size)]
            stored = [T.reinterpret(f"uint8x{width}", T.Shuffle(units, order))]
        differences = centred_floats(self.vectors, T.bind(stored[0]), self.zero_points[1])
        multiplier = broadcast(self.limits[2], words)
        return [p.fma(d, multiplier, value) for d, value in zip(differences, values, strict=True)]


def centred_floats(vectors: CodeVectors, codes: Expression, zero_point: Expression) -> list[Expression]:
    """float32 of uint8 codes less a zero point, exactly: four vectors, lanes in the order of :func:`channel_order`."""
    zero = T.broadcast(T.uint8(0), vectors.width)
    exponent = T.reinterpret(
        f"uint8x{vectors.width}", T.broadcast(T.uint16(_BIASED_HIGH_BYTE << 8), vectors.width // 2)
    )
    bias = broadcast(T.Cast("float32", zero_point + _BIASED), vectors.words)
    floats = []
    for group in range(GROUPS):
        halves = vectors.unpack(codes, zero, group // 2, 1)
        biased = T.reinterpret(f"float32x{vectors.words}", vectors.unpack(halves, exponent, group % 2, 2))
        floats.append(biased - bias)
    return floats


def reinterpret_units(value: Expression, size: int, width: int) -> Expression:
    """A vector of ``width`` bytes as integers of 4 · ``size`` bytes each."""
    return T.reinterpret(f"int{32 * size}x{width // (4 * size)}", value)
