"""What a kernel is asked for and what it gives: the interface that every kernel family implements.

A :class:`KernelRequest` says what to compute, without values, so that layers of one shape share one compiled kernel.
A :class:`KernelFamily` (one file per instruction set) answers with a :class:`Kernel`: a TIR function and a way to pack
the constants of a layer for it. All quantization parameters are arguments of the function, none is compiled into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from tvm_hquant.kernels.processor import Processor
from tvm_hquant.operators import Operator, Shape
from tvm_hquant.tensor_format import Storage

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Placement:
    """Where the channels of a tensor lie in the wider last axis of a buffer.

    Attributes:
        offset: of the first channel.
        channels: of the buffer.
    """

    offset: int
    channels: int


@dataclass(frozen=True)
class Interleaving:
    """Another tensor of as many channels, which a kernel stores in turns with its output: what a channel shuffle into two
    groups makes of the concatenation of both.

    Attributes:
        position: of the kernel's own channel in each pair: 0 or 1.
        source: where the channels of the other tensor lie in a wider buffer; None for one of its own.
    """

    position: int
    source: Placement | None = None


@dataclass(frozen=True)
class ProvenEnding:
    """What the constants of an integer layer prove about its end, where it has uint8 codes (:mod:`.proven_endings`).

    Attributes:
        fits_int32, fits_int16: every value lies within that type before it is clamped, and none is NaN.
        starts_at_zero: the output's stored zero point is 0.
        is_whole_range: the clamp is that of uint8: it leaves stored codes from 0 to 255.
    """

    fits_int32: bool = False
    starts_at_zero: bool = False
    is_whole_range: bool = False
    fits_int16: bool = False


@dataclass(frozen=True)
class KernelRequest:
    """What a kernel has to compute.

    Attributes:
        operator: shapes and attributes.
        inputs: storage of each activation input, in the operator's order; a fused residual comes last.
        output: storage of the output.
        weights: storage of an anchor's weights: ``int8`` codes, or the float storage of a float layer. ``""`` where there
            are none.
        weight_points: how many weight tensors are summed (multipoint); 1 for plain weights.
        saturation_free_pairs: what the weights prove: how many chained sums of two products u8·s8 surely fit int16.
            0: not even one pair. Kernels may use it to be faster, never to compute other values.
        centred_products: likewise, how many products of codes less 128 (s8·s8) surely fit int16: 2, 4 or 8.
        finite_weights: what the weights prove: none of a float layer is infinite or NaN, so products with zeros are zeros.
        ending: what the constants prove about the clamp of an integer layer, which may then be done by saturation.
        placement: where the output goes in a wider buffer that other kernels fill up, which the kernel then gets in place of
            its own output and leaves unchanged elsewhere; None for an output of its own.
        shuffled: into how many groups a channel shuffle behind a convolution cuts its output, whose channels are stored as that
            orders them: channel j of group g of n at j·n + g. 0 for the operator's order.
        overwritten: which of ``inputs`` the output is written over: a residual, or what an elementwise operator reads. The
            kernel gets one buffer for both, as its output, and reads every element before it writes it, once. None for an
            output of its own.
        sources: where the channels of each of ``inputs`` lie in a wider buffer, which the kernel then gets in place of that
            input; None for one of its own. Empty where all have buffers of their own.
        interleaved: another tensor, stored as the output is, that the kernel reads last and stores in turns with its output,
            so that it writes twice as many channels.
    """

    operator: Operator
    inputs: tuple[Storage, ...]
    output: Storage
    weights: str = ""
    weight_points: int = 1
    saturation_free_pairs: int = 0
    centred_products: int = 2
    finite_weights: bool = False
    ending: ProvenEnding = ProvenEnding()
    placement: Placement | None = None
    shuffled: int = 0
    overwritten: int | None = None
    sources: tuple[Placement | None, ...] = ()
    interleaved: Interleaving | None = None

    @property
    def output_shape(self) -> Shape:
        """Shape of the buffer that the kernel writes into."""
        shape = self.operator.output_shape
        if self.interleaved is not None:
            return (*shape[:-1], 2 * shape[-1])
        return shape if self.placement is None else (*shape[:-1], self.placement.channels)

    @property
    def output_offset(self) -> int:
        """Where the channels of the output start in the last axis of that buffer."""
        return 0 if self.placement is None else self.placement.offset

    @property
    def has_own_buffers(self) -> bool:
        """Whether every input is a buffer, and no other tensor is stored with the output."""
        return not self.sources and self.interleaved is None


@dataclass(frozen=True)
class Requantization:
    """The end of every integer epilogue: v = v > lower ? v : lower; v = v < upper ? v : upper; q = rint(v) + zero_point.

    ``lower`` and ``upper`` are float32 values less the zero point. ``zero_point`` is the stored one. With a float output
    nothing is rounded and ``zero_point`` is 0.
    """

    lower: float
    upper: float
    zero_point: int


@dataclass(frozen=True, eq=False)
class IntegerAnchorConstants:
    """Constants of an integer convolution or dense layer.

    Attributes:
        weight_codes: int8 [points, out_channels, in_channels / groups, kernel_h, kernel_w].
        input_zero_point: of the stored codes: 0…255, or 0…65535 for uint16 (high byte and low byte of it are the zero
            points of the two planes).
        multiplier: float32 [points, out_channels]. The high plane of 16-bit codes uses 256 times that.
        offset: float32 [out_channels], the bias over the output scale.
        requantization: the clamp and the output zero point.
        residual_multiplier, residual_zero_point: of a fused residual (its storage is the last of the request's inputs).
    """

    weight_codes: Array
    input_zero_point: int
    multiplier: Array
    offset: Array
    requantization: Requantization
    residual_multiplier: float = 0.0
    residual_zero_point: int = 0


@dataclass(frozen=True, eq=False)
class FloatAnchorConstants:
    """Constants of a float convolution or dense layer.

    ``weights`` is float32 or float16 [out_channels, in_channels / groups, kernel_h, kernel_w], or uint16 with the bit
    patterns of bfloat16. ``bias`` is float32 [out_channels]. ``lower`` and ``upper`` clamp the result.
    """

    weights: Array
    bias: Array
    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class IntegerElementwiseConstants:
    """Constants of an integer add, multiply or batch matmul (two inputs), average pool or requantize (one input).

    v = c = 0; for every input i: v = fma(float32(q_i − input_zero_points[i]), multipliers[i], v); then requantization.
    For an average pool ``multipliers`` holds one float32 array [output_h, output_w], applied to the sum of (q − zp).
    For the others each entry is a float32 scalar array; a multiply has one, for the product of the differences, and a batch
    matmul one, for the sum of those products.
    """

    input_zero_points: tuple[int, ...]
    multipliers: tuple[Array, ...]
    requantization: Requantization


@dataclass(frozen=True, eq=False)
class QuantizeConstants:
    """clamp(rint(x / scale), lower, upper) + zero_point, true division in float32."""

    scale: float
    requantization: Requantization


@dataclass(frozen=True, eq=False)
class DequantizeConstants:
    """float32(q − zero_point) · scale."""

    scale: float
    zero_point: int


@dataclass(frozen=True, eq=False)
class TableConstants:
    """The value for each stored uint8 code: uint8, uint16 or float32 [256]."""

    table: Array


@dataclass(frozen=True, eq=False)
class FillConstants:
    """What a movement puts into new places: a stored code, or a float."""

    fill: float


@dataclass(frozen=True, eq=False)
class FloatElementwiseConstants:
    """Constants of a float elementwise layer: ``clamp`` bounds of a float add, parameters of a unary function."""

    parameters: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class NormalizationConstants:
    """Constants of a normalization with gamma and beta: float32 [channels] both.

    ``quantization`` is what makes codes of the result, None where it is stored as floats.
    """

    gamma: Array
    beta: Array
    quantization: QuantizeConstants | None = None


@dataclass(frozen=True, eq=False)
class BiasConstants:
    """Constants of the sum of floats and a bias: float32 of the operator's bias shape.

    ``quantization`` is what makes codes of the result, None where it is stored as floats.
    """

    bias: Array
    quantization: QuantizeConstants | None = None


@dataclass(frozen=True, eq=False)
class NoConstants:
    """For kernels without any."""


LayerConstants = (
    IntegerAnchorConstants | FloatAnchorConstants | IntegerElementwiseConstants | QuantizeConstants | DequantizeConstants
    | TableConstants | FillConstants | FloatElementwiseConstants | NormalizationConstants
    | BiasConstants | NoConstants
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Kernel:
    """A TIR function for one request.

    Attributes:
        request: what it computes.
        name: family and variant for reports, such as ``avx512_vnni.conv2d[14x2]``.
        function: a TIR ``PrimFunc`` (``s_tir=True``) with the arguments (activations…, constants…, output), all buffers,
            in destination-passing style. Activation and output buffers have the shapes of the operator, but for the channels
            of wider buffers that a request names, and the dtypes ``STORAGE_DTYPE[storage]``.
        pack: gives the constant arguments as NumPy arrays of fixed shape and dtype, in the order of the arguments.
        is_bit_exact: whether it computes the contract's bits; else what it computes lies within the bound of
            ``numerics.tensor_core_limits``.
    """

    request: KernelRequest
    name: str
    function: Any
    pack: Callable[[LayerConstants], tuple[Array, ...]]
    is_bit_exact: bool = True


@dataclass(frozen=True, order=True)
class Tile:
    """What a kernel of a convolution or dense layer keeps in registers: output pixels times vectors of output channels."""

    pixels: int
    vectors: int

    def __str__(self) -> str:
        return f"{self.pixels}x{self.vectors}"


class KernelFamily(Protocol):
    """Kernels of one instruction set. Families are values: what equal ones gave for a request is not asked for again."""

    @property
    def name(self) -> str: ...

    def __hash__(self) -> int: ...

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request, or None where the family leaves it to the next one of the target's list."""


class ProcessorFamily(KernelFamily, Protocol):
    """A family whose model of tiles asks for caches and cores.

    Whatever the processor, a kernel computes the same bits.
    """

    def on(self, processor: Processor) -> KernelFamily:
        """The family with kernels for a processor."""


class TiledFamily(KernelFamily, Protocol):
    """A family whose kernels can be had with other tiles than the one that its own model picks.

    Whatever the tile, a kernel computes the same bits.
    """

    def tiles(self, request: KernelRequest) -> tuple[Tile, ...]:
        """The tiles that a kernel for this request may have, the one expected to be fastest first; none where there is no
        choice."""

    def kernel(self, request: KernelRequest, tile: Tile | None = None) -> Kernel | None:
        """The kernel with a tile, or with the first of :meth:`tiles`.

        Raises:
            KernelError: the tile is not one of :meth:`tiles`.
        """
