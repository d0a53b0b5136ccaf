"""From a layer, its precision and the formats around it to a kernel request and the constants of the kernel.

This is the only place where the arithmetic contract meets a layer. The simulator, the passes and the check of an
artifact all come here, so that what is simulated is what is deployed.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tvm_hquant import numerics
from tvm_hquant.errors import PrecisionError
from tvm_hquant.kernels.convolution.saturation import centred_products, saturation_free_pairs
from tvm_hquant.kernels.epilogues.proven_endings import proven_ending
from tvm_hquant.kernels.interface import (
    BiasConstants,
    FillConstants,
    FloatAnchorConstants,
    FloatElementwiseConstants,
    KernelRequest,
    LayerConstants,
    NoConstants,
    NormalizationConstants,
    ProvenEnding,
    TableConstants,
)
from tvm_hquant.layers import Layer
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    BatchMatmul,
    BiasAdd,
    Conv2D,
    Convert,
    Dense,
    GroupNormalization,
    Movement,
    Multiply,
    Resize2D,
    Shape,
    Softmax,
    Unary,
)
from tvm_hquant.precision import Precision
from tvm_hquant.quantized_weights import QuantizedWeights
from tvm_hquant.tensor_format import TensorFormat

Realized = tuple[KernelRequest, LayerConstants]


def realize_layer(
    layer: Layer,
    precision: Precision,
    inputs: Sequence[TensorFormat],
    output: TensorFormat,
    weights: QuantizedWeights | None,
) -> Realized:
    """The kernel request and constants of a layer.

    ``inputs`` and ``output`` are the formats of its tensors; ``weights`` are needed by anchors in integer and weight-only
    precisions, and by float ones whose weights are stored as codes.

    Raises:
        PrecisionError: the layer's sums could leave int32 in this precision, or nothing computes it.
    """
    operator = layer.operator
    if isinstance(operator, (Conv2D, Dense)):
        if precision.is_integer:
            return _integer_anchor(layer, operator, inputs, output, weights)
        return _float_anchor(layer, operator, precision, inputs, output, weights)
    storages = tuple(f.storage for f in inputs)
    request = KernelRequest(operator, storages, output.storage)
    integer = inputs[0].is_integer
    if isinstance(operator, Add):
        if integer:
            return request, numerics.elementwise_constants(inputs, output, operator.lower, operator.upper)
        return request, FloatElementwiseConstants((operator.lower, operator.upper))
    if isinstance(operator, Multiply) and integer:
        return request, numerics.multiply_constants(inputs, output)
    if isinstance(operator, BatchMatmul) and integer:
        _check_matmul(layer.name, operator, inputs)
        return request, numerics.matmul_constants(operator, inputs, output)
    if isinstance(operator, Resize2D) and integer:
        return request, numerics.elementwise_constants(inputs, output)
    if isinstance(operator, AveragePool2D) and integer:
        return request, numerics.average_pool_constants(operator, inputs[0], output)
    if isinstance(operator, Unary):
        return request, _unary(layer, operator, inputs[0], output)
    quantization = numerics.quantize_constants(output) if output.is_integer else None
    if isinstance(operator, GroupNormalization):
        assert layer.weights is not None
        assert layer.bias is not None
        return request, NormalizationConstants(layer.weights, layer.bias, quantization)
    if isinstance(operator, BiasAdd):
        assert layer.bias is not None
        return request, BiasConstants(layer.bias, quantization)
    if isinstance(operator, Softmax) and quantization is not None:
        return request, quantization
    if isinstance(operator, Movement) and operator.function == "pad":
        return request, FillConstants(_stored_fill(operator.fill, output))
    return request, NoConstants()


def realize_conversion(shape: Shape, source: TensorFormat, target: TensorFormat) -> Realized:
    """The kernel request and constants of a change of format."""
    request = KernelRequest(Convert(shape), (source.storage,), target.storage)
    if source.is_integer and target.is_integer:
        return request, numerics.elementwise_constants((source,), target)
    if source.is_integer:
        return request, numerics.dequantize_constants(source)
    if target.is_integer:
        return request, numerics.quantize_constants(target)
    return request, NoConstants()


def _integer_anchor(
    layer: Layer,
    operator: Conv2D | Dense,
    inputs: Sequence[TensorFormat],
    output: TensorFormat,
    weights: QuantizedWeights | None,
) -> Realized:
    assert weights is not None
    for codes in weights.codes:
        numerics.check_accumulator(codes, inputs[0].storage_zero_point, f"layer {layer.name}")
    residual = inputs[1] if operator.epilogue.has_residual else None
    constants = numerics.integer_anchor_constants(
        weights.codes, weights.scales, weights.bias, inputs[0], output, operator.epilogue, residual
    )
    ends_in_bytes = all(f.storage == "uint8" for f in (*inputs, output))
    request = KernelRequest(
        operator,
        tuple(f.storage for f in inputs),
        output.storage,
        "int8",
        len(weights.codes),
        saturation_free_pairs(weights.codes),
        centred_products(weights.codes),
        ending=proven_ending(constants) if ends_in_bytes else ProvenEnding(),
    )
    return request, constants


def _float_anchor(
    layer: Layer,
    operator: Conv2D | Dense,
    precision: Precision,
    inputs: Sequence[TensorFormat],
    output: TensorFormat,
    weights: QuantizedWeights | None,
) -> Realized:
    storage = "float32"
    if weights is not None:
        values, bias = weights.real(), weights.bias
    else:
        assert layer.weights is not None
        assert layer.bias is not None
        values, bias = layer.weights, layer.bias
    if precision.name == "float16":
        values, storage = _to_float16(layer.name, values), "float16"
    elif precision.name == "bfloat16":
        values, storage = values.astype(ml_dtypes.bfloat16).view(np.uint16), "bfloat16"
    epilogue = operator.epilogue
    request = KernelRequest(
        operator,
        tuple(f.storage for f in inputs),
        output.storage,
        storage,
        finite_weights=bool(np.isfinite(numerics.widen(values, storage)).all()),
    )
    return request, FloatAnchorConstants(values, bias, epilogue.lower, epilogue.upper)


def _check_matmul(layer: str, operator: BatchMatmul, inputs: Sequence[TensorFormat]) -> None:
    """Kernels start sums at −zp_a · Σb, so both that and the products must fit, like in a layer with weights."""
    if any(f.storage != "uint8" for f in inputs):
        raise PrecisionError(f"layer {layer}: products of activations have no kernel for 16-bit codes")
    if inputs[1].dtype != "int8":
        raise PrecisionError(f"layer {layer}: the second matrix must be in symmetric int8 codes, not {inputs[1].dtype}")
    if 2 * 255 * 128 * operator.depth >= 2**31:
        raise PrecisionError(f"layer {layer}: sums of {operator.depth} products of codes could leave int32")


def _to_float16(layer: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    largest = float(np.abs(values).max(initial=0.0))
    if largest > float(np.finfo(np.float16).max):
        raise PrecisionError(f"layer {layer}: its largest weight {largest:g} does not fit float16; use bfloat16")
    return values.astype(np.float16)


def _unary(layer: Layer, operator: Unary, source: TensorFormat, output: TensorFormat) -> LayerConstants:
    if not source.is_integer:
        return FloatElementwiseConstants(operator.parameters)
    if source.storage == "uint8":
        return TableConstants(numerics.unary_table(operator.function, operator.parameters, source, output))
    if operator.function == "clip":
        return numerics.elementwise_constants((source,), output, operator.parameters[0], operator.parameters[1])
    raise PrecisionError(
        f"layer {layer.name}: {operator.function_name} has no kernel for 16-bit codes; keep it in float32"
    )


def _stored_fill(value: float, output: TensorFormat) -> float:
    if not output.is_integer:
        return value
    code = numerics.quantize(np.float32(value), output.scale, output.zero_point, output.q_min, output.q_max)
    return float(int(code) + output.storage_offset)
