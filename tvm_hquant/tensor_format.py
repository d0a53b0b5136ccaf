"""How the values of one tensor are stored: float, or integer codes with a scale and a zero point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tvm_hquant.precision import Arithmetic, Precision

Storage = Literal["uint8", "uint16", "float32", "float16", "bfloat16"]
"""What kernels keep in memory. int8 codes are kept as uint8, larger by 128; bfloat16 as its uint16 bit pattern."""

STORAGE_DTYPE: dict[Storage, str] = {
    "uint8": "uint8",
    "uint16": "uint16",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "uint16",
}
"""The dtype of the TVM buffer and NumPy array that holds a storage."""


@dataclass(frozen=True)
class TensorFormat:
    """Float storage, or canonical codes: real = scale · (code − zero_point), q_min ≤ code ≤ q_max.

    ``dtype`` is uint8, int8 or uint16 for codes, else float32, float16 or bfloat16. ``scale`` is a float32 value.
    """

    dtype: Literal["uint8", "int8", "uint16", "float32", "float16", "bfloat16"]
    scale: float = 1.0
    zero_point: int = 0
    q_min: int = 0
    q_max: int = 0

    def __post_init__(self) -> None:
        if self.is_integer:
            if not self.q_min <= self.zero_point <= self.q_max:
                raise ValueError(f"zero point {self.zero_point} is outside the codes {self.q_min}…{self.q_max}")
            if not (np.isfinite(self.scale) and self.scale > 0 and float(np.float32(self.scale)) == self.scale):
                raise ValueError(f"scale {self.scale!r} is not a positive float32")

    @property
    def is_integer(self) -> bool:
        return self.dtype in ("uint8", "int8", "uint16")

    @property
    def storage(self) -> Storage:
        return "uint8" if self.dtype == "int8" else self.dtype

    @property
    def storage_offset(self) -> int:
        """What is added to a canonical code to get the stored one."""
        return 128 if self.dtype == "int8" else 0

    @property
    def storage_zero_point(self) -> int:
        return self.zero_point + self.storage_offset


FLOAT32_FORMAT = TensorFormat("float32")


def code_limits(precision: Precision) -> tuple[Literal["uint8", "int8", "uint16"], int, int]:
    """dtype, lowest and highest code of the activations of an integer precision."""
    if precision.symmetric:
        return "int8", -128, 127
    return ("uint8" if precision.activation_bits <= 8 else "uint16"), 0, 2**precision.activation_bits - 1


def float_format(precision: Precision) -> TensorFormat:
    """The format of activations of a float or weight-only precision."""
    computed = precision.computed
    if computed.arithmetic is Arithmetic.FLOAT and computed.activation_bits == 16:
        return TensorFormat("float16" if computed.name == "float16" else "bfloat16")
    return FLOAT32_FORMAT
