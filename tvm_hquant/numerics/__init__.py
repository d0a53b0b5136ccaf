"""The arithmetic contract (``docs/numerics.md``) as NumPy: what every quantized operator computes, bit for bit.

The simulator and every kernel are compared with these functions. Nothing here knows of TVM.
"""

from tvm_hquant.bfloat16 import bfloat16_bits, bfloat16_values
from tvm_hquant.fused_multiply_add import fma
from tvm_hquant.numerics.codes import (
    activation_format,
    activation_range_to_scale,
    canonical_codes,
    dequantize,
    multiplier,
    offset,
    quantize,
    requantization,
    residual_multiplier,
    stored_codes,
)
from tvm_hquant.numerics.constants import (
    average_pool_constants,
    dequantize_constants,
    elementwise_constants,
    integer_anchor_constants,
    matmul_constants,
    multiply_constants,
    quantize_constants,
)
from tvm_hquant.numerics.evaluation import evaluate
from tvm_hquant.numerics.functions import PARAMETER_COUNTS, clamp, unary_float32, unary_float64, unary_table
from tvm_hquant.numerics.integer_layers import requantize
from tvm_hquant.numerics.samples import evaluate_samples
from tvm_hquant.numerics.storage import narrow, widen
from tvm_hquant.numerics.tensor_cores import ValueLimits, beyond_limits, tensor_core_limits
from tvm_hquant.numerics.weights import (
    check_accumulator,
    dequantize_weights,
    limited_scales,
    quantize_weights,
    round_weights,
    smallest_scale,
    weight_code_limit,
    weight_points,
)

__all__ = [
    "PARAMETER_COUNTS",
    "ValueLimits",
    "activation_format",
    "activation_range_to_scale",
    "average_pool_constants",
    "beyond_limits",
    "bfloat16_bits",
    "bfloat16_values",
    "canonical_codes",
    "check_accumulator",
    "clamp",
    "dequantize",
    "dequantize_constants",
    "dequantize_weights",
    "elementwise_constants",
    "evaluate",
    "evaluate_samples",
    "fma",
    "integer_anchor_constants",
    "limited_scales",
    "matmul_constants",
    "multiplier",
    "multiply_constants",
    "narrow",
    "offset",
    "quantize",
    "quantize_constants",
    "quantize_weights",
    "requantization",
    "requantize",
    "residual_multiplier",
    "round_weights",
    "smallest_scale",
    "stored_codes",
    "tensor_core_limits",
    "unary_float32",
    "unary_float64",
    "unary_table",
    "weight_code_limit",
    "weight_points",
    "widen",
]
