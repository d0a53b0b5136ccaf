"""Weight codes whose steps are powers of two, from the range of each output channel.

Source: Tsuji et al., "Greedy Search Algorithm for Mixed Precision in Post-Training Quantization …", ACML 2021, equations 4, 5
and 7: with b bits the step is 2^e, e = ⌈log₂((max − min) / (2^b − 1))⌉; weights are clamped to [min, min + 2^e·(2^b − 1)]
and rounded to the nearest multiple of the step, ties to even.

The zero point is 0, so codes are not centred, and where they would leave −127 … 127, as those of 8 bits in a channel whose
weights all have one sign, the step is doubled.
"""

from __future__ import annotations

import numpy as np

from tvm_hquant.layers import Layer
from tvm_hquant.precision import Precision
from tvm_hquant.quantized_weights import QuantizedWeights

_LARGEST_CODE = 127


def power_of_two_weights(layer: Layer, precision: Precision) -> QuantizedWeights:
    """Codes of a layer's weights in an integer precision of one point and at most 8 bits; the bias stays as it is."""
    assert layer.weights is not None
    assert layer.bias is not None
    rows = layer.weights.reshape(len(layer.weights), -1).astype(np.float64)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    levels = 2**precision.weight_bits - 1
    spread = np.where(high > low, high - low, 1.0)
    step = 2.0 ** np.ceil(np.log2(spread / levels))
    largest = np.maximum(np.abs(low), np.abs(high))
    step = np.where(np.rint(largest / step) > _LARGEST_CODE, 2 * step, step)
    # A channel of one value has no range; its step is that of its size.
    of_size = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest / _LARGEST_CODE, 1.0)))
    step = np.where(high > low, step, of_size)
    lowest = np.rint(low / step)
    # Where both ends are rounded away from the middle, one code more than there are would be needed.
    codes = np.minimum(np.rint(np.clip(rows, low, low + step * levels) / step), lowest + levels).astype(np.int8)
    return QuantizedWeights(codes.reshape(1, *layer.weights.shape), step.reshape(1, -1).astype(np.float32), layer.bias)
