"""Plain AArch64 NEON (Cortex-A53, A72): ``smlal`` adds products of int16 values to int32 sums."""

from __future__ import annotations

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.dot_product import DotProduct, FloatDot, WideDot, WideningDot
from tvm_hquant.kernels.interface import KernelRequest

_LANES = 4
_REGISTERS = 32


def _dot(request: KernelRequest) -> DotProduct:
    if request.weights == "int8":
        return WideningDot(_LANES, _REGISTERS, name="smlal")
    if request.weights == "int16":
        return WideDot(2, _REGISTERS)
    return FloatDot(_LANES, _REGISTERS, request.weights)


FAMILY = AnchorFamily("arm_neon", _dot, _LANES)
"""The kernel family of this instruction set."""
