"""The words of a target spec that come from this project: operator kinds, kernel families, stored formats."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

OPERATORS_WITH_WEIGHTS: tuple[str, ...] = ("conv2d", "depthwise_conv2d", "grouped_conv2d", "dense")
"""Operator kinds whose layers have weights; the others have activations only."""

OPERATOR_KINDS: tuple[str, ...] = (
    *OPERATORS_WITH_WEIGHTS,
    "batch_matmul", "add", "multiply", "average_pool2d", "max_pool2d", "resize2d", "concat", "unary", "softmax",
    "local_response_normalization", "reshape", "permute_dims", "strided_slice", "take", "pad", "convert", "opaque",
)  # fmt: skip
"""Every operator kind that a unit can serve: what ``Layer.operator_kind`` gives; ``convert`` changes the format."""

STORED_FORMATS: tuple[str, ...] = ("uint8", "int8", "uint16", "float16", "bfloat16", "float32")
"""What tensors are stored in; conversions are priced between these."""

INSTRUCTION_SETS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "amx": frozenset({"avx512f", "avx512bw", "avx512vl", "amx_tile", "amx_int8"}),
        "avx512_bf16": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}),
        "avx512_vnni": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}),
        "avx_vnni": frozenset({"avx2", "fma", "avx_vnni"}),
        "avx2": frozenset({"avx2", "fma"}),
        "arm_bf16": frozenset({"asimd", "bf16"}),
        "arm_fp16fml": frozenset({"asimd", "asimdhp", "asimdfhm"}),
        "arm_i8mm": frozenset({"asimd", "asimddp", "i8mm"}),
        "arm_dotprod": frozenset({"asimd", "asimddp"}),
        "arm_neon": frozenset({"asimd"}),
        "portable": frozenset(),
        "reference": frozenset(),
        "cuda_mma": frozenset(),
        "cuda": frozenset(),
        "c": frozenset(),
    }
)
"""Kernel families by the name that a spec uses, each with the CPU features that its kernels need.

Whoever adds a kernel family for another instruction set adds its line here.
"""
