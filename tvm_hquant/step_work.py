"""What a step of a program has to do, whatever kernel does it: operations, and bytes that are read and written."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.operators import AveragePool2D, Conv2D, Dense, MaxPool2D, Movement, Opaque, Operator
from tvm_hquant.simulator.program import Step
from tvm_hquant.tensor_format import STORAGE_DTYPE


def rated(step: Step) -> int:
    """What the rates of a target spec count: multiply-accumulates, or elements of the output; 0 if unknown."""
    if step.layer is not None and (step.layer.macs or isinstance(step.layer.operator, Opaque)):
        return step.layer.macs
    assert step.request is not None
    return math.prod(step.request.operator.output_shape)


def share_on_map(operator: Operator) -> float:
    """Of the multiply-accumulates of a convolution, those that read no padding; 1 of all other operators."""
    if not isinstance(operator, Conv2D):
        return 1.0
    axes = _axes(operator)
    return math.prod(sum(map(len, axis.taps)) / (len(axis.taps) * axis.kernel) for axis in axes)


def operations(step: Step) -> int:
    """Two for each multiply-accumulate; without these one for each element of the output, or of the windows of a pool."""
    if step.layer is not None and step.layer.macs:
        return 2 * step.layer.macs
    operator = step.request.operator if step.request is not None else None
    window = operator.window.kernel if isinstance(operator, MaxPool2D | AveragePool2D) else ()
    return rated(step) * math.prod(window)


def activation_bytes(step: Step) -> int:
    """Bytes of activations: what is needed of the inputs, each element once, and the output."""
    if step.request is None:
        assert step.layer is not None
        assert isinstance(step.layer.operator, Opaque)
        shapes = [*step.layer.operator.input_shapes, step.layer.operator.output_shape]
        return sum(map(math.prod, shapes)) * np.dtype("float32").itemsize
    request = step.request
    _, *others = input_shapes(request.operator)
    elements = [_elements_read(request), *map(math.prod, others), math.prod(request.operator.output_shape)]
    storages = [*request.inputs, request.output]
    return sum(n * np.dtype(STORAGE_DTYPE[storage]).itemsize for n, storage in zip(elements, storages, strict=True))


def _elements_read(request: KernelRequest) -> int:
    """Of the first input: without pixels between strides, and without what is cut off."""
    match request.operator:
        case Movement(function="strided_slice" | "take" | "depth_to_space"):
            return math.prod(request.operator.output_shape)
        case Conv2D() | MaxPool2D() | AveragePool2D() as operator:
            batch, _, _, channels = operator.input_shape
            return batch * channels * math.prod(len(frozenset().union(*axis.taps)) for axis in _axes(operator))
        case operator:
            return math.prod(input_shapes(operator)[0])


class _Axis(NamedTuple):
    """Of a map: the elements of the window, and for each output the positions on the map that they read."""

    kernel: int
    taps: tuple[frozenset[int], ...]


def _axes(operator: Conv2D | MaxPool2D | AveragePool2D) -> list[_Axis]:
    """Rows and columns."""
    window, sizes, outputs = operator.window, operator.input_shape[1:3], operator.output_shape[1:3]
    found = []
    for axis in (0, 1):
        steps = [k * window.dilation[axis] - window.padding[axis] for k in range(window.kernel[axis])]
        starts = [output * window.strides[axis] for output in range(outputs[axis])]
        taps = [frozenset(p for step in steps if 0 <= (p := start + step) < sizes[axis]) for start in starts]
        found.append(_Axis(window.kernel[axis], tuple(taps)))
    return found


def weight_bytes(step: Step) -> int:
    """Bytes of an anchor's weights as its kernel reads them: a byte for each code, whatever its width."""
    if step.request is None or not isinstance(step.request.operator, (Conv2D, Dense)):
        return 0
    sizes = {"int8": 1, "float32": 4}
    return (
        math.prod(step.request.operator.weight_shape) * step.request.weight_points * sizes.get(step.request.weights, 2)
    )
