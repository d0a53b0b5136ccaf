"""Widening of 16-bit floats to float32 and rounding back. bfloat16 arrays are uint16 bit patterns everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import KernelError
from tvm_hquant.fused_multiply_add import FloatArray
from tvm_hquant.tensor_format import Storage

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


def bfloat16_values(bits: npt.ArrayLike) -> FloatArray:
    """The float32 values of uint16 bit patterns of bfloat16; exact."""
    pattern = np.asarray(bits, np.uint16).astype(np.uint32, order="C")
    return np.asarray(pattern << np.uint32(16)).view(np.float32)


def widen(array: npt.NDArray[Any], storage: Storage | str) -> FloatArray:
    """float32 values of an array in float storage; exact.

    Raises:
        KernelError: the storage is not a float one.
    """
    if storage == "bfloat16":
        return bfloat16_values(array)
    if storage in ("float16", "float32"):
        return np.asarray(array, np.float32)
    raise KernelError(f"{storage!r} is not a float storage: use float32, float16 or bfloat16")


def narrow(array: FloatArray, storage: Storage | str) -> npt.NDArray[Any]:
    """A float32 array rounded once to a float storage, ties to even, overflow to infinity.

    Raises:
        KernelError: the storage is not a float one.
    """
    if storage == "bfloat16":
        return bfloat16_bits(array)
    if storage == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(array, np.float32).astype(np.float16)
    if storage == "float32":
        return np.asarray(array, np.float32)
    raise KernelError(f"{storage!r} is not a float storage: use float32, float16 or bfloat16")
