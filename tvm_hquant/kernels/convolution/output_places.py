"""Where a tile of a convolution stores its outputs, and where it finds what it stores with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.epilogues.turns import Turns
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer, interleaved_place
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
        """Where an output is stored, and a residual read."""
        request, channels = self.request, self.request.output_shape[-1]
        if request.interleaved is not None:
            return (self.pixel + i) * channels + 2 * (self.channel + within)
        return (self.pixel + i) * channels + request.output_offset + self.channel + within

    def other(self, i: Expression, within: int) -> Expression:
        """Where what is stored in turns with it is read."""
        place = interleaved_place(self.request)
        return (self.pixel + i) * place.channels + (self.channel + within + place.offset)

    def prefetch(self, i: Expression, channels: int, memory: Sequence[Buffer], turns: Turns | None) -> None:
        """Asks for so many channels of a pixel in ``memory`` at the places of outputs, and for what these take turns with."""
        stored = channels if turns is None else 2 * channels
        start = T.bind(self.own(i, 0))
        areas = [(buffer, start, stored, self.request.output_shape[-1]) for buffer in memory]
        if turns is not None:
            pixel = interleaved_place(self.request).channels
            areas.append((turns.other, T.bind(self.other(i, 0)), channels, pixel))
        for buffer, first, length, pixel in areas:
            itemsize = np.dtype(str(buffer.dtype)).itemsize
            if isinstance(i, int) and _shares_line(i, pixel * itemsize):
                continue
            for offset in range(0, length, CACHE_LINE // itemsize):
                prefetch(buffer, first + offset)


def _shares_line(pixel: int, pixel_bytes: int) -> bool:
    """Whether a pixel's channels begin in the cache line of the pixel before it, if the first one's begin a line."""
    return pixel > 0 and pixel * pixel_bytes // CACHE_LINE == (pixel - 1) * pixel_bytes // CACHE_LINE
