"""The oracle: what a kernel must compute for a request, as NumPy, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import KernelError
from tvm_hquant.fused_multiply_add import FloatArray
from tvm_hquant.kernels.interface import (
    BiasConstants,
    DequantizeConstants,
    FillConstants,
    FloatAnchorConstants,
    FloatElementwiseConstants,
    IntegerAnchorConstants,
    IntegerElementwiseConstants,
    KernelRequest,
    LayerConstants,
    NoConstants,
    NormalizationConstants,
    QuantizeConstants,
    TableConstants,
)
from tvm_hquant.numerics import float_layers, integer_layers
from tvm_hquant.numerics.batch_matmul import float_batch_matmul, integer_batch_matmul
from tvm_hquant.numerics.codes import dequantize
from tvm_hquant.numerics.functions import unary_float32
from tvm_hquant.numerics.group_normalization import group_normalization
from tvm_hquant.numerics.movement import move
from tvm_hquant.numerics.resizing import float_resize, integer_resize
from tvm_hquant.numerics.storage import narrow, widen
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    BatchMatmul,
    BiasAdd,
    Concat,
    Conv2D,
    Convert,
    Dense,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Multiply,
    Opaque,
    Resize2D,
    Softmax,
    Unary,
)
from tvm_hquant.tensor_format import STORAGE_DTYPE, Storage

Array = npt.NDArray[Any]


def evaluate(request: KernelRequest, constants: LayerConstants, inputs: Sequence[Array]) -> Array:
    """What the kernel for ``request`` must give for these constants and inputs.

    Args:
        request: operator and storages.
        constants: those that the interface names for the operator and storages.
        inputs: stored arrays (``STORAGE_DTYPE``) of the operator's input shapes; a fused residual last.

    Returns:
        The operator's output shape, in the dtype of the output storage.

    Raises:
        KernelError: inputs or constants do not fit the request, or the operator is opaque.
    """
    _check_inputs(request, inputs)
    output = _dispatch(request, constants, inputs)
    if output.dtype != STORAGE_DTYPE[request.output]:
        raise _mismatch(request, constants)
    return output.reshape(request.operator.output_shape)


def _check_inputs(request: KernelRequest, inputs: Sequence[Array]) -> None:
    if len(inputs) != len(request.inputs):
        raise KernelError(f"{request.operator}: {len(inputs)} inputs given, the request has {len(request.inputs)}")
    for index, (array, storage) in enumerate(zip(inputs, request.inputs, strict=True)):
        if array.dtype != STORAGE_DTYPE[storage]:
            raise KernelError(
                f"{request.operator}: input {index} is {array.dtype}, {storage} is stored as {STORAGE_DTYPE[storage]}"
            )


def _mismatch(request: KernelRequest, constants: LayerConstants) -> KernelError:
    return KernelError(
        f"{request.operator}: {type(constants).__name__} do not fit inputs {', '.join(request.inputs)} "
        f"and output {request.output}: see tvm_hquant/kernels/interface.py for the constants of each operator"
    )


def _is_code(storage: Storage) -> bool:
    return storage in ("uint8", "uint16")


def _dispatch(request: KernelRequest, constants: LayerConstants, inputs: Sequence[Array]) -> Array:
    match request.operator, constants:
        case (Conv2D() | Dense(), IntegerAnchorConstants()):
            return integer_layers.integer_anchor(request, constants, inputs)
        case (Conv2D() | Dense(), FloatAnchorConstants()):
            return float_layers.float_anchor(request, constants, inputs)
        case (AveragePool2D(), IntegerElementwiseConstants()):
            return integer_layers.integer_average_pool(request, constants, inputs)
        case (Resize2D(), IntegerElementwiseConstants()):
            return integer_resize(request, constants, inputs)
        case (Add() | Unary() | Convert(), IntegerElementwiseConstants()):
            return integer_layers.integer_elementwise(request, constants, inputs)
        case (Multiply(), IntegerElementwiseConstants()):
            return integer_layers.integer_multiply(request, constants, inputs)
        case (BatchMatmul(), IntegerElementwiseConstants()):
            return integer_batch_matmul(request, constants, inputs)
        case (Unary() | Convert(), TableConstants()):
            return np.asarray(constants.table)[inputs[0]]
        case (Concat() as operator, _):
            return np.concatenate(inputs, axis=operator.axis)
        case (Movement() as operator, _):
            return _move(operator, constants, inputs[0], request)
        case (MaxPool2D() as operator, _) if _is_code(request.inputs[0]):
            return integer_layers.max_pool(operator, inputs[0])
        case (Convert(), QuantizeConstants()):
            return _quantized(widen(inputs[0], request.inputs[0]), constants, request.output)
        case (Convert(), DequantizeConstants()):
            return narrow(dequantize(inputs[0], constants.scale, constants.zero_point), request.output)
        case (Opaque() as operator, _):
            raise KernelError(f"{operator.name} has no kernel and no oracle: TVM's own legalization computes it")
    if any(_is_code(storage) for storage in request.inputs):
        raise _mismatch(request, constants)
    values = [widen(array, storage) for array, storage in zip(inputs, request.inputs, strict=True)]
    result = _float(request, constants, values)
    if not _is_code(request.output):
        return narrow(result, request.output)
    codes = constants.quantization if isinstance(constants, NormalizationConstants | BiasConstants) else constants
    if not isinstance(codes, QuantizeConstants):
        raise _mismatch(request, constants)
    return _quantized(result, codes, request.output)


def _quantized(values: FloatArray, constants: QuantizeConstants, storage: Storage) -> Array:
    """The stored codes of float32 values."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scaled = values / np.float32(constants.scale)
    return integer_layers.requantize(scaled, constants.requantization, storage)


def _float(request: KernelRequest, constants: LayerConstants, values: Sequence[FloatArray]) -> FloatArray:
    match request.operator, constants:
        case (Add() as operator, FloatElementwiseConstants() | NoConstants()):
            lower, upper = _parameters(constants, (operator.lower, operator.upper))
            return float_layers.float_add(values[0], values[1], lower, upper)
        case (BiasAdd(), BiasConstants()):
            return float_layers.float_bias_add(values[0], constants.bias)
        case (Multiply(), NoConstants()):
            return float_layers.float_multiply(values[0], values[1])
        case (BatchMatmul() as operator, NoConstants()):
            return float_batch_matmul(operator, values[0], values[1])
        case (Unary() as operator, FloatElementwiseConstants() | NoConstants()):
            return unary_float32(operator.function, _parameters(constants, operator.parameters), values[0])
        case (AveragePool2D() as operator, _):
            return float_layers.float_average_pool(operator, values[0])
        case (Resize2D() as operator, _):
            return float_resize(operator, values[0])
        case (MaxPool2D() as operator, _):
            return float_layers.float_max_pool(operator, values[0])
        case (GroupNormalization() as operator, NormalizationConstants()):
            return group_normalization(operator, values[0], constants.gamma, constants.beta)
        case (Softmax() as operator, _):
            return float_layers.softmax(operator, values[0])
        case (LocalResponseNormalization() as operator, _):
            return float_layers.local_response_normalization(operator, values[0])
        case (Convert(), NoConstants()):
            return values[0]
    raise _mismatch(request, constants)


def _parameters(constants: LayerConstants, own: tuple[float, ...]) -> tuple[float, ...]:
    """Parameters that the constants hold, else the operator's own."""
    return (isinstance(constants, FloatElementwiseConstants) and constants.parameters) or own


def _move(operator: Movement, constants: LayerConstants, x: Array, request: KernelRequest) -> Array:
    fill = constants.fill if isinstance(constants, FillConstants) else operator.fill
    stored = _stored_fill(fill, request.inputs[0]) if operator.function == "pad" else 0
    return move(operator, x, stored)


def _stored_fill(fill: float, storage: Storage) -> Any:
    if _is_code(storage):
        if not math.isfinite(fill):
            raise KernelError(f"cannot pad codes with {fill}: FillConstants hold the stored code")
        return int(fill)
    return narrow(np.asarray(fill, np.float32), storage)[()]
