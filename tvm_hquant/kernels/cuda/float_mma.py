"""16-bit float convolutions and dense layers on NVIDIA's tensor cores: ``mma.sync`` of f16 or bf16, sums in float32.

A tensor core adds several products at once, in an order and with roundings of its own. So these kernels are not bit-exact: what
they compute lies within the bound of ``numerics/tensor_cores.py`` (``docs/numerics.md``, section 9).

Source: NVIDIA, PTX ISA, "mma" (floating-point types).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm_hquant.kernels.convolution.geometry import as_conv2d
from tvm_hquant.kernels.cuda.activations import FloatPairs, as_bits
from tvm_hquant.kernels.cuda.convolution import Tile, float_kernel, served_convolution
from tvm_hquant.kernels.cuda.warp_tile import COLUMNS, ROWS, MatrixInstruction, WarpGeometry, WarpTiles
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer


def float_mma_kernel(request: KernelRequest, instructions: Mapping[str, MatrixInstruction]) -> Kernel | None:
    """The kernel for 16-bit floats; None for others, and where a group has too few channels to fill half a step."""
    operator = served_convolution(request)
    instruction = instructions.get(request.inputs[0])
    if operator is None or instruction is None or request.weights != request.inputs[0]:
        return None
    geometry = WarpGeometry(as_conv2d(operator), 1, 1, instruction.word, instruction.step)
    if geometry.group_outputs < COLUMNS or geometry.group_inputs < instruction.step // 2:
        return None

    def launch(inputs: Sequence[Buffer], arrays: Sequence[Buffer], body: Callable[[Tile], None]) -> None:
        pairs = FloatPairs(geometry.conv, as_bits(inputs[0]))
        WarpTiles(geometry, instruction, pairs, arrays[0]).launch(body)

    name = f"mma {request.inputs[0]} {geometry.rows * ROWS}x{geometry.channels}"
    return float_kernel(request, geometry, name, launch, "uint16", is_bit_exact=False)


@dataclass(frozen=True)
class FloatMmaFamily:
    """Tensor cores for 16-bit float convolutions and dense layers; other layers are left to the next family.

    Attributes:
        instructions: with the storage of what each multiplies.
    """

    name: str
    instructions: tuple[tuple[str, MatrixInstruction], ...]

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request, or None."""
        return float_mma_kernel(request, dict(self.instructions))
