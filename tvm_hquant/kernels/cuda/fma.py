"""Float convolutions and dense layers for CUDA by fused multiply-adds of widened values, in the contract's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm_hquant.kernels.convolution.geometry import as_conv2d
from tvm_hquant.kernels.cuda.activations import SingleFloats
from tvm_hquant.kernels.cuda.convolution import PRIMITIVES, Tile, float_kernel, served_convolution
from tvm_hquant.kernels.cuda.thread_tile import ThreadGeometry, ThreadTiles
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import widen
from tvm_hquant.tensor_format import STORAGE_DTYPE, Storage

_FLOATS = ("float32", "float16", "bfloat16")


def fma_kernel(request: KernelRequest) -> Kernel | None:
    """The kernel for floats; None for codes."""
    operator = served_convolution(request)
    if operator is None or request.inputs[0] not in _FLOATS:
        return None
    geometry = ThreadGeometry(as_conv2d(operator), 1, 1, 1)
    weights: Storage = request.weights or "float32"  # type: ignore[assignment]

    def launch(inputs: Sequence[Buffer], arrays: Sequence[Buffer], body: Callable[[Tile], None]) -> None:
        activations = SingleFloats(geometry.conv, inputs[0], request.inputs[0])
        ThreadTiles(geometry, activations, lambda at: widen(arrays[0][at], weights), PRIMITIVES.fma).launch(body)

    name = f"fma {geometry.pixels}x{geometry.channels}"
    return float_kernel(request, geometry, name, launch, STORAGE_DTYPE[weights])


@dataclass(frozen=True)
class FmaFamily:
    """Fused multiply-adds for float convolutions and dense layers; other layers are left to the next family."""

    name: str = "cuda"

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request, or None."""
        return fma_kernel(request)
