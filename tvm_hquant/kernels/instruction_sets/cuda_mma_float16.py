"""Tensor cores for layers from float16, from sm_75 on, half the channels at a time; within a bound, not bit-exact.

Source: NVIDIA, PTX ISA, "mma" (.f16 with m16n8k8: sm_75 and later).
"""

from __future__ import annotations

from tvm_hquant.kernels.cuda.float_mma import FloatMmaFamily
from tvm_hquant.kernels.cuda.warp_tile import MatrixInstruction
from tvm_hquant.kernels.instruction_set import InstructionSet

INSTRUCTIONS = {"float16": MatrixInstruction("m16n8k8.row.col.f32.f16.f16.f32", word=2, step=8, accumulator="float32")}
"""By the storage of what they multiply."""

INSTRUCTION_SET = InstructionSet(
    (FloatMmaFamily("cuda_mma_float16", tuple(INSTRUCTIONS.items())),),
    target_kind="cuda",
    first_gpu=75,
    is_bit_exact=False,
)
