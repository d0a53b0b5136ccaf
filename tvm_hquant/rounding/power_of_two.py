"""Weight codes whose steps are powers of two, from the range of each output channel.

Source: Tsuji et al., "Greedy Search Algorithm for Mixed Precision in Post-Training Quantization …", ACML 2021, equations 4, 5
and 7: with b bits the step is 2^e, e = ⌈log₂((max − min) / (2^b − 1))⌉; weights are clamped to [min, min + 2^e·(2^b − 1)]
and rounded to the nearest multiple of the step, ties to even.

The zero point is 0, so codes are not centred, and where they would leave −127 … 127, as those of 8 bits in a channel whose
weights all have one sign, the step is doubled until they do not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tvm_hquant.numerics import weight_code_limit

Doubles = npt.NDArray[np.float64]


def power_of_two_codes(weights: npt.ArrayLike, bits: int, tied: bool = False) -> tuple[Doubles, Doubles]:
    """Codes and steps.

    Args:
        weights: [out, columns].
        bits: 2 to 8.
        tied: all output channels have the same step, from the range of all.

    Returns:
        Integers [out, columns], at most 2^bits consecutive ones in each channel, and powers of two [out], both as float64.
    """
    rows = np.asarray(weights, np.float64)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    if tied:
        low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
    levels = 2**bits - 1
    largest_code = max(127, weight_code_limit(bits))
    spread = np.where(high > low, high - low, 1.0)
    step = 2.0 ** np.ceil(np.log2(spread / levels))
    largest = np.maximum(np.abs(low), np.abs(high))
    while (too_small := np.rint(largest / step) > largest_code).any():
        step = np.where(too_small, 2 * step, step)
    # A channel of one value has no range; its step is that of its size.
    of_size = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest / largest_code, 1.0)))
    step = np.where(high > low, step, of_size)
    lowest = np.rint(low / step)
    # Where both ends are rounded away from the middle, one code more than there are would be needed.
    codes = np.minimum(np.rint(np.clip(rows, low, low + step * levels) / step), lowest + levels)
    return codes, step[:, 0]
