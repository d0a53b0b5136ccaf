"""What the constants of an integer layer prove about the values that it rounds and clamps to codes.

The contract clamps before it converts to an integer, since conversions of what lies out of range differ between processors.
Both limits are integers, so where every value surely fits int32, it may be rounded and converted first: the codes are the
same, and the instructions that pack integers into bytes clamp by saturation.
"""

from __future__ import annotations

import numpy as np

from tvm_hquant.kernels.interface import IntegerAnchorConstants, ProvenEnding

_LARGEST_VALUE = 2.0**30
"""Half of int32, which leaves more room than the float32 roundings of a few multiply-adds take."""
_LARGEST_SHORT_VALUE = 2.0**14
"""Half of int16, which leaves room for a zero point, too."""
_LARGEST_CODE = 255


def proven_ending(constants: IntegerAnchorConstants) -> ProvenEnding:
    """What is known of the end of a layer of uint8 codes whose output is uint8, too."""
    end = constants.requantization
    largest = _largest_value(constants)
    return ProvenEnding(
        fits_int32=largest < _LARGEST_VALUE,
        fits_int16=largest < _LARGEST_SHORT_VALUE,
        starts_at_zero=end.zero_point == 0,
        is_whole_range=(end.lower, end.upper) == (-end.zero_point, _LARGEST_CODE - end.zero_point),
    )


def _largest_value(constants: IntegerAnchorConstants) -> float:
    """A bound of the magnitude of all values before the clamp, over any part of the window; NaN or infinity if there is none.

    |c| + Σ over points |m| · Σ|w| · max|q − zp|, and the residual's part.
    """
    sums = np.abs(constants.weight_codes.astype(np.float64)).sum(axis=(2, 3, 4))
    of_sums = (
        np.abs(np.asarray(constants.multiplier, np.float64)) * sums * _largest_distance(constants.input_zero_point)
    )
    values = of_sums.sum(axis=0) + np.abs(np.asarray(constants.offset, np.float64))
    of_residual = abs(constants.residual_multiplier) * _largest_distance(constants.residual_zero_point)
    return float(values.max(initial=0.0) + of_residual)


def _largest_distance(zero_point: int) -> int:
    """Of any stored code from the zero point."""
    return max(zero_point, _LARGEST_CODE - zero_point)
