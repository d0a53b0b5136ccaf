"""Stage 5: explicit conversions where two precisions meet, and nowhere else.

Before (``conv1`` is annotated a8w8, ``conv2`` float32; all tensors are still float32)::

    def main(x):
        lv = cls.conv1(x)
        lv1 = cls.conv2(lv)

After::

    @R.function(private=True)
    def conv1(x: uint8):                       # says which codes flow in and out…
        x_real = (x.astype("float32") - 128) * 0.02
        ...                                    # …and still, in real numbers, what it computes
        return lv3                             # float32, because conv2 reads that

    @R.function(private=True)
    def x_to_uint8(x: float32):                # hquant.operator: Convert
        return clip(round(x / 0.02), -128, 127) + 128

    def main(x):
        lv = cls.x_to_uint8(x)
        lv1 = cls.conv1(lv)
        lv2 = cls.conv2(lv1)

Layers without weights took the precision of their readers before (:func:`tvm_hquant.formats.follow_consumers`), which is
how conversions get pushed through pools, reshapes and concatenations; one tensor is converted once for all its readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import IRModule, relax

from tvm_hquant.formats import Conversion, GraphFormats, TensorScales, assign_formats
from tvm_hquant.layers import (
    FORMATS_ATTRIBUTE,
    LAYER_ATTRIBUTE,
    OPERATOR_ATTRIBUTE,
    PRECISION_ATTRIBUTE,
    LayerGraph,
    read_layers,
)
from tvm_hquant.operator_codec import encode
from tvm_hquant.operators import Convert, Shape
from tvm_hquant.precision import parse_precision
from tvm_hquant.relax_ir.relax_functions import emit_bindings, rebuild_main
from tvm_hquant.tensor_format import FLOAT32_FORMAT, TensorFormat


def insert_casts(scales: TensorScales) -> Any:
    """The pass. ``scales`` are those of the plan; precisions are read from the functions' attributes.

    Raises (when run):
        PrecisionError: a layer reads codes of a tensor that has no scale.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        graph = read_layers(mod)
        precisions = {
            layer.name: parse_precision(str(mod[layer.function_name].attrs[PRECISION_ATTRIBUTE]))
            for layer in graph.layers
        }
        formats = assign_formats(graph, precisions, scales)
        return rebuild_main(
            relax.BlockBuilder(), mod, graph, _functions(mod, graph, formats), _plan_calls(graph, formats)
        )

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.insert_casts")


def _functions(mod: IRModule, graph: LayerGraph, formats: GraphFormats) -> dict[str, Any]:
    functions: dict[str, Any] = {}
    for layer in graph.layers:
        inputs = tuple(formats.required[layer.name, i] for i in range(len(layer.inputs)))
        functions[layer.name] = _layer_with_formats(mod[layer.function_name], inputs, formats.produced[layer.name])
    for conversion in formats.conversions(graph):
        name = conversion.name
        functions[name] = _conversion_function(name, graph.tensor_shape(conversion.tensor), conversion)
    return functions


def _plan_calls(graph: LayerGraph, formats: GraphFormats) -> list[tuple[str, tuple[str, ...]]]:
    """(layer, tensors that it reads) in execution order, conversions before their first reader."""
    calls: list[tuple[str, tuple[str, ...]]] = []
    made: set[str] = set()

    def converted(tensor: str, wanted: TensorFormat) -> str:
        source = formats.produced[tensor]
        if source == wanted:
            return tensor
        name = Conversion(tensor, source, wanted).name
        if name not in made:
            made.add(name)
            calls.append((name, (tensor,)))
        return name

    for layer in graph.layers:
        arguments = tuple(converted(t, formats.required[layer.name, i]) for i, t in enumerate(layer.inputs))
        calls.append((layer.name, arguments))
    outputs = tuple(converted(tensor, FLOAT32_FORMAT) for tensor in graph.outputs)
    return [*calls, ("", outputs)]


def _layer_with_formats(function: Any, inputs: Sequence[TensorFormat], output: TensorFormat) -> Any:
    attributes = {**dict(function.attrs), FORMATS_ATTRIBUTE: encode((tuple(inputs), output))}
    builder = relax.BlockBuilder()
    parameters = [relax.Var(p.name, _stored_type(p.ty, f)) for p, f in zip(function.params, inputs, strict=True)]
    with builder.function("layer", parameters, attributes, private=True):
        with builder.dataflow():
            real = [_emit_real(builder, p, f) for p, f in zip(parameters, inputs, strict=True)]
            value = emit_bindings(builder, function, real)
            result = builder.emit_output(_emit_stored(builder, value, output))
        builder.emit_func_output(result)
    return builder.finalize()["layer"]


def _stored_type(ty: Any, stored: TensorFormat) -> Any:
    if stored == FLOAT32_FORMAT:
        # Between operators that only TVM computes, tensors may be of other types, such as conditions and indices.
        return ty
    return relax.TensorType([int(d) for d in ty.shape], stored.storage if stored.is_integer else stored.dtype)


def _conversion_function(name: str, shape: Shape, conversion: Conversion) -> Any:
    attributes = {
        LAYER_ATTRIBUTE: name,
        OPERATOR_ATTRIBUTE: encode(Convert(shape)),
        PRECISION_ATTRIBUTE: conversion.kind,
        FORMATS_ATTRIBUTE: encode(((conversion.source,), conversion.target)),
    }
    source = conversion.source
    parameter = relax.Var("x", relax.TensorType(list(shape), source.storage if source.is_integer else source.dtype))
    builder = relax.BlockBuilder()
    with builder.function("layer", [parameter], attributes, private=True):
        with builder.dataflow():
            real = _emit_real(builder, parameter, source)
            result = builder.emit_output(_emit_stored(builder, real, conversion.target))
        builder.emit_func_output(result)
    return builder.finalize()["layer"]


def _emit_real(builder: relax.BlockBuilder, value: Any, source: TensorFormat) -> Any:
    """float32 values of what is stored: (code − zero_point) · scale."""
    if source.dtype == "float32":
        return value
    value = builder.emit(relax.op.astype(value, "float32"))
    if not source.is_integer:
        return value
    value = builder.emit(relax.op.subtract(value, relax.const(float(source.storage_zero_point), "float32")))
    return builder.emit(relax.op.multiply(value, relax.const(source.scale, "float32")))


def _emit_stored(builder: relax.BlockBuilder, value: Any, target: TensorFormat) -> Any:
    """What is stored of float32 values: clamp(round(x / scale)) + zero_point."""
    if target.dtype == "float32":
        return value
    if not target.is_integer:
        return builder.emit(relax.op.astype(value, target.dtype))
    value = builder.emit(relax.op.divide(value, relax.const(target.scale, "float32")))
    value = builder.emit(relax.op.round(value))
    lower, upper = target.q_min - target.zero_point, target.q_max - target.zero_point
    value = builder.emit(relax.op.clip(value, lower, upper))
    value = builder.emit(relax.op.add(value, relax.const(float(target.storage_zero_point), "float32")))
    return builder.emit(relax.op.astype(value, target.storage))
