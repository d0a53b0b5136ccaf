"""Plain loop nests for any LLVM target: what other kernels are compared with."""

from __future__ import annotations

from tvm_hquant.kernels.instruction_set import InstructionSet
from tvm_hquant.kernels.reference.family import ReferenceFamily

INSTRUCTION_SET = InstructionSet((ReferenceFamily(),))
"""For specs that name it."""
