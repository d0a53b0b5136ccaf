"""How much a kernel has to do, for the choice of sharing it among threads (:meth:`.Processor.shares`)."""

from __future__ import annotations

from math import prod

import numpy as np

from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.kernels.processor import CACHE_LINE
from tvm_hquant.operators import Conv2D, Dense
from tvm_hquant.tensor_format import STORAGE_DTYPE

_OF_A_LINE = 32
"""Instructions in the time of a cache line from another core or a farther cache. A core that works alone takes over what others
wrote, and they what it writes: 33 ns a line between two cores of a Zen 4. Weights from the last cache take 1 ns."""


def work(request: KernelRequest, instructions: float) -> float:
    """The instructions of a kernel on vectors, and as many as the cache lines that it reads and writes take the time of."""
    return instructions + of_bytes(moved_bytes(request))


def of_bytes(moved: int) -> float:
    """The instructions in the time of so many bytes that are read or written: what a copy is."""
    return _OF_A_LINE * moved / CACHE_LINE


def moved_bytes(request: KernelRequest) -> int:
    """Bytes of activations and weights, each once."""
    shapes = [*input_shapes(request.operator), request.operator.output_shape]
    stored = [*request.inputs, request.output]
    moved = sum(prod(shape) * np.dtype(STORAGE_DTYPE[s]).itemsize for shape, s in zip(shapes, stored, strict=True))
    if isinstance(request.operator, Conv2D | Dense):
        element = {"int8": 1, "float32": 4}.get(request.weights, 2)
        moved += request.weight_points * prod(request.operator.weight_shape) * element
    return moved
