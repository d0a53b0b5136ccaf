"""A network in float64, as plain NumPy: where float32 is too coarse, and to check gradients against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import KernelError
from tvm_hquant.layers import Layer, LayerGraph
from tvm_hquant.numerics.functions import unary_float64
from tvm_hquant.numerics.movement import move
from tvm_hquant.numerics.windows import columns, grouped_weights, pad_spatial, positions
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    Concat,
    Conv2D,
    Dense,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Softmax,
    Unary,
    Window,
)

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class Float64Network:
    """The layers of a partitioned float module over any number of samples at once."""

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        self.weights: dict[str, Floats] = {
            layer.name: layer.weights.astype(np.float64) for layer in graph.anchors if layer.weights is not None
        }

    def run(
        self,
        inputs: Mapping[str, Array],
        added: Mapping[str, Floats] | None = None,
        weights: Mapping[str, Floats] | None = None,
    ) -> dict[str, Floats]:
        """All tensors by name.

        Args:
            inputs: graph inputs, any batch.
            added: for layers with weights what is added to the tensor that they read first.
            weights: in place of the model's own, for some layers.
        """
        tensors: dict[str, Floats] = {name: np.asarray(inputs[name], np.float64) for name in self.graph.inputs}
        given = {**self.weights, **(weights or {})}
        for layer in self.graph.layers:
            read = [tensors[name] for name in layer.inputs]
            if added is not None and layer.name in added:
                read[0] = read[0] + added[layer.name]
            tensors[layer.name] = _layer(layer, read, given.get(layer.name))
        return tensors

    def logits(self, inputs: Mapping[str, Array], **changes: Any) -> Floats:
        """The first output, [samples, classes]."""
        found = self.run(inputs, **changes)[self.graph.outputs[0]]
        return found.reshape(len(next(iter(inputs.values()))), -1)


def cross_entropy(logits: Floats, labels: Sequence[int] | Array) -> Floats:
    """For each sample, in nats: −log softmax(logits)[label]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logarithms = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.asarray(-logarithms[np.arange(len(logits)), np.asarray(labels)])


def _layer(layer: Layer, read: list[Floats], weights: Floats | None) -> Floats:
    operator, x = layer.operator, read[0]
    match operator:
        case Conv2D() | Dense():
            assert weights is not None
            assert layer.bias is not None
            sums = linear(operator, x, weights)
            sums += layer.bias
            if operator.epilogue.has_residual:
                sums += read[1]
            return np.clip(sums, operator.epilogue.lower, operator.epilogue.upper, out=sums)
        case Add():
            return np.clip(x + read[1], operator.lower, operator.upper)
        case MaxPool2D():
            return np.asarray(np.max(np.stack(_windows(operator.window, x, -np.inf)), axis=0))
        case AveragePool2D():
            down, across = (np.array(d) for d in operator.divisors)
            total = np.sum(np.stack(_windows(operator.window, x, 0.0)), axis=0)
            return np.asarray(total / (down[:, None] * across)[None, :, :, None])
        case Concat():
            return np.concatenate(read, axis=operator.axis)
        case Unary():
            return unary_float64(operator.function, operator.parameters, x)
        case Movement():
            return move(_for_batch(operator, len(x)), x, operator.fill)
        case Softmax():
            e = np.exp(x - x.max(axis=operator.axis, keepdims=True))
            return np.asarray(e / e.sum(axis=operator.axis, keepdims=True))
        case LocalResponseNormalization():
            before, after = (operator.size - 1) // 2, operator.size // 2
            squares = np.pad(x * x, [(0, 0)] * (x.ndim - 1) + [(before, after)])
            near = np.sum(np.stack([squares[..., i : i + x.shape[-1]] for i in range(operator.size)]), axis=0)
            return np.asarray(x / (operator.bias + operator.alpha / operator.size * near) ** operator.beta)
    raise KernelError(f"layer {layer.name}: {layer.operator_kind} is not computed in float64")


def linear(operator: Conv2D | Dense, x: Floats, weights: Floats) -> Floats:
    """The sums of a layer, without its bias."""
    return _convolution(operator, x, weights) if isinstance(operator, Conv2D) else np.asarray(x @ weights[:, :, 0, 0].T)


def _for_batch(operator: Movement, batch: int) -> Movement:
    """The movement for another number of samples than the graph has (a reshape that keeps the batch axis first)."""
    return replace(operator, output_shape=(batch, *operator.output_shape[1:]))


def _windows(window: Window, x: Floats, fill: float) -> list[Floats]:
    return list(positions(pad_spatial(x, window, fill), window, window.output_size(*x.shape[1:3])))


def _convolution(operator: Conv2D, x: Floats, weights: Floats) -> Floats:
    if operator.is_depthwise:
        kernel = weights.reshape(operator.out_channels, -1)
        parts = enumerate(_windows(operator.window, x, 0.0))
        return np.asarray(sum(part * kernel[:, index] for index, part in parts))
    grouped = grouped_weights(weights, operator)
    taps, groups, per_group, outs = grouped.shape
    kernels = [np.ascontiguousarray(grouped[:, g]).reshape(taps * per_group, outs) for g in range(groups)]
    result = np.empty((len(x), *operator.output_shape[1:]))
    # Sample by sample, the columns of one stay in the cache until BLAS has read them.
    for number in range(len(x)):
        under = columns(pad_spatial(x[number : number + 1], operator.window, 0.0), operator)
        sums = result[number].reshape(-1, operator.out_channels)
        for g, kernel in enumerate(kernels):
            np.matmul(under[:, :, g].reshape(-1, taps * per_group), kernel, out=sums[:, g * outs : (g + 1) * outs])
    return result
