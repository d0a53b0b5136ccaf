"""Kernels of all operators without weights, for any processor with vectors that LLVM knows."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_hquant.kernels.elementwise import elementwise_kernel
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.movement import movement_kernel
from tvm_hquant.kernels.multiplication import multiplication_kernel
from tvm_hquant.kernels.normalization import normalization_kernel
from tvm_hquant.kernels.pooling import pool_kernel
from tvm_hquant.kernels.resizing import resize_kernel
from tvm_hquant.operators import AveragePool2D, Concat, MaxPool2D


@dataclass(frozen=True)
class CommonFamily:
    """Add, Multiply, pools, Resize2D, Concat, Movement, Unary, Softmax, LocalResponseNormalization and Convert.

    Attributes:
        lanes: float32 values in a vector register: 16 with AVX-512, 8 with AVX2, 4 with NEON. Any LLVM target computes the
            same with any power of two; the wrong one is only slower.
    """

    lanes: int = 8

    @property
    def name(self) -> str:
        return "common"

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request; None for convolutions, dense and opaque layers, and combinations of storages that no
        precision makes (such as a max-pool that changes its storage)."""
        vector_bytes = 4 * self.lanes
        if request.placement is not None and not isinstance(request.operator, MaxPool2D | AveragePool2D | Concat):
            return None
        if request.overwritten is not None:
            return elementwise_kernel(request, self.lanes)
        return (
            elementwise_kernel(request, self.lanes)
            or multiplication_kernel(request, self.lanes)
            or pool_kernel(request, vector_bytes)
            or movement_kernel(request, vector_bytes)
            or resize_kernel(request, self.lanes)
            or normalization_kernel(request, self.lanes)
        )
