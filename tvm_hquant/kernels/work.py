"""How much a kernel has to do, for the choice of sharing it among threads (:meth:`.Processor.shares`)."""

from __future__ import annotations

from math import prod

import numpy as np

from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.kernels.processor import Work
from tvm_hquant.operators import Conv2D, Dense
from tvm_hquant.tensor_format import STORAGE_DTYPE


def work(request: KernelRequest, instructions: float) -> Work:
    """So many instructions of a kernel on vectors, and the bytes that it reads and writes."""
    return Work(instructions, moved_bytes(request))


def of_bytes(moved: int) -> Work:
    """What a copy is, that reads and writes so many bytes."""
    return Work(0, moved)


def moved_bytes(request: KernelRequest) -> int:
    """Bytes of activations and weights, each once."""
    shapes = [*input_shapes(request.operator), request.operator.output_shape]
    stored = [*request.inputs, request.output]
    moved = sum(prod(shape) * np.dtype(STORAGE_DTYPE[s]).itemsize for shape, s in zip(shapes, stored, strict=True))
    if request.interleaved is not None:
        moved += 2 * prod(shapes[-1]) * np.dtype(STORAGE_DTYPE[request.output]).itemsize
    if isinstance(request.operator, Conv2D | Dense):
        element = {"int8": 1, "float32": 4}.get(request.weights, 2)
        moved += request.weight_points * prod(request.operator.weight_shape) * element
    return moved
