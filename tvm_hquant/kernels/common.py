"""Kernels of all operators without weights, for any processor with vectors that LLVM knows."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_hquant.kernels.elementwise import elementwise_kernel
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.movement import movement_kernel
from tvm_hquant.kernels.normalization import normalization_kernel
from tvm_hquant.kernels.pooling import pool_kernel


@dataclass(frozen=True)
class CommonFamily:
    """Add, pools, Concat, Movement, Unary, Softmax, LocalResponseNormalization and Convert.

    Attributes:
        vector_bytes: of a vector register: 64 with AVX-512, 32 with AVX2, 16 with NEON. Any LLVM target computes the same
            with any width; the wrong one is only slower.
    """

    vector_bytes: int = 32

    @property
    def name(self) -> str:
        return "common"

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request; None for convolutions, dense and opaque layers, and combinations of storages that no
        precision makes (such as a max-pool that changes its storage)."""
        lanes = self.vector_bytes // 4
        return (
            elementwise_kernel(request, lanes)
            or pool_kernel(request, self.vector_bytes)
            or movement_kernel(request, self.vector_bytes)
            or normalization_kernel(request, lanes)
        )
