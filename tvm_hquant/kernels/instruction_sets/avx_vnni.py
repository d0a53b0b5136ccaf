"""AVX-VNNI (Alder Lake, Arrow Lake, Zen 5 and later): ``vpdpbusd`` on 256-bit vectors, for CPUs with or without AVX-512.

Everything but 8-bit codes is as on plain AVX2.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD (VEX.256). LLVM has one intrinsic for it and for
the EVEX form of AVX512-VL; which one is emitted follows from the target's features.
"""

from __future__ import annotations

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.instruction_set import Host, InstructionSet
from tvm_hquant.kernels.instruction_sets.avx512_vnni import VnniDot
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.x86.common_family import common_family

_LANES = 8
_REGISTERS = 16


def _dot(request: KernelRequest) -> DotProduct | None:
    if request.weights != "int8":
        return None
    return VnniDot(_LANES, _REGISTERS, prefetches=False, operand_cost=0.5, weight_cost=1.0, lookahead=0)


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("avx_vnni", _dot, _LANES, lambda _: "vpdpbusd", (16, 32)), common_family(_LANES)),
    frozenset({"avx2", "fma", "avx_vnni"}),
    host=Host("x86_64", "x86-64-avx-vnni", "x86-64-v3", ("+avxvnni",)),
    preference=30,
)
