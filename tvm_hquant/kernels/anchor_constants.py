"""Packs the constants of convolutions and dense layers for the order in which a template's tiles read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.epilogues.epilogue import LIMIT_COUNT, limits_of
from tvm_hquant.kernels.interface import FloatAnchorConstants, IntegerAnchorConstants, LayerConstants
from tvm_hquant.kernels.kernel_function import ArrayType

Array = npt.NDArray[Any]


WindowPart = tuple[slice, slice]
"""Rows and columns of a window."""
WHOLE_WINDOW: WindowPart = (slice(None), slice(None))


class ChannelPacking(Protocol):
    """How a template orders weights and values per output channel."""

    @property
    def planes(self) -> int: ...
    @property
    def points(self) -> int: ...

    def pack_channels(self, values: Array, fill: float = 0) -> Array:
        """[..., out_channels] to [..., lanes]."""

    def pack_weights(self, weights: Array) -> Array:
        """[points, out, in / groups, kh, kw] to a flat array."""


STARTS, OFFSETS = 1, 3
"""Places of two of the arrays of :func:`integer_array_types`."""


def integer_array_types(
    weight_count: int, weight_dtype: str, lanes: int, passes: int, planes: int, accumulator: str, parts: int = 1
) -> list[ArrayType]:
    """Weights, starts [parts of the window, passes, lanes], multipliers, offsets, limits, and zero points [output, residual,
    planes…]."""
    return [
        ((weight_count,), weight_dtype),
        ((parts * passes * lanes,), accumulator),
        ((passes * lanes,), "float32"),
        ((lanes,), "float32"),
        ((LIMIT_COUNT,), "float32"),
        ((2 + planes,), "int32"),
    ]


def pack_integer(
    constants: LayerConstants,
    packing: ChannelPacking,
    operand_offset: int,
    accumulator: str,
    parts: Sequence[WindowPart] = (WHOLE_WINDOW,),
) -> tuple[Array, ...]:
    """The arrays of :func:`integer_array_types`.

    The accumulator of a pass starts at −(zero point + ``operand_offset``)·Σw of its point over the part of the window that the
    kernel computes. Padding holds the zero point and adds nothing: it makes no difference whether it is part of that.
    """
    assert isinstance(constants, IntegerAnchorConstants)
    codes, zero_point = constants.weight_codes, constants.input_zero_point
    zero_points = [zero_point] if packing.planes == 1 else [zero_point & 255, zero_point >> 8]
    sums = np.stack([codes[..., rows, columns].sum(axis=(2, 3, 4), dtype=np.int64) for rows, columns in parts])
    multipliers = np.asarray(constants.multiplier, np.float32)
    # Passes in the contract's order: points ascending, within a point the low plane before the high one.
    starts = np.stack([-(z + operand_offset) * sums[:, p] for p in range(len(codes)) for z in zero_points], axis=1)
    scaled = np.stack([m * np.float32(256**plane) for m in multipliers for plane in range(packing.planes)])
    return (
        packing.pack_weights(codes),
        packing.pack_channels(starts).astype(accumulator).reshape(-1),
        packing.pack_channels(scaled).reshape(-1),
        packing.pack_channels(np.asarray(constants.offset, np.float32)),
        np.array(limits_of(constants), np.float32),
        np.array([constants.requantization.zero_point, constants.residual_zero_point, *zero_points], np.int32),
    )


def float_array_types(weight_count: int, weight_dtype: str, lanes: int) -> list[ArrayType]:
    """Weights, bias, limits."""
    return [((weight_count,), weight_dtype), ((lanes,), "float32"), ((LIMIT_COUNT,), "float32")]


def pack_float(constants: LayerConstants, packing: ChannelPacking) -> tuple[Array, ...]:
    """The arrays of :func:`float_array_types`."""
    assert isinstance(constants, FloatAnchorConstants)
    return (
        packing.pack_weights(constants.weights[None]),
        packing.pack_channels(np.asarray(constants.bias, np.float32)),
        np.array(limits_of(constants), np.float32),
    )
