"""What tiles of a convolution cost, by a small model of the processor that counts instructions."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from tvm_hquant.kernels.convolution.row_tiles import TileRun
from tvm_hquant.kernels.epilogues.packed_epilogue import vector_groups
from tvm_hquant.kernels.processor import CACHE_LINE
from tvm_hquant.operators import Conv2D

if TYPE_CHECKING:
    from tvm_hquant.kernels.convolution.geometry import AnchorGeometry

_SHORT_OPERAND = 0.2
"""Cost of an operand where sums are short: products do not wait for each other, and the loads run beside the additions."""
_EPILOGUE = 8
"""Instructions that finish a vector of sums."""
_PACKED_EPILOGUE = {4: 6, 2: 7, 1: 10}
"""The same where as many vectors of a pixel are packed together: fewer of them take more shuffles and stores."""
_RESIDUAL = 4
"""Instructions that add a residual of codes to a vector of sums. Floats are added as they are loaded."""
_AT_A_TIME = 3
"""Of what is not hidden behind the products of other tiles, instructions that take as long as a product."""
_BESIDE = 2
"""Instructions around a tile that run beside a product, while they run beside products at all."""
_PERMUTATION = 0.5
"""Cost of bringing the activations of several groups to the lanes of an operand."""
_FAR_WEIGHT = 0.1
"""Cost of a vector of weights that comes from behind the second-level cache for every tile or row."""
TILE = 20
"""Instructions around a tile."""
_CROWDED = 0.04
"""Of a step, what every pixel of a tile costs that shares a set with more others than three quarters of its ways."""


def of_depthwise(conv: Conv2D, lanes: int, products: int = 1) -> float:
    """Instructions of a depthwise convolution in vectors of so many channels, which take so many products of an output by a
    load and a multiply-add."""
    steps = -(-prod(conv.window.kernel) // products)
    return prod(conv.output_shape) / lanes * (2 * steps + _EPILOGUE)


@dataclass(frozen=True)
class TileCosts:
    """The costs of the tiles that a geometry may have."""

    geometry: AnchorGeometry

    def of_run(self, run: TileRun, vectors: int, kernel_rows: float | None = None) -> float:
        """Instructions of a tile of a run, with so many vectors and, instead of all, so many rows of the kernel."""
        geometry = self.geometry
        kernel_height, kernel_width = geometry.conv.window.kernel
        steps = (kernel_height if kernel_rows is None else kernel_rows) * geometry.runs * geometry.steps
        if run.columns is None:
            of_steps = steps * self.of_step(run.pixels, vectors)
        else:
            reached = (end - begin for begin, end in run.columns)
            of_steps = sum(steps / kernel_width * self.of_step(pixels, vectors) for pixels in reached if pixels)
        weights, processor = self._weight_bytes(vectors), geometry.processor
        has_more_tiles = run.pixels < geometry.conv.input_shape[0] * prod(geometry.output_size)
        if weights > processor.l1_bytes and has_more_tiles:
            of_steps = max(of_steps, processor.l2_vector_instructions * steps * vectors)
        if 2 * weights > processor.l2_bytes:
            # With all that passes meanwhile, they do not stay in the second-level cache.
            of_steps += _FAR_WEIGHT * steps * vectors
        return of_steps + self._around(run.pixels, vectors, of_steps)

    def _weight_bytes(self, vectors: int) -> int:
        """Of a tile."""
        geometry, dot = self.geometry, self.geometry.dot
        return geometry.all_steps * vectors * dot.lanes * dot.products * np.dtype(dot.weight_dtype).itemsize

    def _around(self, pixels: int, vectors: int, of_steps: float) -> float:
        """What finishes a tile and stands around it, given the time of its steps."""
        dot, has_residual = self.geometry.dot, self.geometry.conv.epilogue.has_residual
        instructions = self.of_epilogue(pixels, vectors) + TILE
        if not dot.lookahead:
            return instructions
        # Scaling sums and residuals takes the units of the products, all else has units of its own.
        if dot.accumulator_dtype != "int32":
            scalings = pixels * vectors * has_residual
        else:
            scalings = pixels * vectors * (1 + has_residual)
            instructions += _RESIDUAL * has_residual * pixels * vectors
        hidden = min(dot.lookahead, _BESIDE * of_steps)
        return scalings + max(0.0, instructions - hidden) / _AT_A_TIME

    def of_step(self, pixels: int, vectors: int) -> float:
        """Instructions of a step of a tile."""
        geometry, dot = self.geometry, self.geometry.dot
        sums = -(-pixels // dot.pixels) * vectors * dot.accumulator_registers
        if dot.short_sums(geometry.chain) is not None:
            multiplications, operand_cost = float(sums), _SHORT_OPERAND
        elif geometry.groups_steps:
            multiplications, operand_cost = float(sums), dot.operand_cost
        else:
            multiplications = max(sums, (sums + dot.latency) / 2, dot.row_vectors)
            operand_cost = dot.operand_cost
        lines = max(1, geometry.processor.l1_ways * 3 // 4)
        crowded = 1 + _CROWDED * max(0, self.pixels_of_a_set(pixels) - lines)
        permuting = _PERMUTATION * geometry.operands_of_a_pixel(vectors) if dot.groups > 1 else 0.0
        loads = (operand_cost + permuting) * pixels + dot.weight_cost * vectors
        return crowded * (multiplications + loads)

    def pixels_of_a_set(self, pixels: int) -> int:
        """How many neighbouring pixels lie in the same set of the first-level cache, at most."""
        geometry = self.geometry
        size = geometry.conv.window.strides[1] * geometry.pixel_elements
        size *= np.dtype(geometry.dot.operand_dtype).itemsize
        sets = [i * size // CACHE_LINE % geometry.processor.l1_sets for i in range(pixels)]
        return max(sets.count(number) for number in set(sets)) if size >= CACHE_LINE else 1

    def of_epilogue(self, pixels: int, vectors: int) -> int:
        """Instructions that finish a tile."""
        geometry, dot = self.geometry, self.geometry.dot
        if not geometry.packs_codes:
            return _EPILOGUE * -(-pixels // dot.pixels) * vectors * dot.accumulator_registers
        groups = vector_groups(vectors, geometry.group_outputs, dot.lanes)
        return pixels * sum(size * _PACKED_EPILOGUE[size] for _, size in groups)
