"""A graph of kernel calls, as far as the choice of kernels needs it: what each computes, and what it reads."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest
from tvm_hquant.kernels.registry import family_kernel

IN_PLACE = "in place"
"""What reports show as the kernel of a layer whose inputs are written where its output is."""


@dataclass(frozen=True)
class KernelCall:
    """A kernel call of a graph: the tensor that it makes, what it computes (None where TVM does), tensors that it reads."""

    tensor: Hashable
    request: KernelRequest | None
    inputs: tuple[Hashable, ...]


def kernel_of_same_family(
    families: Sequence[KernelFamily], request: KernelRequest, plain: KernelRequest
) -> Kernel | None:
    """The kernel for a request from the family that would serve ``plain``, or from one before it; None if there is none."""
    for family in families:
        kernel = family_kernel(family, request)
        if kernel is not None or family_kernel(family, plain) is not None:
            return kernel
    return None


def first_kernel(families: Sequence[KernelFamily], request: KernelRequest) -> Kernel | None:
    """The kernel of the first family that has one; None if none has."""
    return next((kernel for family in families if (kernel := family_kernel(family, request)) is not None), None)
