"""Kernels of operators without weights for x86: those for any processor, with its vectors of bytes."""

from __future__ import annotations

from tvm_hquant.kernels.weightless.family import CommonFamily
from tvm_hquant.kernels.x86.byte_tables import ByteTables
from tvm_hquant.kernels.x86.byte_vectors import ByteVectors

_WIDTHS = (16, 32, 64)


def common_family(lanes: int) -> CommonFamily:
    """For processors whose widest vectors have so many lanes of 32 bits."""
    widths = tuple(width for width in _WIDTHS if width <= 4 * lanes)
    return CommonFamily(lanes, ByteTables(widths), tuple(ByteVectors(width, "vpmaddwd") for width in widths))
