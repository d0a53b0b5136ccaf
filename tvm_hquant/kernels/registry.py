"""Kernel families by the names that target specs use, and the choice of a kernel for a request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TypeGuard

from tvm_hquant.cpu_features import cpu_features
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.instruction_set import load_instruction_set, load_instruction_sets
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest, ProcessorFamily
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor

ANCHOR_FAMILIES = {
    family.name: family
    for instruction_set in load_instruction_sets()
    for family in instruction_set.families
    if isinstance(family, AnchorFamily)
}
"""Families that compute convolutions and dense layers from the shared templates by name, the best of an architecture first."""


@cache
def families_for_target(
    instruction_sets: tuple[str, ...], processor: Processor = ASSUMED_PROCESSOR
) -> tuple[KernelFamily, ...]:
    """Kernel families of a target, the best first, with tiles for its processor (``TargetSpec.processor``).

    Raises:
        KernelError: a name is unknown.
    """
    families = (family for name in instruction_sets for family in load_instruction_set(name).families)
    return tuple(family.on(processor) if _asks_for_processor(family) else family for family in families)


def _asks_for_processor(family: KernelFamily | ProcessorFamily) -> TypeGuard[ProcessorFamily]:
    return hasattr(family, "on")


@lru_cache(maxsize=4096)
def family_kernel(family: KernelFamily, request: KernelRequest) -> Kernel | None:
    """What a family has for a request.

    Passes, the simulator and the check of artifacts ask for the same kernels again, one after the other: each is made once,
    where all of a network fit. A layer of DenseNet-121 asks three families on average, for float32 and for codes.
    """
    return family.kernel(request)


def select_kernel(families: Sequence[KernelFamily], request: KernelRequest) -> Kernel:
    """The kernel of the first family that has one.

    Raises:
        KernelError: none has.
    """
    for family in families:
        kernel = family_kernel(family, request)
        if kernel is not None:
            return kernel
    raise KernelError(
        f"no kernel family of {', '.join(f.name for f in families)} computes {type(request.operator).__name__} from "
        f"{', '.join(request.inputs)} to {request.output}"
    )


def host_instruction_sets() -> tuple[str, ...]:
    """Names of the instruction sets whose kernels this machine can run, the best first; read from its CPU's flags.

    Raises:
        TargetSpecError: the CPU's features cannot be read (not Linux).
    """
    features = cpu_features()
    return tuple(found.name for found in load_instruction_sets() if found.host and found.cpu_features <= features)
