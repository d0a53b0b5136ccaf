"""Weights in a file, in as few bits as their codes have, and the arrays that kernels read, made of them again.

A kernel reads weights in an order of its own, with zeros where its tiles are not full: integer codes, or floats that
are float32(code) · scale, rounded once more where the kernel reads 16-bit floats. What is stored is the code of every
element in this order, and a scale for each lane of each block; so an array is made again without knowing the order.

Imports nothing but NumPy: :mod:`tvm_hquant.runtime` uses it on boards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.bfloat16 import bfloat16_bits

Array = npt.NDArray[Any]

_MOST_SCALES = 1 << 16
"""Lanes of all blocks of one layer, at most."""


@dataclass(frozen=True, eq=False)
class StoredWeights:
    """Weights of one kernel as they are stored.

    Attributes:
        values: how the kernel reads them: ``int8``, ``int16``, ``float32``, ``float16`` or ``bfloat16``.
        shape: of the kernel's array.
        bits: of each code.
        lowest: the lowest code; what is stored is code − lowest.
        scales: float32 [blocks, lanes]; the array, seen as [blocks, …, lanes], is the codes times these. None for integers.
        packed: uint8, the codes one after the other, the lowest bit first.
    """

    values: str
    shape: tuple[int, ...]
    bits: int
    lowest: int
    scales: Array | None
    packed: Array

    @property
    def size(self) -> int:
        """Elements of the kernel's array."""
        return int(np.prod(self.shape))

    @property
    def data(self) -> bytes:
        """What the file holds of them: the packed codes, then the scales."""
        return self.packed.tobytes() + (b"" if self.scales is None else self.scales.tobytes())

    def array(self) -> Array:
        """What the kernel reads: a NumPy array, bfloat16 as uint16 bit patterns."""
        codes = unpack_bits(self.packed, self.bits, self.size).astype(np.int32) + np.int32(self.lowest)
        if self.scales is None:
            return codes.astype(self.values).reshape(self.shape)
        blocks, lanes = self.scales.shape
        real = codes.astype(np.float32).reshape(blocks, -1, lanes) * self.scales[:, None, :]
        stored = bfloat16_bits(real) if self.values == "bfloat16" else real.astype(self.values)
        return stored.reshape(self.shape)

    def record(self) -> dict[str, Any]:
        """All but the data, for a manifest."""
        return {
            "values": self.values,
            "shape": list(self.shape),
            "bits": self.bits,
            "lowest": self.lowest,
            "scales": None if self.scales is None else list(self.scales.shape),
            "bytes": len(self.data),
        }


def stored_integers(array: Array) -> StoredWeights:
    """Integer codes in as few bits as their range needs."""
    lowest = int(array.min(initial=0))
    bits = max(1, (int(array.max(initial=0)) - lowest).bit_length())
    packed = pack_bits((array.reshape(-1).astype(np.int32) - lowest).astype(np.uint16), bits)
    return StoredWeights(str(array.dtype), array.shape, bits, lowest, None, packed)


def stored_floats(values: str, codes: Array, scales: Array) -> StoredWeights | None:
    """Floats as codes and scales, both in the kernel's order; None where no blocks and lanes share scales.

    Args:
        values: ``float32``, ``float16`` or ``bfloat16``.
        codes: integers, of the shape of the kernel's array.
        scales: float32, of the same shape; anything where the code is 0.
    """
    shared = _shared_scales(scales.reshape(-1))
    if shared is None:
        return None
    integers = stored_integers(codes.astype(np.int16))
    return StoredWeights(values, codes.shape, integers.bits, integers.lowest, shared, integers.packed)


def _shared_scales(scales: Array) -> Array | None:
    """The smallest [blocks, lanes] such that ``scales``, seen as [blocks, …, lanes], repeats it."""
    size = len(scales)
    limit = min(size // 2, _MOST_SCALES)
    divisors = [d for d in range(1, limit + 1) if size % d == 0]
    shapes = sorted((b * n, b, n) for b in divisors for n in divisors if b * n <= limit and size % (b * n) == 0)
    for _, blocks, lanes in shapes:
        view = scales.reshape(blocks, -1, lanes)
        # Looking at the last repetition first rules nearly all shapes out.
        if np.array_equal(view[:, -1], view[:, 0]) and (view == view[:, :1]).all():
            return np.ascontiguousarray(view[:, 0])
    return None


def restored(record: Mapping[str, Any], data: bytes) -> StoredWeights:
    """What :meth:`StoredWeights.record` and ``data`` describe.

    Raises:
        KeyError, ValueError, TypeError: they do not fit each other.
    """
    shape, bits = tuple(int(d) for d in record["shape"]), int(record["bits"])
    length = (int(np.prod(shape)) * bits + 7) // 8
    scales = None
    if record["scales"] is not None:
        scales = np.frombuffer(data, np.float32, offset=length).reshape(record["scales"])
    packed = np.frombuffer(data, np.uint8, length)
    return StoredWeights(str(record["values"]), shape, bits, int(record["lowest"]), scales, packed)


def pack_bits(codes: Array, bits: int) -> Array:
    """Codes 0…2^bits − 1 (uint16, one axis) as uint8, one after the other, the lowest bit first; 1 to 16 bits."""
    each = np.unpackbits(codes.astype("<u2").view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")[:, :bits]
    return np.packbits(each, bitorder="little")


def unpack_bits(packed: Array, bits: int, count: int) -> Array:
    """The inverse of :func:`pack_bits`: uint16 [count]."""
    each = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    full = np.zeros((count, 16), np.uint8)
    full[:, :bits] = each
    return np.packbits(full, axis=1, bitorder="little").view("<u2").reshape(-1)
