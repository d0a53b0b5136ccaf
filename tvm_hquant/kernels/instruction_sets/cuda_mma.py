"""Integer convolutions and dense layers on NVIDIA's tensor cores: ``mma.sync`` of u8 and s8 codes, sums in int32.

Sums of integers have one value in any order, so the order in which the tensor core adds is of no account.

Source: NVIDIA, PTX ISA, "mma" (integer types; sm_80 and later).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm_hquant.kernels.convolution.geometry import as_conv2d
from tvm_hquant.kernels.cuda.activations import WORD, CodeWords
from tvm_hquant.kernels.cuda.convolution import Tile, integer_kernel, served_convolution
from tvm_hquant.kernels.cuda.warp_tile import COLUMNS, ROWS, MatrixInstruction, WarpGeometry, WarpTiles
from tvm_hquant.kernels.instruction_set import InstructionSet
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer

_INSTRUCTION = MatrixInstruction("m16n8k32.row.col.s32.u8.s8.s32", WORD, 32, "int32")
_FEWEST_INPUTS = 16
"""With fewer input channels in a group most of a step would be multiplied by zero: ``dp4a`` takes four at a time."""


def mma_kernel(request: KernelRequest) -> Kernel | None:
    """The kernel for codes with int8 weights; None for others, and where a group has too few channels to fill a tile."""
    operator = served_convolution(request)
    if operator is None or request.weights != "int8":
        return None
    planes = 2 if request.inputs[0] == "uint16" else 1
    geometry = WarpGeometry(as_conv2d(operator), request.weight_points, planes, WORD, _INSTRUCTION.step)
    if geometry.group_outputs < COLUMNS or geometry.group_inputs < _FEWEST_INPUTS:
        return None

    def launch(inputs: Sequence[Buffer], arrays: Sequence[Buffer], body: Callable[[Tile], None]) -> None:
        words = CodeWords(geometry.conv, inputs[0], planes, arrays[5])
        WarpTiles(geometry, _INSTRUCTION, words, arrays[0]).launch(body)

    return integer_kernel(request, geometry, 0, f"mma {geometry.rows * ROWS}x{geometry.channels}", launch)


@dataclass(frozen=True)
class MmaFamily:
    """Tensor cores for integer convolutions and dense layers; other layers are left to the next family."""

    name: str = "cuda_mma"

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request, or None."""
        return mma_kernel(request)


INSTRUCTION_SET = InstructionSet((MmaFamily(),), target_kind="cuda", first_gpu=80)
