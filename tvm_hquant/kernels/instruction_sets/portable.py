"""Vectors of 16 bytes and no intrinsics but fused multiply-add: what any LLVM target compiles."""

from __future__ import annotations

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.dot_product import DotProduct, FloatDot, WideningDot
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.weightless.family import CommonFamily

_LANES = 4
_REGISTERS = 16


def _dot(request: KernelRequest) -> DotProduct:
    if request.weights == "int8":
        return WideningDot(_LANES, _REGISTERS)
    return FloatDot(_LANES, _REGISTERS, request.weights)


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("portable", _dot, _LANES), CommonFamily(_LANES)),
    host=Host(None, "portable-cpu"),
    preference=10,
)
"""What is left when nothing better fits."""
