"""Every operator as plain loop nests, for targets without kernels of their own: any LLVM target, C source, CUDA by dlight.

These kernels take the constants exactly as ``constant_arrays`` lists them (a take has its indices besides), so that a
realized module can be read back. They are correct before they are fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.primitives import CSourcePrimitives, CudaPrimitives, LlvmPrimitives, Primitives
from tvm_hquant.kernels.reference.anchor import reference_anchor
from tvm_hquant.kernels.reference.layers import reference_layer
from tvm_hquant.operators import Conv2D, Dense


@dataclass(frozen=True)
class ReferenceFamily:
    """Kernels of all operators but opaque ones.

    ``compiler`` decides how a fused multiply-add and the other primitives are spelled. Functions for CUDA have no thread
    bindings yet: ``dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())`` gives them some.
    """

    compiler: Literal["llvm", "cuda", "c"] = "llvm"

    @property
    def name(self) -> str:
        return "reference" if self.compiler == "llvm" else self.compiler

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request; None for opaque layers and combinations of storages that no precision makes."""
        if request.placement is not None or request.overwritten is not None:
            return None
        if not request.has_own_buffers and not self._reaches_buffers(request):
            return None
        primitives = _PRIMITIVES[self.compiler]
        return reference_anchor(request, primitives) or reference_layer(request, primitives)

    def _reaches_buffers(self, request: KernelRequest) -> bool:
        """Whether a kernel reads its first input where it lies in a wider buffer, and stores another tensor with its output:
        loops do, threads of a GPU have kernels of their own for most of such layers."""
        is_anchor = isinstance(request.operator, Conv2D | Dense)
        return is_anchor and not any(request.sources[1:]) and not request.shuffled and self.compiler != "cuda"


_PRIMITIVES: Mapping[str, Primitives] = {
    "llvm": LlvmPrimitives(in_blocks=True),
    "cuda": CudaPrimitives(),
    "c": CSourcePrimitives(),
}
