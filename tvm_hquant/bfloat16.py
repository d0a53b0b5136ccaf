"""bfloat16 as bit patterns in uint16, which NumPy does not have. Imports nothing but NumPy: boards use it too."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_QUIET_NAN = np.uint32(0x40)


def bfloat16_bits(x: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """float32 ``x`` rounded to bfloat16, ties to even, as bit patterns: (b + 0x7FFF + ((b >> 16) & 1)) >> 16.

    Overflow gives infinity. A NaN keeps its sign and upper bits, and becomes quiet: (b >> 16) | 0x40.
    """
    value = np.asarray(x, np.float32, order="C")
    bits = value.view(np.uint32)
    high = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), high | _QUIET_NAN, rounded).astype(np.uint16)


def bfloat16_values(bits: npt.ArrayLike) -> npt.NDArray[Any]:
    """The float32 values of uint16 bit patterns of bfloat16; exact."""
    pattern = np.asarray(bits, np.uint16).astype(np.uint32, order="C")
    return np.asarray(pattern << np.uint32(16)).view(np.float32)
