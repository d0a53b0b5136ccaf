"""Which format every tensor is made in and read in, once every layer has a precision.

A layer's precision says in which codes it reads its activations; what it writes follows from who reads it. So a tensor
is written in the widest format that a reader asks for, the other readers get a conversion, and two layers of one
precision meet without any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm_hquant.errors import PrecisionError
from tvm_hquant.layers import Layer, LayerGraph
from tvm_hquant.operators import (
    AveragePool2D,
    BatchMatmul,
    BiasAdd,
    Concat,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Opaque,
    Softmax,
    Unary,
)
from tvm_hquant.precision import FLOAT32, INT8, Arithmetic, Precision
from tvm_hquant.tensor_format import FLOAT32_FORMAT, TensorFormat, float_format

TensorScales = Mapping[str, Mapping[str, TensorFormat]]
"""For every tensor that may hold codes, its format in each kind of codes (``uint8``, ``int8``, ``uint16``, ``uint6``…)."""


def codes_name(precision: Precision) -> str:
    """The kind of codes that an integer precision reads, as plans write it."""
    return "int8" if precision.symmetric else f"uint{precision.activation_bits}"


def is_transparent(layer: Layer) -> bool:
    """Whether a layer passes stored values through unchanged, in any format."""
    return isinstance(layer.operator, (MaxPool2D, Movement, Concat))


def is_float_only(layer: Layer, precision: Precision) -> bool:
    """Whether no kernel computes a layer in this precision, so that it stays in float32."""
    operator = layer.operator
    if isinstance(operator, (Softmax, LocalResponseNormalization, GroupNormalization, BiasAdd, Opaque)):
        return True
    if isinstance(operator, Unary) and operator.function != "clip":
        return not (precision.is_integer and precision.activation_bits <= 8)
    return isinstance(operator, BatchMatmul) and precision.is_integer and precision.activation_bits > 8


def read_precision(layer: Layer, index: int, precision: Precision) -> Precision:
    """The precision in whose codes a layer reads input ``index``: the second matrix of a product is symmetric int8."""
    is_second_matrix = isinstance(layer.operator, BatchMatmul) and index == 1
    return INT8 if is_second_matrix and precision.is_integer else precision


def _width(precision: Precision) -> int:
    """Order of formats by what they can hold: float32, 16-bit floats, 16-bit codes, 8-bit codes."""
    if precision.arithmetic is Arithmetic.INTEGER:
        return precision.activation_bits
    return 64 if precision.activation_bits == 32 else 32


@dataclass(frozen=True)
class FollowedPrecision:
    """Precision of a layer without weights, and why."""

    precision: Precision
    reason: str
    detail: str


def follow_consumers(
    graph: LayerGraph, anchors: Mapping[str, Precision], fixed: Mapping[str, Precision], output: Precision = FLOAT32
) -> dict[str, FollowedPrecision]:
    """Precisions of all layers without weights: each takes the widest that its readers take, so that casts are few.

    A product of two activations is work of its own, and what reads it is often in float (a softmax): it takes the widest that
    the layers with weights take from whose results its matrices come.

    ``anchors`` gives the layers with weights their precision, ``fixed`` what the user fixed for others, ``output`` the
    precision in which layers that make graph outputs are computed.
    """
    chosen = _follow_makers(graph, anchors)
    for layer in reversed(graph.layers):
        if layer.is_anchor or (layer.name in chosen and layer.name not in fixed):
            continue
        inside: list[Precision] = []  # of the readers whose results are not just an output in another order
        leaving = [output] if layer.name in graph.outputs else []
        for name, index in graph.consumers[layer.name]:
            own = anchors[name] if name in anchors else chosen[name].precision
            only_leaves = name not in fixed and _only_leaves(graph, graph.by_name[name])
            (leaving if only_leaves else inside).append(read_precision(graph.by_name[name], index, own))
        readers = inside if _leaves_as_codes(graph, layer, inside, anchors) else [*inside, *leaving]
        widest = max(readers, key=_width, default=output)
        # Weights have no part here: the plain precision of the same activations speaks for all of them.
        wanted = _without_weights(widest)
        if layer.name in fixed:
            chosen[layer.name] = FollowedPrecision(fixed[layer.name], "chosen by the user", "")
        elif is_float_only(layer, wanted):
            detail = _why_float_only(layer, wanted)
            chosen[layer.name] = FollowedPrecision(FLOAT32, "no kernel", detail)
        elif wanted.is_integer and _shrinks_float(graph, layer, anchors):
            detail = "made by a float layer and smaller behind this one: converted after it"
            chosen[layer.name] = FollowedPrecision(FLOAT32, "cast cost", detail)
        elif wanted.is_integer:
            chosen[layer.name] = FollowedPrecision(wanted, "as its readers", "")
        else:
            detail = "the layers that read it are in float" if graph.consumers[layer.name] else "makes a graph output"
            chosen[layer.name] = FollowedPrecision(wanted, "cast cost", detail)
    return chosen


def _follow_makers(graph: LayerGraph, anchors: Mapping[str, Precision]) -> dict[str, FollowedPrecision]:
    """Precisions of the products of two activations that are made of what layers with weights make."""
    chosen: dict[str, FollowedPrecision] = {}
    makers: dict[str, frozenset[str]] = dict.fromkeys(graph.inputs, frozenset())
    for layer in graph.layers:
        before = frozenset().union(*(makers[tensor] for tensor in layer.inputs))
        makers[layer.name] = frozenset({layer.name}) if layer.is_anchor else before
        if not isinstance(layer.operator, BatchMatmul) or not before:
            continue
        wanted = _without_weights(max((anchors[name] for name in sorted(before)), key=_width))
        if is_float_only(layer, wanted):
            chosen[layer.name] = FollowedPrecision(FLOAT32, "no kernel", _why_float_only(layer, wanted))
        else:
            chosen[layer.name] = FollowedPrecision(wanted, "as its makers", "")
    return chosen


def _why_float_only(layer: Layer, wanted: Precision) -> str:
    operator, name = layer.operator, layer.operator_kind
    if isinstance(operator, Opaque):
        if operator.name.startswith("relax.nn.conv") and len(operator.input_shapes) > 1:
            return (
                f"{operator.name.removeprefix('relax.')} whose weights other layers compute is left to TVM, in float32"
            )
        return f"{operator.name.removeprefix('relax.')} is an operator that only TVM computes, in float32"
    if isinstance(operator, Unary):
        name = operator.function_name
    return f"{name} has no kernel for {wanted.name} activations" if wanted != FLOAT32 else f"{name} is float32 only"


def _without_weights(precision: Precision) -> Precision:
    if precision.arithmetic is Arithmetic.WEIGHT_ONLY:
        return FLOAT32
    if precision.is_integer and not precision.symmetric:
        return Precision(f"a{precision.activation_bits}w8", Arithmetic.INTEGER, precision.activation_bits, 8)
    return precision


def _shrinks_float(graph: LayerGraph, layer: Layer, anchors: Mapping[str, Precision]) -> bool:
    """Whether a pool or slice reads what a float anchor made: then converting its smaller result is cheaper."""
    if not isinstance(layer.operator, (MaxPool2D, AveragePool2D, Movement)):
        return False
    producer = anchors.get(layer.inputs[0])
    if producer is None or producer.is_integer:
        return False
    before, after = graph.tensor_shape(layer.inputs[0]), layer.operator.output_shape
    return _elements(after) < _elements(before)


def _only_leaves(graph: LayerGraph, layer: Layer) -> bool:
    """Whether a layer only moves what then leaves the graph."""
    return is_transparent(layer) and all(_only_leaves(graph, graph.by_name[n]) for n, _ in graph.consumers[layer.name])


def _leaves_as_codes(
    graph: LayerGraph, layer: Layer, readers: Sequence[Precision], anchors: Mapping[str, Precision]
) -> bool:
    """Whether a graph output that ``readers`` in the graph read as codes, too, is made as codes and dequantized once.

    In floats its makers would write four times the bytes, and what reads codes, of the output or of what its makers make,
    would each need them quantized. That pays where all makers can make codes.
    """
    if not is_transparent(layer) or not readers or not all(reader.is_integer for reader in readers):
        return False
    wanted = _without_weights(max(readers, key=_width))
    makers = [graph.by_name[tensor] for tensor in layer.inputs if tensor in graph.by_name]
    return all(anchors[m.name].is_integer if m.is_anchor else not is_float_only(m, wanted) for m in makers)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@dataclass(frozen=True)
class Conversion:
    """A change of format at a boundary: ``tensor`` is read in ``target`` by some layer, but made in ``source``."""

    tensor: str
    source: TensorFormat
    target: TensorFormat

    @property
    def kind(self) -> str:
        """quantize, dequantize, requantize, or cast between floats."""
        if self.source.is_integer:
            return "requantize" if self.target.is_integer else "dequantize"
        return "quantize" if self.target.is_integer else "cast"

    @property
    def name(self) -> str:
        """Name of the layer that it becomes."""
        f = self.target
        codes = f"{f.dtype}_{f.zero_point}_{f.scale:.9g}" if f.is_integer else f.dtype
        return f"{self.tensor}.to_{codes}"


@dataclass(frozen=True)
class GraphFormats:
    """The formats of all tensors under one assignment of precisions.

    Attributes:
        produced: for each tensor, the format in which its layer (or the caller) makes it.
        required: for each (layer, input index), the format in which it is read.
        precisions: of every layer.
    """

    produced: Mapping[str, TensorFormat]
    required: Mapping[tuple[str, int], TensorFormat]
    precisions: Mapping[str, Precision]

    def conversions(self, graph: LayerGraph) -> tuple[Conversion, ...]:
        """All conversions, in execution order, each once however many layers read it."""
        found: dict[Conversion, None] = {}
        for layer in graph.layers:
            for index, tensor in enumerate(layer.inputs):
                source, target = self.produced[tensor], self.required[layer.name, index]
                if source != target:
                    found[Conversion(tensor, source, target)] = None
        for tensor in graph.outputs:
            if self.produced[tensor] != FLOAT32_FORMAT:
                found[Conversion(tensor, self.produced[tensor], FLOAT32_FORMAT)] = None
        return tuple(found)


def assign_formats(graph: LayerGraph, precisions: Mapping[str, Precision], scales: TensorScales) -> GraphFormats:
    """The formats that follow from a precision for every layer.

    Raises:
        PrecisionError: a layer reads codes of a tensor whose range is not known.
    """
    produced: dict[str, TensorFormat] = dict.fromkeys(graph.inputs, FLOAT32_FORMAT)
    required: dict[tuple[str, int], TensorFormat] = {}
    # Readers come after their producers, so required formats of transparent layers are known when walking backwards.
    for layer in reversed(graph.layers):
        wanted = [required[reader] for reader in graph.consumers[layer.name]]
        if layer.name in graph.outputs:
            wanted.append(FLOAT32_FORMAT)
        precision = precisions[layer.name]
        produced[layer.name] = _produced_format(layer, precision, wanted, scales)
        for index, tensor in enumerate(layer.inputs):
            if is_transparent(layer):
                required[layer.name, index] = produced[layer.name]
            elif precision.is_integer:
                required[layer.name, index] = _codes(
                    scales, tensor, read_precision(layer, index, precision), layer.name
                )
            else:
                required[layer.name, index] = float_format(precision)
    return GraphFormats(produced, required, dict(precisions))


def _codes(scales: TensorScales, tensor: str, precision: Precision, reader: str) -> TensorFormat:
    try:
        return scales[tensor][codes_name(precision)]
    except KeyError:
        raise PrecisionError(
            f"layer {reader} in {precision.name} reads {tensor}, whose {codes_name(precision)} scale is not known: "
            "give calibration data, or that scale in the plan"
        ) from None


def _produced_format(
    layer: Layer, precision: Precision, wanted: list[TensorFormat], scales: TensorScales
) -> TensorFormat:
    if is_transparent(layer):
        return _codes(scales, layer.name, precision, layer.name) if precision.is_integer else float_format(precision)
    floats = [f for f in wanted if not f.is_integer]
    if precision.is_integer:
        if floats or not wanted:
            return FLOAT32_FORMAT
        own = scales.get(layer.name, {})
        # Among codes of one width the tensor's own scale comes first: it fits its range best.
        return max(wanted, key=lambda f: (f.q_max - f.q_min, f in own.values()))
    if isinstance(layer.operator, Opaque):
        return FLOAT32_FORMAT
    if isinstance(layer.operator, (Softmax, GroupNormalization, BiasAdd)) and not floats and len(set(wanted)) == 1:
        # What a conversion would make of its floats, without writing and reading these.
        return wanted[0]
    if len(floats) == len(wanted) and len(set(floats)) == 1:
        return floats[0]
    return FLOAT32_FORMAT
