"""The oracle over many samples at once: one call of NumPy for all of them where the operator treats samples apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.interface import KernelRequest, LayerConstants
from tvm_hquant.numerics.evaluation import evaluate
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
    Operator,
    Resize2D,
    Shape,
    Softmax,
    Unary,
)

Array = npt.NDArray[Any]


def evaluate_samples(
    request: KernelRequest, constants: LayerConstants, samples: Sequence[Sequence[Array]]
) -> list[Array]:
    """:func:`evaluate` of each of several samples.

    Args:
        request, constants: as there.
        samples: for each sample the inputs of the request.

    Returns:
        For each sample what :func:`evaluate` gives for it.

    Raises:
        KernelError: as :func:`evaluate`.
    """
    operator = stacked_operator(request.operator, len(samples))
    if len(samples) < 2 or operator is None:
        return [evaluate(request, constants, inputs) for inputs in samples]
    stacked = [np.concatenate(arrays) for arrays in zip(*samples, strict=True)]
    output = evaluate(replace(request, operator=operator), constants, stacked)
    return list(output.reshape(len(samples), *request.operator.output_shape))


def stacked_operator(operator: Operator, count: int) -> Operator | None:
    """The operator over ``count`` times its samples, stacked along the first axis; None where it mixes that axis."""
    match operator:
        case Conv2D() | MaxPool2D() | AveragePool2D() | Resize2D():
            return replace(operator, input_shape=_stacked(operator.input_shape, count))
        case Dense():
            leading = _stacked(operator.leading_shape, count) if operator.leading_shape else ()
            return replace(operator, rows=operator.rows * count, leading_shape=leading)
        case Add() | Unary() | Convert() if operator.shape:
            return replace(operator, shape=_stacked(operator.shape, count))
        case Softmax() if operator.axis != 0:
            return replace(operator, shape=_stacked(operator.shape, count))
        case BiasAdd() if len(operator.bias_shape) < len(operator.shape) or operator.bias_shape[:1] == (1,):
            return replace(operator, shape=_stacked(operator.shape, count))
        case GroupNormalization() if operator.axis > 0:
            return replace(operator, shape=_stacked(operator.shape, count))
        case LocalResponseNormalization() if len(operator.shape) > 1:
            return replace(operator, shape=_stacked(operator.shape, count))
        case BatchMatmul() if _keeps_samples_apart(operator):
            first, second = (_stacked(shape, count) for shape in operator.input_shapes)
            return replace(operator, input_shapes=(first, second))
        case Concat() if operator.axis != 0:
            return replace(operator, input_shapes=tuple(_stacked(s, count) for s in operator.input_shapes))
        case Movement() if operator.input_shape and operator.output_shape and not _moves_samples(operator):
            return replace(
                operator,
                input_shape=_stacked(operator.input_shape, count),
                output_shape=_stacked(operator.output_shape, count),
            )
        case _:
            return None


def _stacked(shape: Shape, count: int) -> Shape:
    return (shape[0] * count, *shape[1:])


def _keeps_samples_apart(operator: BatchMatmul) -> bool:
    """Whether the first axis of both inputs and of the output is the same axis of the batch, repeated nowhere."""
    orders = (*operator.input_axes, operator.output_axes)
    if len({len(order) for order in orders}) > 1 or not operator.batch_shape:
        return False
    sizes = {shape[0] for shape in (*operator.input_shapes, operator.product_shape)}
    return len(sizes) == 1 and not any(order[0] for order in orders)


def _moves_samples(operator: Movement) -> bool:
    """Whether elements get to other places along the first axis. A reshape keeps all of a sample together."""
    p = operator.parameters
    match operator.function:
        case "permute_dims":
            return p[0] != 0
        case "take":
            return p[0] == 0
        case "strided_slice":
            return 0 in p[::3]
        case "pad":
            return p[:2] != (0, 0)
        case _:
            return False
