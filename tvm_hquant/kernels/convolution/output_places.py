"""Where a tile of a convolution stores its outputs, and where it finds what it stores with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.epilogues.epilogue import Epilogue
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import input_place, interleaved_place
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.processor import CACHE_LINE
from tvm_hquant.kernels.vector_loops import prefetch


@dataclass(frozen=True)
class OutputPlaces:
    """The places of a tile, by the number of a pixel and a channel counted within the tile.

    Attributes:
        request: of the kernel.
        pixel: the first pixel of the tile, counted over the whole map.
        channel: its first channel.
    """

    request: KernelRequest
    pixel: Expression
    channel: Expression

    def own(self, i: Expression, within: int) -> Expression:
        """Where an output is stored."""
        request, channels = self.request, self.request.output_shape[-1]
        if request.interleaved is not None:
            return (self.pixel + i) * channels + 2 * (self.channel + within)
        return (self.pixel + i) * channels + request.output_offset + self.channel + within

    def other(self, i: Expression, within: int) -> Expression:
        """Where what is stored in turns with it is read."""
        place = interleaved_place(self.request)
        return (self.pixel + i) * place.channels + (self.channel + within + place.offset)

    def residual(self, i: Expression, within: int) -> Expression | None:
        """Where a residual is read, if not where the output is stored."""
        if not reads_residual_apart(self.request):
            return None
        place = input_place(self.request, 1)
        return (self.pixel + i) * place.channels + (self.channel + within + place.offset)

    def prefetch(self, i: Expression, channels: int, epilogue: Epilogue) -> None:
        """Asks for so many channels of a pixel in all that an epilogue reads and writes."""
        request, turns, memory = self.request, epilogue.turns, epilogue.memory
        stored = channels if turns is None else 2 * channels
        residual, start = self.residual(i, 0), T.bind(self.own(i, 0))
        areas = [(buffer, start, stored, request.output_shape[-1]) for buffer in memory[residual is not None :]]
        if residual is not None:
            areas.append((memory[0], T.bind(residual), channels, input_place(request, 1).channels))
        if turns is not None:
            areas.append((turns.other, T.bind(self.other(i, 0)), channels, interleaved_place(request).channels))
        for buffer, first, length, pixel in areas:
            itemsize = np.dtype(str(buffer.dtype)).itemsize
            if isinstance(i, int) and _shares_line(i, pixel * itemsize):
                continue
            for offset in range(0, length, CACHE_LINE // itemsize):
                prefetch(buffer, first + offset)


def reads_residual_apart(request: KernelRequest) -> bool:
    """Whether a residual lies otherwise in its buffer than the output does in its own."""
    is_elsewhere = request.placement is not None or request.interleaved is not None or any(request.sources[1:])
    return len(request.inputs) > 1 and is_elsewhere


def _shares_line(pixel: int, pixel_bytes: int) -> bool:
    """Whether a pixel's channels begin in the cache line of the pixel before it, if the first one's begin a line."""
    return pixel > 0 and pixel * pixel_bytes // CACHE_LINE == (pixel - 1) * pixel_bytes // CACHE_LINE
