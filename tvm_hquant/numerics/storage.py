"""Widening of 16-bit floats to float32 and rounding back. bfloat16 arrays are uint16 bit patterns everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.bfloat16 import bfloat16_bits, bfloat16_values
from tvm_hquant.errors import KernelError
from tvm_hquant.fused_multiply_add import FloatArray
from tvm_hquant.tensor_format import Storage


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
