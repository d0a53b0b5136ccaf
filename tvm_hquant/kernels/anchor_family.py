"""A kernel family for convolutions, dense layers and products of activations: dot products in the shared templates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.convolution.group_interleaving import MOST_GROUPS
from tvm_hquant.kernels.convolution.interleaved_groups import can_interleave_groups, saves_time
from tvm_hquant.kernels.convolution.output_places import reads_residual_apart
from tvm_hquant.kernels.convolution.shuffled_outputs import is_order_of_constants, with_shuffled_outputs
from tvm_hquant.kernels.convolution.template import conv2d_geometry, conv2d_kernel
from tvm_hquant.kernels.convolution.winograd import winograd_kernel
from tvm_hquant.kernels.depthwise.floats import float_depthwise_kernel
from tvm_hquant.kernels.depthwise.interleaved import interleaved_depthwise_kernel
from tvm_hquant.kernels.depthwise.scaling import scaling_kernel
from tvm_hquant.kernels.depthwise.template import depthwise_kernel
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.interface import Kernel, KernelRequest, Tile
from tvm_hquant.kernels.matmul.batch_matmul import as_dense_request, batch_matmul_kernel
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.word_vectors import CodeVectors
from tvm_hquant.kernels.x86.byte_vectors import ByteVectors, WordProduct
from tvm_hquant.operators import BatchMatmul, Conv2D, Dense
from tvm_hquant.tensor_format import STORAGE_DTYPE


@dataclass(frozen=True)
class AnchorFamily:
    """Kernels of one instruction set.

    Attributes:
        name: as target specs call it.
        dot: the dot product for a request; None where the family leaves it to the next one.
        lanes: 32-bit lanes of a vector.
        word_product: how four products of codes are added in byte vectors of x86, for depthwise layers.
        byte_widths: bytes of the vectors that it works on.
        depthwise: the kernel for a depthwise layer of codes, given the family's name and the processor; None where the general
            one serves.
        winograd: which requests are computed by :mod:`tvm_hquant.kernels.convolution.winograd`, on a processor.
        codes: the vectors that sums are packed into where an output has codes, if ``word_product`` names none.
        processor: that tiles are for.
    """

    name: str
    dot: Callable[[KernelRequest], DotProduct | None]
    lanes: int
    word_product: Callable[[KernelRequest], WordProduct] | None = None
    byte_widths: tuple[int, ...] = ()
    depthwise: Callable[[KernelRequest, str, Processor], Kernel | None] | None = None
    winograd: Callable[[KernelRequest, Processor], bool] = lambda *_: False
    codes: CodeVectors | None = None
    processor: Processor = ASSUMED_PROCESSOR

    def on(self, processor: Processor) -> AnchorFamily:
        """The family with kernels for a processor."""
        return replace(self, processor=processor)

    def tiles(self, request: KernelRequest) -> tuple[Tile, ...]:
        """The tiles that a kernel for this request may have, the best first; none where there is no choice of them."""
        if is_order_of_constants(request):
            return self.tiles(replace(request, shuffled=0))
        dot = self._dot(request)
        if dot is None or _is_depthwise(request) or self.winograd(request, self.processor):
            return ()
        return conv2d_geometry(request, dot, None, self._code_vectors(request, dot), self.processor).candidates

    def kernel(self, request: KernelRequest, tile: Tile | None = None) -> Kernel | None:
        """The kernel for a convolution, dense layer or batch matmul; None for others, and where there is no dot product.

        None also for a layer that is to be written over its residual, if tiles overlap: some would read what was written.

        Raises:
            KernelError: ``tile`` is not one of :meth:`tiles`.
        """
        if isinstance(request.operator, BatchMatmul):
            if request.overwritten is not None or not request.has_own_buffers:
                return None
            dense = as_dense_request(request)
            dot = self.dot(dense) if dense is not None else None
            if dot is None:
                return None
            # The second matrix is packed when it is there, in the type in which it is multiplied.
            return batch_matmul_kernel(request, dot.with_wide_weights or dot, self.name, self.processor)
        if is_order_of_constants(request):
            plain = self.kernel(replace(request, shuffled=0), tile)
            return with_shuffled_outputs(plain, request) if plain is not None else None
        dot = self._dot(request)
        if dot is None:
            return None
        if request.overwritten is not None and not self._writes_over_residual(request, dot, tile):
            return None
        if not (request.has_own_buffers and request.placement is None) and not self._reaches_buffers(request, dot):
            return None
        if tile is not None and not self.tiles(request):
            raise KernelError(f"{request.operator} has no choice of tiles: leave {tile} out")
        if self.winograd(request, self.processor):
            return winograd_kernel(request, ByteVectors(4 * self.lanes, "vpmaddwd"), self.name, self.processor)
        if _is_depthwise(request):
            if request.weights != "int8":
                return float_depthwise_kernel(request, dot, self.name, self.processor)
            kernel = self._scaling(request) or self._interleaved(request)
            return kernel or depthwise_kernel(request, dot, self.name, self.processor)
        return conv2d_kernel(request, dot, self.name, tile, self._code_vectors(request, dot), self.processor)

    def _writes_over_residual(self, request: KernelRequest, dot: DotProduct, tile: Tile | None) -> bool:
        """Whether a kernel reads the residual at exactly the places that it writes, each once."""
        tiles_may_overlap = _is_depthwise(request) or self.winograd(request, self.processor)
        if request.overwritten != 1 or reads_residual_apart(request) or tiles_may_overlap:
            return False
        return not conv2d_geometry(request, dot, tile, self._code_vectors(request, dot), self.processor).overlaps

    def _reaches_buffers(self, request: KernelRequest, dot: DotProduct) -> bool:
        """Whether a kernel reads channels where they lie in wider buffers, a residual elsewhere than it writes, and stores its
        output in turns with another tensor, as the request asks."""
        is_in_turns = request.interleaved is not None
        if is_in_turns and (request.placement is not None or request.shuffled):
            return False
        stores_plainly = not (is_in_turns or reads_residual_apart(request))
        if _is_depthwise(request) or self.winograd(request, self.processor):
            return stores_plainly
        geometry = conv2d_geometry(request, dot, None, self._code_vectors(request, dot), self.processor)
        if geometry.patches is not None and any(request.sources[:1]):
            return False
        return stores_plainly or geometry.sweeps is None

    def _dot(self, request: KernelRequest) -> DotProduct | None:
        operator = request.operator
        dot = self.dot(request) if isinstance(operator, (Conv2D, Dense)) else None
        if dot is None or not request.shuffled:
            return dot
        assert isinstance(operator, Conv2D)
        is_plain = len(request.inputs) == 1 and request.placement is None and request.overwritten is None
        if not (is_plain and request.has_own_buffers) or operator.is_depthwise or request.shuffled > MOST_GROUPS:
            return None
        if request.shuffled != operator.groups or not can_interleave_groups(request, dot):
            return dot
        in_turns, vectors, stored = dot.for_groups(operator.groups), self._code_vectors(request, dot), request.inputs[0]
        if in_turns is None:
            return dot
        of_turns, apart = (conv2d_geometry(request, each, None, vectors, self.processor) for each in (in_turns, dot))
        # Activations are put side by side without padding around them.
        is_possible = of_turns.skips_padding or not any(operator.window.padding)
        saves = is_possible and saves_time(of_turns, apart, STORAGE_DTYPE[stored])
        return in_turns if saves else dot

    def _code_vectors(self, request: KernelRequest, dot: DotProduct) -> CodeVectors | None:
        return ByteVectors(4 * dot.lanes, self.word_product(request)) if self.word_product is not None else self.codes

    def _interleaved(self, request: KernelRequest) -> Kernel | None:
        if self.depthwise is not None:
            return self.depthwise(request, self.name, self.processor)
        if self.word_product is None:
            return None
        return interleaved_depthwise_kernel(request, self._byte_vectors(request), self.name, self.processor)

    def _scaling(self, request: KernelRequest) -> Kernel | None:
        candidates: list[CodeVectors] = [*self._byte_vectors(request)]
        if self.codes is not None:
            candidates.append(self.codes)
        return scaling_kernel(request, candidates, self.name, self.processor)

    def _byte_vectors(self, request: KernelRequest) -> list[ByteVectors]:
        if self.word_product is None:
            return []
        product = self.word_product(request)
        return [ByteVectors(width, product) for width in self.byte_widths]


def _is_depthwise(request: KernelRequest) -> bool:
    operator = request.operator
    return isinstance(operator, Conv2D) and operator.is_depthwise
