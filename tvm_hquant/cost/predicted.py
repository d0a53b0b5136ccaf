"""Cost of layers as a target spec predicts it, without running anything."""

from __future__ import annotations

import math

from tvm_hquant.layers import Layer
from tvm_hquant.precision import Arithmetic, Precision
from tvm_hquant.target_spec import TargetSpec


def predicted_cycles(spec: TargetSpec, layer: Layer, precision: Precision) -> float:
    """Cycles of one core for one call: multiply-accumulates (elements, without weights) over the spec's rate.

    Memory has no part in it. The bandwidth in a detected spec is measured anew each time, and a search that ranks by it
    would not find the same plan twice.

    Raises:
        PrecisionError: the spec does not offer the precision for the operator.
    """
    work = layer.macs or math.prod(layer.operator.output_shape)
    return work / spec.macs_per_cycle(precision.name, layer.operator_kind)


def weight_bytes(layer: Layer, precision: Precision) -> float:
    """Bytes that the weights of a layer take in the artifact: codes, and a float32 scale and bias per channel."""
    if not layer.is_anchor:
        return 0.0
    channels = layer.operator.output_shape[-1]
    if precision.arithmetic is Arithmetic.FLOAT:
        return layer.parameter_count * precision.weight_bits / 8 + 4 * channels
    bits = precision.weight_bits
    if precision.weight_points > 1 and not precision.is_multipoint:
        bits = 2 * max(precision.point_widths)  # Both points are packed in the bits of the wider one.
    return layer.parameter_count * bits / 8 + 4 * channels * (1 + precision.weight_points)
