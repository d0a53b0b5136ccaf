"""Layers of a partitioned module, read from its IR: operator, tensors that flow in and out, constants.

A layer is a private Relax function with the attribute ``hquant.layer`` (its stable name) and ``hquant.operator`` (what it
computes, see :mod:`tvm_hquant.operators`). Its activations are parameters, its weights are constants in its body. A
tensor is called by the name of the layer that makes it, or by the name of the graph input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import IRModule, relax
from tvm.ir.expr import GenericConst

from tvm_hquant.errors import ModelError
from tvm_hquant.operator_codec import decode
from tvm_hquant.operators import (
    BatchMatmul,
    BiasAdd,
    Conv2D,
    Dense,
    GroupNormalization,
    Movement,
    Opaque,
    Operator,
    Shape,
)

LAYER_ATTRIBUTE = "hquant.layer"
OPERATOR_ATTRIBUTE = "hquant.operator"
PRECISION_ATTRIBUTE = "hquant.precision"
REASON_ATTRIBUTE = "hquant.reason"
FORMATS_ATTRIBUTE = "hquant.formats"
INPUTS_ATTRIBUTE = "hquant.inputs"
OUTPUTS_ATTRIBUTE = "hquant.outputs"

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer.

    Attributes:
        name: stable, unique, made from the model's own names.
        function_name: of its Relax function in the module.
        operator: what it computes.
        inputs: names of the tensors that flow in, in the order of the function's parameters.
        weights: float32 [out_channels, in_channels / groups, kernel_h, kernel_w] of an anchor; float32 [channels] of a
            normalization, its gamma; else None.
        bias: float32 [out_channels] of an anchor (zeros where it has none); float32 [channels] of a normalization, its beta;
            float32 of the bias shape of a bias addition; else None.
    """

    name: str
    function_name: str
    operator: Operator
    inputs: tuple[str, ...]
    weights: Array | None = None
    bias: Array | None = None

    @property
    def is_anchor(self) -> bool:
        """Whether it has weights that can be codes: a convolution or a dense layer."""
        return isinstance(self.operator, (Conv2D, Dense))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call; 0 for operators that are no products of matrices."""
        return self.operator.macs if isinstance(self.operator, (Conv2D, Dense, BatchMatmul, Opaque)) else 0

    @property
    def parameter_count(self) -> int:
        return 0 if self.weights is None else int(self.weights.size)

    @property
    def operator_kind(self) -> str:
        """The operator's name in target specs and reports."""
        operator = self.operator
        if isinstance(operator, Conv2D):
            if operator.is_depthwise:
                return "depthwise_conv2d"
            return "grouped_conv2d" if operator.groups > 1 else "conv2d"
        if isinstance(operator, Movement):
            return operator.function
        if isinstance(operator, GroupNormalization):
            return "layer_normalization" if operator.axis == operator.channel_axis else "group_normalization"
        return _KINDS[type(operator).__name__]


_KINDS = {
    "Dense": "dense",
    "Add": "add",
    "BiasAdd": "bias_add",
    "Multiply": "multiply",
    "BatchMatmul": "batch_matmul",
    "MaxPool2D": "max_pool2d",
    "AveragePool2D": "average_pool2d",
    "Resize2D": "resize2d",
    "Concat": "concat",
    "Unary": "unary",
    "Softmax": "softmax",
    "LocalResponseNormalization": "local_response_normalization",
    "Opaque": "opaque",
    "Convert": "convert",
}


@dataclass(frozen=True)
class GraphTensor:
    """Shape and dtype of a graph input or output."""

    shape: Shape
    dtype: str = "float32"


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """All layers of a module in execution order.

    Attributes:
        inputs: graph inputs by name, in order.
        layers: in execution order.
        outputs: names of the tensors that leave the graph, in order.
        output_names: the names under which they leave.
    """

    inputs: Mapping[str, GraphTensor]
    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]
    output_names: tuple[str, ...]

    @cached_property
    def by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def consumers(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """For each tensor, the (layer, input index) pairs that read it."""
        result: dict[str, list[tuple[str, int]]] = {name: [] for name in self.inputs}
        result.update({layer.name: [] for layer in self.layers})
        for layer in self.layers:
            for index, tensor in enumerate(layer.inputs):
                result[tensor].append((layer.name, index))
        return {name: tuple(pairs) for name, pairs in result.items()}

    @property
    def anchors(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.is_anchor)

    def around(self, names: Iterable[str]) -> LayerGraph:
        """The part of the graph that precisions of some layers with weights can change, where all others keep theirs.

        A layer without weights takes after its neighbours, one with weights does not: so the part is what is reached from the
        tensors of ``names`` without going through other layers with weights. These are in it where they make or read a tensor
        of it; whatever else they read is an input of the part, in float32.
        """
        reached: set[str] = set(names)
        waiting = [tensor for name in reached for tensor in (*self.by_name[name].inputs, name)]
        tensors: set[str] = set()
        while waiting:
            tensor = waiting.pop()
            if tensor in tensors:
                continue
            tensors.add(tensor)
            touching = [name for name, _ in self.consumers[tensor]] + [tensor] * (tensor in self.by_name)
            reached.update(touching)
            for name in touching:
                if not self.by_name[name].is_anchor:
                    waiting += (*self.by_name[name].inputs, name)
        layers = tuple(layer for layer in self.layers if layer.name in reached)
        read = [tensor for layer in layers for tensor in layer.inputs if tensor not in reached]
        inputs = {name: self.inputs.get(name, GraphTensor(self.tensor_shape(name))) for name in dict.fromkeys(read)}
        leaving = [(t, n) for t, n in zip(self.outputs, self.output_names, strict=True) if t in reached]
        return LayerGraph(inputs, layers, tuple(t for t, _ in leaving), tuple(n for _, n in leaving))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over layers, shapes and weights: tells whether a plan belongs to this model."""
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(repr((layer.name, layer.operator, layer.inputs)).encode())
            for values in (layer.weights, layer.bias):
                if values is not None:
                    digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def tensor_shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self.inputs[name].shape if name in self.inputs else self.by_name[name].operator.output_shape


def read_layers(mod: IRModule) -> LayerGraph:
    """The layers of a partitioned module.

    Raises:
        ModelError: ``main`` holds something else than calls of layers.
    """
    main = mod["main"]
    names = [str(n) for n in main.attrs[INPUTS_ATTRIBUTE]]
    tensor_of: dict[Any, str] = dict(zip(main.params, names, strict=True))
    inputs = {
        name: GraphTensor(tuple(int(d) for d in p.ty.shape), str(p.ty.dtype))
        for name, p in zip(names, main.params, strict=True)
    }
    layers: list[Layer] = []
    outputs: Any = main.body.body
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and isinstance(value.op, relax.GlobalVar):
                layer = _read_layer(mod, value, tensor_of)
                layers.append(layer)
                tensor_of[binding.var] = layer.name
            elif isinstance(value, relax.Var):
                tensor_of[binding.var] = tensor_of[value]
            elif isinstance(value, relax.Tuple) and binding.var.same_as(outputs):
                outputs = value
            else:
                raise ModelError(f"main binds {binding.var.name} to something that is no layer: partition it first")
    fields = list(outputs.fields) if isinstance(outputs, relax.Tuple) else [outputs]
    return LayerGraph(
        inputs,
        tuple(layers),
        tuple(tensor_of[f] for f in fields),
        tuple(str(n) for n in main.attrs[OUTPUTS_ATTRIBUTE]),
    )


def _read_layer(mod: IRModule, call: Any, tensor_of: Mapping[Any, str]) -> Layer:
    function = mod[call.op]
    operator = decode(str(function.attrs[OPERATOR_ATTRIBUTE]))
    inputs = tuple(tensor_of[a] for a in call.args)
    weights = bias = None
    if isinstance(operator, (Conv2D, Dense)):
        weights, bias = _anchor_constants(function, operator)
    elif isinstance(operator, GroupNormalization):
        weights, bias = _gamma_and_beta(function)
    elif isinstance(operator, BiasAdd):
        bias = _added_constant(function)
    return Layer(str(function.attrs[LAYER_ATTRIBUTE]), call.op.name_hint, operator, inputs, weights, bias)


def _anchor_constants(function: Any, operator: Conv2D | Dense) -> tuple[Array | None, Array | None]:
    """Weights [out, in, kh, kw] and bias [out] of an anchor's float body; None where the body is realized already."""
    weights: Array | None = None
    bias = np.zeros(operator.output_shape[-1], np.float32)
    for block in function.body.blocks:
        for binding in block.bindings:
            call = binding.value
            name = getattr(getattr(call, "op", None), "name", "")
            if name == "relax.nn.conv2d":
                layout = str(call.attrs.kernel_layout)
                weights = constant_array(call.args[1]).transpose([layout.index(axis) for axis in "OIHW"])
            elif name == "relax.matmul":
                weights = constant_array(call.args[1]).T[:, :, None, None]
            elif name == "relax.add" and is_constant(call.args[1]):
                bias = constant_array(call.args[1]).reshape(-1)
    if weights is None:
        return None, None
    return np.ascontiguousarray(weights, np.float32), np.ascontiguousarray(bias, np.float32)


def _gamma_and_beta(function: Any) -> tuple[Array | None, Array | None]:
    """Gamma and beta [channels] of a normalization's float body; None where the body is realized already."""
    for block in function.body.blocks:
        for binding in block.bindings:
            if getattr(getattr(binding.value, "op", None), "name", "") in (
                "relax.nn.layer_norm",
                "relax.nn.group_norm",
            ):
                gamma, beta = (constant_array(a).reshape(-1) for a in binding.value.args[1:3])
                return np.ascontiguousarray(gamma, np.float32), np.ascontiguousarray(beta, np.float32)
    return None, None


def _added_constant(function: Any) -> Array | None:
    """The constant of a bias addition's float body; None where the body is realized already."""
    for block in function.body.blocks:
        for binding in block.bindings:
            if getattr(getattr(binding.value, "op", None), "name", "") == "relax.add":
                return next((constant_array(a) for a in binding.value.args if is_constant(a)), None)
    return None


def is_constant(expression: Any) -> bool:
    """Whether a Relax expression is a tensor constant."""
    return isinstance(expression, GenericConst) and isinstance(expression.ty, relax.TensorType)


def constant_array(expression: Any) -> Array:
    """The values of a Relax tensor constant."""
    values: Array = expression.value.numpy()
    return values
