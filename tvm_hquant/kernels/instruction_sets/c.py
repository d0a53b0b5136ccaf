"""Plain loop nests as C source, for a C compiler."""

from __future__ import annotations

from tvm_hquant.kernels.instruction_set import InstructionSet
from tvm_hquant.kernels.reference.family import ReferenceFamily

INSTRUCTION_SET = InstructionSet((ReferenceFamily("c"),), target_kind="c")
"""For specs with a target of this kind."""
