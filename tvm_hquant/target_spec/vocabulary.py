"""The words of a target spec that come from this project: operator kinds and stored formats."""

from __future__ import annotations

OPERATORS_WITH_WEIGHTS: tuple[str, ...] = ("conv2d", "depthwise_conv2d", "grouped_conv2d", "dense")
"""Operator kinds whose layers have weights; the others have activations only."""

OPERATOR_KINDS: tuple[str, ...] = (
    *OPERATORS_WITH_WEIGHTS,
    "batch_matmul", "add", "bias_add", "multiply", "average_pool2d", "max_pool2d", "resize2d", "concat", "unary", "softmax",
    "local_response_normalization", "layer_normalization", "group_normalization", "reshape", "permute_dims",
    "strided_slice", "take", "depth_to_space", "pad", "convert", "opaque",
)  # fmt: skip
"""Every operator kind that a unit can serve: what ``Layer.operator_kind`` gives; ``convert`` changes the format."""

STORED_FORMATS: tuple[str, ...] = ("uint8", "int8", "uint16", "float16", "bfloat16", "float32")
"""What tensors are stored in; conversions are priced between these."""
