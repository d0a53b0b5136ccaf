"""What every GPU computes for CUDA: ``__dp4a``, fused multiply-adds of floats, and plain loops for all other layers.

``__dp4a`` adds four products of signed bytes to an int32. In depthwise layers, where neighbouring channels belong to different
sums, codes are multiplied one by one.

Source: NVIDIA, CUDA Math API, ``__dp4a`` (compute capability 6.1 and later). Activations are stored as uint8: flipping the top
bit makes them signed, smaller by 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.geometry import as_conv2d
from tvm_hquant.kernels.cuda.activations import WORD, CodeWords, SingleCodes, load_word
from tvm_hquant.kernels.cuda.convolution import Tile, integer_kernel, served_convolution
from tvm_hquant.kernels.cuda.fma import FmaFamily
from tvm_hquant.kernels.cuda.thread_tile import ThreadGeometry, ThreadTiles
from tvm_hquant.kernels.instruction_set import InstructionSet
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.reference.family import ReferenceFamily
from tvm_hquant.operators import Conv2D, Dense

_OFFSET = -128
_TOP_BITS = 0x80808080 - 2**32


def dp4a_kernel(request: KernelRequest) -> Kernel | None:
    """The kernel for codes with int8 weights; None for others, and for depthwise layers."""
    operator = served_convolution(request)
    if operator is None or request.weights != "int8" or _is_depthwise(operator):
        return None
    planes = 2 if request.inputs[0] == "uint16" else 1
    geometry = ThreadGeometry(as_conv2d(operator), request.weight_points, planes, WORD)

    def launch(inputs: Sequence[Buffer], arrays: Sequence[Buffer], body: Callable[[Tile], None]) -> None:
        words = CodeWords(geometry.conv, inputs[0], planes, arrays[5], _TOP_BITS)
        ThreadTiles(geometry, words, lambda at: load_word(arrays[0], at, WORD), _dp4a).launch(body)

    return integer_kernel(request, geometry, _OFFSET, f"dp4a {geometry.pixels}x{geometry.channels}", launch)


def depthwise_kernel(request: KernelRequest) -> Kernel | None:
    """The kernel for depthwise layers of codes with int8 weights; None for others."""
    operator = served_convolution(request)
    if operator is None or request.weights != "int8" or not _is_depthwise(operator):
        return None
    planes = 2 if request.inputs[0] == "uint16" else 1
    geometry = ThreadGeometry(as_conv2d(operator), request.weight_points, planes, 1)

    def launch(inputs: Sequence[Buffer], arrays: Sequence[Buffer], body: Callable[[Tile], None]) -> None:
        codes = SingleCodes(geometry.conv, inputs[0], planes, arrays[5])
        ThreadTiles(geometry, codes, lambda at: T.Cast("int32", arrays[0][at]), _multiply_add).launch(body)

    return integer_kernel(request, geometry, 0, f"depthwise {geometry.pixels}x{geometry.channels}", launch)


def _is_depthwise(operator: Conv2D | Dense) -> bool:
    return isinstance(operator, Conv2D) and operator.is_depthwise


def _multiply_add(activation: Expression, weight: Expression, total: Expression) -> Expression:
    return total + activation * weight


def _dp4a(activations: Expression, weights: Expression, total: Expression) -> Expression:
    return T.call_pure_extern("int32", "__dp4a", activations, weights, total)


@dataclass(frozen=True)
class CodeFamily:
    """``__dp4a`` for integer convolutions and dense layers, multiply-adds for depthwise ones; others are the next family's."""

    name: str = "cuda"

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request, or None."""
        return dp4a_kernel(request) or depthwise_kernel(request)


INSTRUCTION_SET = InstructionSet((CodeFamily(), FmaFamily(), ReferenceFamily("cuda")), target_kind="cuda", first_gpu=61)
