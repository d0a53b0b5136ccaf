"""Constants of a layer as a plain list of arrays and back, in one documented order.

The reference kernels take exactly these arrays, so that a realized module can be read back: its constants are the
contract's own, not packed for any instruction set.

=============================  =================================================================================
constants                      arrays
=============================  =================================================================================
IntegerAnchorConstants         weight_codes, multiplier, offset, float32 [lower, upper, residual_multiplier],
                               int32 [input_zero_point, residual_zero_point, output_zero_point]
FloatAnchorConstants           weights, bias, float32 [lower, upper]
IntegerElementwiseConstants    a float32 multiplier array per input, float32 [lower, upper],
                               int32 [input zero points…, output_zero_point]
QuantizeConstants              float32 [scale, lower, upper], int32 [output_zero_point]
DequantizeConstants            float32 [scale], int32 [zero_point]
TableConstants                 table
FillConstants                  float32 [fill]
FloatElementwiseConstants      float32 [parameters…] (one zero where there are none)
NormalizationConstants         gamma, beta, and where codes are stored the arrays of QuantizeConstants
BiasConstants                  bias, and where codes are stored the arrays of QuantizeConstants
NoConstants                    nothing
=============================  =================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_hquant.kernels.interface import (
    Array,
    BiasConstants,
    DequantizeConstants,
    FillConstants,
    FloatAnchorConstants,
    FloatElementwiseConstants,
    IntegerAnchorConstants,
    IntegerElementwiseConstants,
    LayerConstants,
    NoConstants,
    NormalizationConstants,
    QuantizeConstants,
    Requantization,
    TableConstants,
)


def to_arrays(constants: LayerConstants) -> tuple[Array, ...]:
    """The arrays of a layer's constants, in the order of the table above."""
    match constants:
        case IntegerAnchorConstants():
            r = constants.requantization
            return (
                constants.weight_codes,
                np.asarray(constants.multiplier, np.float32),
                np.asarray(constants.offset, np.float32),
                _floats(r.lower, r.upper, constants.residual_multiplier),
                _integers(constants.input_zero_point, constants.residual_zero_point, r.zero_point),
            )
        case FloatAnchorConstants():
            return constants.weights, constants.bias, _floats(constants.lower, constants.upper)
        case IntegerElementwiseConstants():
            r = constants.requantization
            multipliers = tuple(np.atleast_1d(np.asarray(m, np.float32)) for m in constants.multipliers)
            return *multipliers, _floats(r.lower, r.upper), _integers(*constants.input_zero_points, r.zero_point)
        case QuantizeConstants():
            r = constants.requantization
            return _floats(constants.scale, r.lower, r.upper), _integers(r.zero_point)
        case DequantizeConstants():
            return _floats(constants.scale), _integers(constants.zero_point)
        case TableConstants():
            return (constants.table,)
        case FillConstants():
            return (_floats(constants.fill),)
        case FloatElementwiseConstants():
            return (_floats(*(constants.parameters or (0.0,))),)
        case NormalizationConstants():
            vectors = np.asarray(constants.gamma, np.float32), np.asarray(constants.beta, np.float32)
            return *vectors, *_of_codes(constants.quantization)
        case BiasConstants():
            return np.asarray(constants.bias, np.float32), *_of_codes(constants.quantization)
        case NoConstants():
            return ()


def from_arrays(kind: str, arrays: Sequence[Array]) -> LayerConstants:
    """The inverse of :func:`to_arrays`; ``kind`` is the name of the class.

    Raises:
        KeyError: no constants have that name.
    """
    if kind == "IntegerAnchorConstants":
        codes, multiplier, offset, floats, integers = arrays
        requantization = Requantization(float(floats[0]), float(floats[1]), int(integers[2]))
        return IntegerAnchorConstants(
            codes, int(integers[0]), multiplier, offset, requantization, float(floats[2]), int(integers[1])
        )
    if kind == "FloatAnchorConstants":
        return FloatAnchorConstants(arrays[0], arrays[1], float(arrays[2][0]), float(arrays[2][1]))
    if kind == "IntegerElementwiseConstants":
        *multipliers, floats, integers = arrays
        requantization = Requantization(float(floats[0]), float(floats[1]), int(integers[-1]))
        return IntegerElementwiseConstants(tuple(int(i) for i in integers[:-1]), tuple(multipliers), requantization)
    if kind == "QuantizeConstants":
        quantization = _quantization(arrays)
        assert quantization is not None
        return quantization
    if kind == "DequantizeConstants":
        return DequantizeConstants(float(arrays[0][0]), int(arrays[1][0]))
    if kind == "TableConstants":
        return TableConstants(arrays[0])
    if kind == "FillConstants":
        return FillConstants(float(arrays[0][0]))
    if kind == "FloatElementwiseConstants":
        return FloatElementwiseConstants(tuple(float(v) for v in arrays[0]))
    if kind == "NormalizationConstants":
        return NormalizationConstants(arrays[0], arrays[1], _quantization(arrays[2:]))
    if kind == "BiasConstants":
        return BiasConstants(arrays[0], _quantization(arrays[1:]))
    if kind == "NoConstants":
        return NoConstants()
    raise KeyError(kind)


def _of_codes(quantization: QuantizeConstants | None) -> tuple[Array, ...]:
    return () if quantization is None else to_arrays(quantization)


def _quantization(arrays: Sequence[Array]) -> QuantizeConstants | None:
    """What was quantized with, None for no arrays."""
    if not arrays:
        return None
    floats, integers = arrays
    requantization = Requantization(float(floats[1]), float(floats[2]), int(integers[0]))
    return QuantizeConstants(float(floats[0]), requantization)


def _floats(*values: float) -> Array:
    return np.array(values, np.float32)


def _integers(*values: int) -> Array:
    return np.array(values, np.int32)
