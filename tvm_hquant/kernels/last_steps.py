"""The last steps of a tile, which few of its pixels take at a time, each time followed by the epilogue of these pixels.

The products of a step and the conversions, packs and stores of an epilogue go to different units of a core. Where a tile takes
all its steps before all its epilogue, a core that looks a hundred vector instructions ahead finds the one or the other; in
turns they run side by side. The weights of these steps are read once more for every group of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm_hquant.kernels.packed_epilogue import vector_groups
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.word_vectors import GROUPS

_SUMS = 8
"""Sums of a group of pixels, at least: a product waits for the one before it in its sum."""
MOST_STEPS = 64
"""Steps of a tile, at most: beside more of them the epilogue is short, and what is saved is less than what the turns cost."""


@dataclass(frozen=True)
class LastSteps:
    """Steps that a tile has not taken yet.

    Attributes:
        activation: where the first of them reads for the first pixel.
        weight: where its weights are.
        count: how many.
    """

    activation: Expression
    weight: Expression
    count: int


def pixel_groups(pixels: int, vectors: int) -> tuple[range, ...]:
    """Pixels of a tile in groups of as many as have enough sums, and fill the vectors that are packed together."""
    _, smallest = vector_groups(vectors)[-1]
    size = max(-(-_SUMS // vectors), GROUPS // smallest)
    return tuple(range(first, min(first + size, pixels)) for first in range(0, pixels, size))
