"""A plan as a list of steps: every layer and conversion with its kernel request and constants."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from tvm_hquant.formats import Conversion, GraphFormats, TensorScales, assign_formats
from tvm_hquant.kernels.interface import KernelRequest, LayerConstants
from tvm_hquant.layers import Layer, LayerGraph
from tvm_hquant.operators import Opaque
from tvm_hquant.precision import Precision
from tvm_hquant.quantized_weights import QuantizedWeights
from tvm_hquant.realization import realize_conversion, realize_layer
from tvm_hquant.tensor_format import FLOAT32_FORMAT, TensorFormat

WeightSource = Callable[[Layer, Precision], QuantizedWeights | None]
"""Gives the weight codes of a layer in a precision; None where it stores none."""


@dataclass(frozen=True, eq=False)
class Step:
    """One call.

    Attributes:
        name: of the layer, or of the one that a conversion becomes.
        layer: the layer, or None for a conversion.
        tensor: name of the tensor that comes out (for a conversion, the one that is converted).
        request, constants: what the kernel computes; None for operators that TVM legalizes.
        inputs: keys of the values that go in.
        key: of the value that comes out: a hash of all that it is computed from. Two steps of any two programs of one
            model, in any process, have one key if and only if they surely compute the same value for the same sample.
        realization: a hash of what the kernel computes with which constants, whatever goes in.
        format: of the value that comes out.
    """

    name: str
    layer: Layer | None
    tensor: str
    request: KernelRequest | None
    constants: LayerConstants | None
    inputs: tuple[int, ...]
    key: int
    realization: int
    format: TensorFormat


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in execution order; ``outputs`` are the keys of the graph's outputs."""

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    formats: GraphFormats
    conversions: tuple[Conversion, ...]

    @cached_property
    def digest(self) -> str:
        """Equal for two programs of one model if and only if they surely give the same outputs for every sample."""
        return f"{_hash(self.outputs):016x}"


class ProgramBuilder:
    """Makes programs of one model, giving equal values equal keys and realizing each layer once per codes and formats.

    ``weights`` gives weight codes; they are asked for once per layer and precision.
    """

    def __init__(self, graph: LayerGraph, weights: WeightSource) -> None:
        self.graph = graph
        self._weights = weights
        self._codes: dict[tuple[str, str], QuantizedWeights | None] = {}
        self._realized: dict[object, tuple[KernelRequest, LayerConstants]] = {}

    def program(
        self,
        precisions: Mapping[str, Precision],
        scales: TensorScales,
        weights: WeightSource | None = None,
        part: LayerGraph | None = None,
    ) -> Program:
        """The steps under a precision for every layer.

        ``weights`` gives the codes of a plan that brings its own, in place of the builder's; ``part`` is a part of the graph
        to look at alone.

        Raises:
            PrecisionError: a precision is impossible for a layer, or a scale is missing.
        """
        graph = self.graph if part is None else part
        formats = assign_formats(graph, precisions, scales)
        steps: list[Step] = []
        keys: dict[tuple[str, TensorFormat], int] = {}
        for number, name in enumerate(graph.inputs):
            keys[name, FLOAT32_FORMAT] = number

        def read(tensor: str, wanted: TensorFormat) -> int:
            if (tensor, wanted) not in keys:
                steps.append(self._conversion(tensor, formats.produced[tensor], wanted, keys))
                keys[tensor, wanted] = steps[-1].key
            return keys[tensor, wanted]

        for layer in graph.layers:
            required = tuple(formats.required[layer.name, i] for i in range(len(layer.inputs)))
            inputs = tuple(read(t, f) for t, f in zip(layer.inputs, required, strict=True))
            produced = formats.produced[layer.name]
            codes = self._layer_codes(layer, precisions[layer.name], weights)
            steps.append(self._layer(layer, precisions[layer.name], codes, required, produced, inputs))
            keys[layer.name, produced] = steps[-1].key
        outputs = tuple(read(tensor, FLOAT32_FORMAT) for tensor in graph.outputs)
        return Program(tuple(steps), outputs, formats, formats.conversions(graph))

    def _conversion(
        self, tensor: str, source: TensorFormat, target: TensorFormat, keys: Mapping[tuple[str, TensorFormat], int]
    ) -> Step:
        identity = ("conversion", tensor, source, target)
        if identity not in self._realized:
            self._realized[identity] = realize_conversion(self.graph.tensor_shape(tensor), source, target)
        request, constants = self._realized[identity]
        inputs, realization = (keys[tensor, source],), _hash(identity)
        name, key = Conversion(tensor, source, target).name, _hash((realization, inputs))
        return Step(name, None, tensor, request, constants, inputs, key, realization, target)

    def _layer(
        self,
        layer: Layer,
        precision: Precision,
        codes: QuantizedWeights | None,
        required: tuple[TensorFormat, ...],
        produced: TensorFormat,
        inputs: tuple[int, ...],
    ) -> Step:
        # Without weights the precision's name says nothing that the formats do not say.
        arithmetic = (precision.name, codes.digest if codes is not None else "") if layer.is_anchor else ()
        identity = (layer.name, arithmetic, required, produced)
        realization = _hash(identity)
        key = _hash((realization, inputs))
        if isinstance(layer.operator, Opaque):
            return Step(layer.name, layer, layer.name, None, None, inputs, key, realization, produced)
        if identity not in self._realized:
            self._realized[identity] = realize_layer(layer, precision, required, produced, codes)
        request, constants = self._realized[identity]
        return Step(layer.name, layer, layer.name, request, constants, inputs, key, realization, produced)

    def _layer_codes(self, layer: Layer, precision: Precision, weights: WeightSource | None) -> QuantizedWeights | None:
        if weights is not None:
            return weights(layer, precision)
        identity = (layer.name, precision.name)
        if identity not in self._codes:
            self._codes[identity] = self._weights(layer, precision)
        return self._codes[identity]


def _hash(identity: object) -> int:
    """64 bits, the same in every process; graph inputs have the small keys, which no hash is likely to meet."""
    return int.from_bytes(hashlib.blake2b(repr(identity).encode(), digest_size=8).digest(), "big")
