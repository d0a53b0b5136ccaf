"""What the codes of a layer's weights prove about sums in 16 bits.

``vpmaddubsw`` multiplies unsigned activation bytes by signed weight bytes and adds neighbouring products in int16, with
saturation. Where the weights prove that no sum of a chain can leave int16, a kernel may add that many such pair sums
before it widens them; the result is the same as with 32-bit sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LONGEST_CHAIN = 8
_LARGEST_ACTIVATION = 255
_INT16 = np.iinfo(np.int16)


def saturation_free_pairs(weight_codes: npt.NDArray[Any]) -> int:
    """How many chained pair sums of u8·s8 products surely fit int16, for every output channel: 0, 1, 2, 4 or 8.

    Args:
        weight_codes: int8 [points, out_channels, in_channels / groups, kernel_h, kernel_w].

    A chain of n takes, at one kernel position, products of the channels (4k, 4k + 1) or (4k + 2, 4k + 3) of n consecutive
    quads k that start at a multiple of n. Missing channels at the end count as zero weights.
    """
    points, out_channels, in_channels, height, width = weight_codes.shape
    rows = np.moveaxis(weight_codes, 2, -1).reshape(-1, in_channels).astype(np.int32)
    rows = np.pad(rows, ((0, 0), (0, -in_channels % (4 * LONGEST_CHAIN))))
    # [rows, quads, pair within the quad, member of the pair]
    quads = rows.reshape(points * out_channels * height * width, -1, 2, 2)
    highest = _LARGEST_ACTIVATION * np.maximum(quads, 0).sum(axis=3)
    lowest = _LARGEST_ACTIVATION * np.minimum(quads, 0).sum(axis=3)
    longest = 0
    for chain in (1, 2, 4, LONGEST_CHAIN):
        chained = (len(quads), -1, chain, 2)
        high, low = highest.reshape(chained).sum(axis=2), lowest.reshape(chained).sum(axis=2)
        if high.max(initial=0) > _INT16.max or low.min(initial=0) < _INT16.min:
            break
        longest = chain
    return longest
