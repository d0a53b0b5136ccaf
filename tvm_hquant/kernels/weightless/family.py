"""Kernels of all operators without weights, for any processor with vectors that LLVM knows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.weightless.bias_addition import bias_addition_kernel
from tvm_hquant.kernels.weightless.elementwise import elementwise_kernel
from tvm_hquant.kernels.weightless.gating import gating_kernel
from tvm_hquant.kernels.weightless.group_normalization import group_normalization_kernel
from tvm_hquant.kernels.weightless.movement import movement_kernel
from tvm_hquant.kernels.weightless.multiplication import multiplication_kernel
from tvm_hquant.kernels.weightless.normalization import normalization_kernel
from tvm_hquant.kernels.weightless.pooling import pool_kernel
from tvm_hquant.kernels.weightless.resizing import resize_kernel
from tvm_hquant.kernels.weightless.tables import TableVectors, table_kernel
from tvm_hquant.kernels.word_vectors import CodeVectors
from tvm_hquant.operators import Add, AveragePool2D, Concat, Convert, MaxPool2D, Movement, Multiply, Operator, Unary


@dataclass(frozen=True)
class CommonFamily:
    """Add, BiasAdd, Multiply, pools, Resize2D, Concat, Movement, Unary, Softmax, LocalResponseNormalization, GroupNormalization
    and Convert.

    Attributes:
        lanes: float32 values in a vector register: 16 with AVX-512, 8 with AVX2, 4 with NEON. Any LLVM target computes the
            same with any power of two; the wrong one is only slower.
        tables: vectors that are looked up in tables; None where codes are, one by one.
        codes: vectors of bytes in which maps of codes are multiplied by gates.
        processor: that work is cut for.
    """

    lanes: int = 8
    tables: TableVectors | None = None
    codes: tuple[CodeVectors, ...] = ()
    processor: Processor = ASSUMED_PROCESSOR

    def on(self, processor: Processor) -> CommonFamily:
        """The family with kernels for a processor."""
        return replace(self, processor=processor)

    @property
    def name(self) -> str:
        return "common"

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request; None for convolutions, dense and opaque layers, and combinations of storages that no
        precision makes (such as a max-pool that changes its storage)."""
        vector_bytes, processor = 4 * self.lanes, self.processor
        if request.placement is not None and not _places(request.operator):
            return None
        if request.interleaved is not None or (request.sources and not self._reads_ranges(request)):
            return None
        of_table = table_kernel(request, self.tables, processor) if self.tables is not None else None
        if request.overwritten is not None:
            return of_table or elementwise_kernel(request, self.lanes, processor)
        return (
            of_table
            or elementwise_kernel(request, self.lanes, processor)
            or gating_kernel(request, self.codes, processor)
            or bias_addition_kernel(request, self.lanes, processor)
            or multiplication_kernel(request, self.lanes, processor)
            or pool_kernel(request, vector_bytes, processor)
            or movement_kernel(request, vector_bytes, processor)
            or resize_kernel(request, self.lanes, processor)
            or normalization_kernel(request, self.lanes, processor)
            or group_normalization_kernel(request, self.lanes, processor)
        )

    def _reads_ranges(self, request: KernelRequest) -> bool:
        """Whether there are kernels that read the inputs of a request as channels of wider buffers.

        Not where these fill no vector, and not for functions that are looked up: pixel by pixel they take as long as over a
        copy, or longer.
        """
        operator = request.operator
        if isinstance(operator, Concat):
            return operator.axis == len(operator.output_shape) - 1
        is_table = isinstance(operator, Unary) and request.inputs == ("uint8",)
        is_elementwise = isinstance(operator, Add | Multiply | Unary | Convert) and not is_table
        return is_elementwise and operator.output_shape[-1] >= self.lanes


def _places(operator: Operator) -> bool:
    """Whether there are kernels that write the operator's output into a wider buffer."""
    if isinstance(operator, Movement):
        return operator.function == "depth_to_space"
    return isinstance(operator, MaxPool2D | AveragePool2D | Concat)
