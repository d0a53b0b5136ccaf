"""AMX (Sapphire Rapids and later): ``tdpbusd`` multiplies a tile of u8 codes by a tile of s8 weights, sums in int32.

A tile register holds 16 rows of 64 bytes. Up to 32 pixels times 32 output channels are summed in four of them, over all kernel
rows and, 64 bytes at a time, over the channels of a kernel row, which lie side by side in memory. Two tiles hold activations,
whose rows are pixels, read where they lie with the distance of pixels as the stride; two hold weights, packed four input
channels at a time. Weights are 0 where the channels of a kernel row end before a step does: what is read behind them adds
nothing.

Tiles are no values that LLVM passes around, so the loops stand in its own language. Linux wants a process to ask before it
uses tiles (``arch_prctl``, ``ARCH_REQ_XCOMP_PERM``); the kernel does, each time that it is called. ``tdpbf16ps`` is not used:
it flushes denormals and adds pairs in an order that is not the contract's.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, LDTILECFG and TDPBUSD; Linux's
``Documentation/arch/x86/xstate.rst``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.anchor_constants import integer_array_types, pack_integer
from tvm_hquant.kernels.convolution.activation_copy import ActivationCopy
from tvm_hquant.kernels.convolution.geometry import as_conv2d
from tvm_hquant.kernels.convolution.shuffled_outputs import is_order_of_constants, with_shuffled_outputs
from tvm_hquant.kernels.epilogues.epilogue import Epilogue, scale_accumulator
from tvm_hquant.kernels.instruction_set import InstructionSet
from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, imported_functions, kernel_function
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor, Work
from tvm_hquant.kernels.vector_loops import flat, load, store
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Conv2D, Dense

LANES = 16
_ROW_BYTES = 64
_TILE_ROWS = 16
_TILE_BYTES = _TILE_ROWS * _ROW_BYTES
_FEWEST_PIXELS = 4
"""With fewer pixels in a row, loading weights into tiles takes longer than dot products do."""
_EPILOGUE = 8
"""Instructions that finish a vector of sums."""
INSTRUCTIONS = "llvm.x86."
"""What LLVM's names of the instructions begin with."""
ASK_PERMISSION = (
    'call i64 asm sideeffect "syscall", "={rax},{rax},{rdi},{rsi},~{rcx},~{r11},~{memory}"(i64 158, i64 4131, i64 18)'
)
"""arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)."""


@dataclass(frozen=True)
class AmxGeometry:
    """A convolution cut into tiles; packs its constants (``anchor_constants.ChannelPacking``).

    Attributes:
        conv: the convolution; dense layers are 1×1 ones. One group, columns of the kernel side by side.
        points: weight tensors.
        planes: byte planes of the activations.
        processor: that work is cut for.
    """

    conv: Conv2D
    points: int
    planes: int
    processor: Processor = ASSUMED_PROCESSOR

    @property
    def output_size(self) -> tuple[int, int]:
        return self.conv.window.output_size(*self.conv.input_shape[1:3])

    @property
    def padded_size(self) -> tuple[int, int]:
        """Rows and columns of the activations with their padding."""
        _, height, width, _ = self.conv.input_shape
        top, left, bottom, right = self.conv.window.padding
        return height + top + bottom, width + left + right

    @property
    def run(self) -> int:
        """Bytes that a kernel row takes."""
        return self.conv.window.kernel[1] * self.conv.in_channels

    @property
    def steps(self) -> int:
        return -(-self.run // _ROW_BYTES)

    @property
    def needs_copy(self) -> bool:
        """Whether activations are copied: they are padded, in planes, or a step reads behind the last one."""
        return any(self.conv.window.padding) or self.planes > 1 or self.run % _ROW_BYTES != 0

    @property
    def plane_elements(self) -> int:
        height, width = self.padded_size
        return self.conv.input_shape[0] * height * width * self.conv.in_channels

    @cached_property
    def pixels(self) -> tuple[int, int]:
        """Tiles of activations, and the rows of each: a dot product takes a cycle a row, and weights are loaded once."""
        width = self.output_size[1]
        found = [(tiles, rows) for tiles in (1, 2) for rows in range(1, _TILE_ROWS + 1) if tiles * rows <= width]
        return min(found, key=lambda t: -(-width // (t[0] * t[1])) * (t[0] * max(t[1], 4) + 8))

    @property
    def pixels_in_all(self) -> int:
        return self.pixels[0] * self.pixels[1]

    @property
    def columns(self) -> int:
        """Tiles of weights."""
        return min(2, self.conv.out_channels // LANES)

    @property
    def block(self) -> int:
        """Output channels that are computed together."""
        return self.columns * LANES

    @property
    def blocks(self) -> int:
        """Blocks of output channels; the last one overlaps the one before it."""
        return -(-self.conv.out_channels // self.block)

    @cached_property
    def channel_rows(self) -> npt.NDArray[np.int64]:
        """Output channel of every packed channel."""
        starts = np.minimum(np.arange(self.blocks) * self.block, self.conv.out_channels - self.block)
        return (starts[:, None] + np.arange(self.block)).reshape(-1)

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., out_channels] in the order of the blocks."""
        return np.ascontiguousarray(values[..., self.channel_rows])

    @property
    def block_weights(self) -> int:
        """Bytes of the packed weights of a block."""
        return self.conv.window.kernel[0] * self.steps * self.columns * _TILE_BYTES

    @property
    def weight_elements(self) -> int:
        """Elements of the packed weights of one point."""
        return self.blocks * self.block_weights

    def pack_weights(self, weights: Array) -> Array:
        """[points, out, in, kh, kw] as point, block, kernel row, step, tile, four channels, output channel, byte; flat."""
        points, _, inputs, height, width = weights.shape
        rows = weights[:, self.channel_rows].transpose(0, 1, 3, 4, 2).reshape(points, -1, height, width * inputs)
        padded = np.pad(rows, ((0, 0), (0, 0), (0, 0), (0, self.steps * _ROW_BYTES - self.run)))
        split = padded.reshape(points, self.blocks, self.columns, LANES, height, self.steps, _TILE_ROWS, 4)
        return np.ascontiguousarray(split.transpose(0, 1, 4, 5, 2, 6, 3, 7).reshape(-1))

    @property
    def weights_stay_outside(self) -> bool:
        """Whether the loop over output channels is the outer one: weights that the second-level cache does not hold are walked
        through once."""
        return self.points * self.weight_elements > self.processor.l2_bytes

    @property
    def instructions(self) -> float:
        """Cycles of the dot products, one for a row of activations, and instructions that finish sums."""
        rows, width = self.conv.input_shape[0] * self.output_size[0], self.output_size[1]
        tiles = rows * -(-width // self.pixels_in_all) * self.blocks
        steps = self.points * self.planes * self.conv.window.kernel[0] * self.steps
        return tiles * self.pixels_in_all * self.columns * (steps + self.points * self.planes * _EPILOGUE)

    @property
    def function(self) -> str:
        """The name of the function that sums a tile, which says the shapes of the tiles."""
        return f"hquant_amx_{self.pixels[0]}x{self.pixels[1]}_{self.columns}"


def amx_kernel(request: KernelRequest, processor: Processor = ASSUMED_PROCESSOR) -> Kernel | None:
    """The kernel for codes with int8 weights; None for others, and where tiles would be mostly empty."""
    operator = request.operator
    if not isinstance(operator, (Conv2D, Dense)) or request.weights != "int8":
        return None
    if is_order_of_constants(request):
        plain = amx_kernel(replace(request, shuffled=0), processor)
        return with_shuffled_outputs(plain, request) if plain is not None else None
    conv = as_conv2d(operator)
    window = conv.window
    is_one_run = conv.groups == 1 and (window.dilation[1] == 1 or window.kernel[1] == 1) and window.dilation[0] == 1
    is_apart = request.placement is not None and len(request.inputs) > 1
    is_plain = not request.shuffled and request.overwritten is None and request.has_own_buffers
    if not is_one_run or is_apart or not is_plain or conv.out_channels < LANES:
        return None
    geometry = AmxGeometry(conv, request.weight_points, 2 if request.inputs[0] == "uint16" else 1, processor)
    if geometry.output_size[1] < _FEWEST_PIXELS or geometry.run < _ROW_BYTES // 2:
        return None
    lanes, passes = len(geometry.channel_rows), geometry.points * geometry.planes
    types = integer_array_types(
        geometry.weight_elements * geometry.points, "int8", lanes, passes, geometry.planes, "int32"
    )

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        return pack_integer(constants, geometry, 0, "int32")

    def emit(inputs: Sequence[Buffer], arrays: Sequence[Buffer], output: Buffer) -> None:
        with imported_functions(_definitions(geometry)):
            _Emitter(request, geometry, [flat(b) for b in inputs], arrays, flat(output)).emit()

    name = f"amx.conv2d[tdpbusd {geometry.pixels_in_all}x{geometry.columns}]"
    return Kernel(request, name, kernel_function(request, types, emit), pack)


@dataclass(frozen=True)
class _Emitter:
    request: KernelRequest
    geometry: AmxGeometry
    inputs: Sequence[Buffer]
    arrays: Sequence[Buffer]
    output: Buffer

    @property
    def work(self) -> Work:
        return work(self.request, self.geometry.instructions)

    def emit(self) -> None:
        geometry, conv = self.geometry, self.geometry.conv
        T.evaluate(T.call_extern("int32", "hquant_amx_permission"))
        source = self._copied() if geometry.needs_copy else self.inputs[0]
        height, width = geometry.output_size
        rows, pixels = conv.input_shape[0] * height, geometry.pixels_in_all
        tiles = -(-width // pixels)
        items = rows * tiles * geometry.blocks
        is_shared = items > 1 and geometry.processor.shares(self.work)
        with (T.parallel if is_shared else T.serial)(items) as item:
            if geometry.weights_stay_outside:
                block, place = T.bind(item // (rows * tiles)), T.bind(item % (rows * tiles))
            else:
                place, block = T.bind(item // geometry.blocks), T.bind(item % geometry.blocks)
            row = T.bind(place // tiles)
            x = T.bind(T.min(place % tiles * pixels, width - pixels))
            self._tile(source, row, x, block)

    def _copied(self) -> Buffer:
        geometry, zero_points = self.geometry, self.arrays[5]
        # A step may read a row of a tile behind the last element.
        size = geometry.planes * geometry.plane_elements + _ROW_BYTES
        copied = T.alloc_buffer((size,), "uint8")
        fills = tuple(T.Cast("uint8", zero_points[2 + plane]) for plane in range(geometry.planes))
        channels = geometry.conv.in_channels
        source, stored = self.inputs[0], self.request.inputs[0]
        ActivationCopy(geometry.conv, channels, "uint8", stored, source, copied, fills, 0, geometry.processor).emit()
        return copied

    def _tile(self, source: Buffer, row: Expression, x: Expression, block: Expression) -> None:
        """Sums of all passes, and the epilogue."""
        geometry, conv = self.geometry, self.geometry.conv
        weights, starts, multipliers, offsets, limits, zero_points = self.arrays
        height, width = geometry.output_size
        padded_height, padded_width = geometry.padded_size
        (sh, sw), channels = conv.window.strides, conv.in_channels
        image, y = row // height, row % height
        corner = T.bind(((image * padded_height + y * sh) * padded_width + x * sw) * channels)
        size = geometry.pixels_in_all * geometry.block
        sums = T.alloc_buffer((size,), "int32")
        values = T.alloc_buffer((size,), "float32")
        passes = geometry.points * geometry.planes
        first = T.bind(block * geometry.block)
        channel = T.bind(T.min(first, conv.out_channels - geometry.block))
        residual = self.inputs[1] if conv.epilogue.has_residual else None
        epilogue = Epilogue(self.request, LANES, LANES, residual, limits, zero_points, self.output)
        # In the contract's order: points ascending, within a point the low plane before the high one.
        for number in range(passes):
            point, plane = divmod(number, geometry.planes)
            activation = corner + plane * geometry.plane_elements
            weight = block * geometry.block_weights + point * geometry.weight_elements
            addresses = [
                T.address_of(buffer[at]) for buffer, at in ((sums, 0), (source, activation), (weights, weight))
            ]
            distances = [T.int64(sw * channels), T.int64(padded_width * channels)]
            counts = [T.int64(conv.window.kernel[0]), T.int64(geometry.steps)]
            T.evaluate(T.call_extern("int32", geometry.function, *addresses, *distances, *counts))
            base = number * len(geometry.channel_rows) + first
            with T.serial(geometry.pixels_in_all) as pixel:
                for vector in range(geometry.columns):
                    lane, at = vector * LANES, pixel * geometry.block + vector * LANES
                    total = load(sums, at, LANES) + load(starts, base + lane, LANES)
                    before = load(values, at, LANES) if number else load(offsets, first + lane, LANES)
                    value = scale_accumulator(total, load(multipliers, base + lane, LANES), before)
                    if number < passes - 1:
                        store(values, at, value, LANES)
                        continue
                    place = (row * width + x + pixel) * self.request.output_shape[-1] + self.request.output_offset
                    epilogue.finish(value, place + channel + lane)


def _definitions(geometry: AmxGeometry) -> str:
    """In LLVM's language: the request for permission, and the function that sums a tile.

    Tiles 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights.
    """
    (tiles, rows), columns, name, x86 = geometry.pixels, geometry.columns, geometry.function, INSTRUCTIONS
    sums = [(i, j, i * columns + j) for i in range(tiles) for j in range(columns)]

    def lines(parts: Sequence[str]) -> str:
        return "\n".join(f"  {part}" for part in parts)

    def at(result: str, pointer: str, offset: int | str) -> str:
        return f"%{result} = getelementptr i8, ptr %{pointer}, i64 {offset}"

    zero = lines([f"call void @{x86}tilezero(i8 {tile})" for _, _, tile in sums])
    loads = [at("a0", "a", 0), *([at("a1", "a", "%second")] if tiles > 1 else [])]
    loads += [f"call void @{x86}tileloadd64(i8 {4 + i}, ptr %a{i}, i64 %pixel)" for i in range(tiles)]
    for j in range(columns):
        loads += [at(f"w{j}", "w", j * _TILE_BYTES), f"call void @{x86}tileloadd64(i8 {6 + j}, ptr %w{j}, i64 64)"]
    products = [f"call void @{x86}tdpbusd(i8 {tile}, i8 {4 + i}, i8 {6 + j})" for i, j, tile in sums]
    stores = []
    for i, j, tile in sums:
        stores.append(at(f"s{tile}", "sums", 4 * LANES * (i * rows * columns + j)))
        stores.append(f"call void @{x86}tilestored64(i8 {tile}, ptr %s{tile}, i64 {_ROW_BYTES * columns})")
    return f"""
@{name}_tiles = private unnamed_addr constant [64 x i8] c"{_configuration(rows)}", align 64
declare void @{x86}ldtilecfg(ptr)
declare void @{x86}tilerelease()
declare void @{x86}tilezero(i8)
declare void @{x86}tileloadd64(i8, ptr, i64)
declare void @{x86}tilestored64(i8, ptr, i64)
declare void @{x86}tdpbusd(i8, i8, i8)
define linkonce_odr i32 @hquant_amx_permission() {{
  %refused = {ASK_PERMISSION}
  ret i32 0
}}
define linkonce_odr i32 @{name}(ptr %sums, ptr %activations, ptr %weights, i64 %pixel, i64 %row, i64 %kernel_rows, i64 %steps)
    "target-features"="+amx-tile,+amx-int8" {{
entry:
  %second = mul i64 %pixel, {rows}
  call void @{x86}ldtilecfg(ptr @{name}_tiles)
{zero}
  br label %kernel_row
kernel_row:
  %ky = phi i64 [0, %entry], [%next_ky, %next_row]
  %a_row = phi ptr [%activations, %entry], [%next_a_row, %next_row]
  %w_row = phi ptr [%weights, %entry], [%next_w, %next_row]
  br label %step
step:
  %k = phi i64 [0, %kernel_row], [%next_k, %step]
  %a = phi ptr [%a_row, %kernel_row], [%next_a, %step]
  %w = phi ptr [%w_row, %kernel_row], [%next_w, %step]
{lines(loads + products)}
  {at("next_a", "a", _ROW_BYTES)}
  {at("next_w", "w", columns * _TILE_BYTES)}
  %next_k = add i64 %k, 1
  %more_steps = icmp ult i64 %next_k, %steps
  br i1 %more_steps, label %step, label %next_row
next_row:
  {at("next_a_row", "a_row", "%row")}
  %next_ky = add i64 %ky, 1
  %more_rows = icmp ult i64 %next_ky, %kernel_rows
  br i1 %more_rows, label %kernel_row, label %end
end:
{lines(stores)}
  call void @{x86}tilerelease()
  ret i32 0
}}
"""


def _configuration(rows: int) -> str:
    """What ``ldtilecfg`` reads: palette 1; 64 bytes in the rows of all tiles; rows of sums and activations, 16 of weights."""
    table = bytearray(64)
    table[0] = 1
    table[16:32] = np.full(8, _ROW_BYTES, "<u2").tobytes()
    table[48:56] = bytes([rows] * 6 + [_TILE_ROWS] * 2)
    return "".join(f"\\{byte:02X}" for byte in table)


@dataclass(frozen=True)
class AmxFamily:
    """Tiles for integer convolutions and dense layers; other layers are left to the next family."""

    name: str = "amx"
    processor: Processor = ASSUMED_PROCESSOR

    def on(self, processor: Processor) -> AmxFamily:
        """The family with kernels for a processor."""
        return replace(self, processor=processor)

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel for a request, or None."""
        return amx_kernel(request, self.processor)


INSTRUCTION_SET = InstructionSet(
    (AmxFamily(),),
    frozenset({"avx512f", "avx512bw", "avx512vl", "amx_tile", "amx_int8"}),
    preference=60,
)
"""For specs that name it: detection leaves it out until it has run on its processor."""
