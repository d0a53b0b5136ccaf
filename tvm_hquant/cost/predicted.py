"""Cost of layers as a target spec predicts it, without running anything."""

from __future__ import annotations

import math

from tvm_hquant.layers import Layer
from tvm_hquant.precision import Arithmetic, Precision
from tvm_hquant.target_spec import TargetSpec


def predicted_cycles(spec: TargetSpec, layer: Layer, precision: Precision) -> float:
    """Cycles of one core for one call: the larger of computing and of moving weights and activations from memory.

    The roofline model (Williams et al. 2009), with the rates and the bandwidth of the spec.

    Raises:
        PrecisionError: the spec does not offer the precision for the operator.
    """
    kind = layer.operator_kind
    unit = spec.unit_for(precision.name, kind)
    work = layer.macs or math.prod(layer.operator.output_shape)
    compute = work / spec.macs_per_cycle(precision.name, kind)
    cycles_per_byte = unit.clock_ghz / spec.memory.bandwidth_gb_per_s
    return max(compute, layer_bytes(layer, precision) * cycles_per_byte)


def weight_bytes(layer: Layer, precision: Precision) -> float:
    """Bytes that the weights of a layer take in the artifact: codes, and a float32 scale and bias per channel."""
    if not layer.is_anchor:
        return 0.0
    channels = layer.operator.output_shape[-1]
    if precision.arithmetic is Arithmetic.FLOAT:
        return layer.parameter_count * precision.weight_bits / 8 + 4 * channels
    return layer.parameter_count * precision.weight_bits / 8 + 4 * channels * (1 + precision.weight_points)


def layer_bytes(layer: Layer, precision: Precision) -> float:
    """Bytes that one call moves: weights, and the output once written and once read."""
    return weight_bytes(layer, precision) + 2 * math.prod(layer.operator.output_shape) * precision.activation_bits / 8
