"""Groups of channels put in turns, in vectors: what a channel shuffle moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, lanes_of
from tvm_hquant.kernels.processor import Processor, Work
from tvm_hquant.kernels.vector_loops import elements, fitting_lanes, load, row_loop, shape_of, store, vector_loop

MOST_GROUPS = 16
"""More are moved element by element."""
_BYTES, _NEIGHBOURS = 32, 16
"""Of a group that are moved at once, at most."""


def interleaved(parts: Sequence[Expression]) -> Expression:
    """The first lane of every part, then the second of every part, and so on."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) % 2 == 0:
        parts = [interleaved(parts[::2]), interleaved(parts[1::2])]
    count = lanes_of(parts[0])
    return T.bind(T.Shuffle(parts, [source * count + lane for lane in range(count) for source in range(len(parts))]))


def interleave_groups(
    source: Buffer, target: Buffer, groups: int, length: int, work: Work, processor: Processor
) -> None:
    """Writes the loops that copy rows of ``groups`` times ``length`` elements, flat: element i of group g to i · groups + g.

    It is shared among threads as the kernel is whose ``work`` that belongs to.
    """
    rows = elements(shape_of(source)) // (groups * length)
    size = np.dtype(str(source.dtype)).itemsize
    lanes = fitting_lanes(length, min(_BYTES // size, _NEIGHBOURS))
    with row_loop(rows, work, processor) as row:
        base = T.bind(row * (groups * length))
        with vector_loop(length, lanes) as position:
            parts = [T.bind(load(source, base + g * length + position, lanes)) for g in range(groups)]
            store(target, base + position * groups, interleaved(parts), groups * lanes)
