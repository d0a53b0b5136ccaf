"""What an instruction set declares about itself, and where declarations are found.

Every module of the package :mod:`tvm_hquant.kernels.instruction_sets` has an ``INSTRUCTION_SET``. So may a module of
another distribution, which names it under the entry point group ``tvm_hquant.instruction_sets``. The names of instruction
sets are those of modules and entry points: listing them imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Literal

from tvm_hquant.errors import KernelError
from tvm_hquant.kernels import instruction_sets
from tvm_hquant.kernels.interface import KernelFamily

ENTRY_POINTS = "tvm_hquant.instruction_sets"
"""Entry point group in which other distributions name their instruction sets: ``name = "module"``."""


@dataclass(frozen=True)
class Host:
    """How a machine is described whose CPU has an instruction set.

    Attributes:
        architecture: as ``platform.machine`` gives it; None for any.
        spec: the shipped spec whose rates stand for a CPU whose best instruction set this is; None where the specs of
            other sets name it as well.
        mcpu: LLVM's name for the level of such a CPU; None for the oldest of its architecture.
        mattr: features beyond that level, as LLVM spells them, with a plus sign.
    """

    architecture: str | None
    spec: str | None = None
    mcpu: str | None = None
    mattr: tuple[str, ...] = ()


@dataclass(frozen=True)
class InstructionSet:
    """Kernels for one instruction set, and who can run them.

    Attributes:
        families: its kernel families, the first of which has its name; the first that has a kernel for a layer computes it.
        cpu_features: what the CPU needs, in Linux's spelling (:func:`tvm_hquant.cpu_features.normalize_feature`).
        target_kind: the kind of TVM target that its kernels are compiled for.
        first_gpu: the compute capability, times ten, from which GPUs have it.
        is_bit_exact: whether all of its kernels compute the contract's bits; else some lie within a bound of it.
        host: how to describe a machine that has it; None where it is only for specs that name it.
        preference: of the sets that a CPU has, the one with the greatest number is its best.
    """

    families: tuple[KernelFamily, ...]
    cpu_features: frozenset[str] = frozenset()
    target_kind: Literal["llvm", "cuda", "c"] = "llvm"
    first_gpu: int = 0
    is_bit_exact: bool = True
    host: Host | None = None
    preference: int = 0

    @property
    def name(self) -> str:
        """As target specs call it."""
        return self.families[0].name


def instruction_set_names() -> tuple[str, ...]:
    """Names of all instruction sets, in alphabetical order."""
    return tuple(_modules())


@cache
def load_instruction_set(name: str) -> InstructionSet:
    """The instruction set of that name.

    Raises:
        KernelError: there is none, or its module does not declare it.
    """
    if name not in _modules():
        raise KernelError(f"no instruction set is called {name!r}: use one of {', '.join(_modules())}")
    path = _modules()[name]
    try:
        declared = getattr(import_module(path), "INSTRUCTION_SET", None)
    except ImportError as error:
        raise KernelError(f"the instruction set {name} cannot be loaded from {path}: {error}") from error
    if not isinstance(declared, InstructionSet) or declared.name != name:
        raise KernelError(
            f"{path} has to declare INSTRUCTION_SET, an InstructionSet whose first family is called {name}"
        )
    return declared


@cache
def load_instruction_sets() -> tuple[InstructionSet, ...]:
    """All instruction sets, the preferred first, those of equal preference in alphabetical order.

    Raises:
        KernelError: as :func:`load_instruction_set`.
    """
    return tuple(sorted(map(load_instruction_set, _modules()), key=lambda found: -found.preference))


@cache
def _modules() -> Mapping[str, str]:
    """The module that declares each instruction set, by name."""
    package = instruction_sets.__name__
    found = {module.name: f"{package}.{module.name}" for module in iter_modules(instruction_sets.__path__)}
    for point in entry_points(group=ENTRY_POINTS):
        if found.setdefault(point.name, point.value) != point.value:
            raise KernelError(
                f"two modules declare the instruction set {point.name}: {found[point.name]} and {point.value}; "
                "rename or uninstall one"
            )
    return MappingProxyType(dict(sorted(found.items())))
