"""Kernel families by the names that target specs use, and the choice of a kernel for a request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tvm_hquant.cpu_features import cpu_features
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels import (
    arm_bf16,
    arm_dotprod,
    arm_fp16fml,
    arm_i8mm,
    arm_neon,
    portable,
    x86_avx2,
    x86_avx512_bf16,
    x86_avx512_vnni,
    x86_avx_vnni,
)
from tvm_hquant.kernels.common import CommonFamily
from tvm_hquant.kernels.cuda_dp4a import Dp4aFamily
from tvm_hquant.kernels.cuda_mma import MmaFamily
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest
from tvm_hquant.kernels.reference import ReferenceFamily
from tvm_hquant.kernels.x86_amx import AmxFamily
from tvm_hquant.target_spec.vocabulary import INSTRUCTION_SETS

ANCHOR_FAMILIES = {
    module.FAMILY.name: module.FAMILY
    for module in (
        *(x86_avx512_bf16, x86_avx512_vnni, x86_avx_vnni, x86_avx2),
        *(arm_bf16, arm_fp16fml, arm_i8mm, arm_dotprod, arm_neon),
        portable,
    )
}
"""Families of convolutions and dense layers by name, the best of an architecture first."""


@cache
def families_for_target(instruction_sets: tuple[str, ...]) -> tuple[KernelFamily, ...]:
    """Kernel families of a target, the best first.

    Raises:
        KernelError: a name is unknown.
    """
    families: list[KernelFamily] = []
    for name in instruction_sets:
        if name in ANCHOR_FAMILIES:
            family = ANCHOR_FAMILIES[name]
            families += [family, CommonFamily(family.lanes)]
        elif name == "reference":
            families.append(ReferenceFamily())
        elif name == "amx":
            families.append(AmxFamily())
        elif name == "cuda_mma":
            families.append(MmaFamily())
        elif name == "cuda":
            families += [Dp4aFamily(), ReferenceFamily("cuda")]
        elif name == "c":
            families.append(ReferenceFamily("c"))
        else:
            known = ", ".join([*ANCHOR_FAMILIES, "amx", "reference", "cuda_mma", "cuda", "c"])
            raise KernelError(f"unknown kernel family {name!r}: use one of {known}")
    return tuple(families)


def select_kernel(families: Sequence[KernelFamily], request: KernelRequest) -> Kernel:
    """The kernel of the first family that has one.

    Raises:
        KernelError: none has.
    """
    for family in families:
        kernel = family.kernel(request)
        if kernel is not None:
            return kernel
    raise KernelError(
        f"no kernel family of {', '.join(f.name for f in families)} computes {type(request.operator).__name__} from "
        f"{', '.join(request.inputs)} to {request.output}"
    )


def host_instruction_sets() -> tuple[str, ...]:
    """Names of the kernel families that this machine's CPU can run, the best first; read from its flags."""
    features = cpu_features()
    return tuple(name for name in ANCHOR_FAMILIES if INSTRUCTION_SETS[name] <= features)
