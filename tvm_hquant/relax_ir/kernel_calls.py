"""Layer functions whose body is one kernel call: how realized and lowered modules are written and read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tvm import IRModule, relax
from tvm.ir import GlobalVar
from tvm.runtime import tensor as runtime_tensor

from tvm_hquant.kernel_graph import IN_PLACE
from tvm_hquant.kernels.constant_arrays import from_arrays
from tvm_hquant.kernels.interface import (
    Array,
    FloatElementwiseConstants,
    Kernel,
    KernelFamily,
    KernelRequest,
    LayerConstants,
)
from tvm_hquant.kernels.kernel_function import activation_types
from tvm_hquant.kernels.registry import select_kernel
from tvm_hquant.layers import LAYER_ATTRIBUTE, LayerGraph, constant_array, is_constant
from tvm_hquant.operator_codec import decode, encode
from tvm_hquant.operators import Dense, Movement, Unary
from tvm_hquant.relax_ir.relax_functions import function_identifier, rebuild_main
from tvm_hquant.tensor_format import STORAGE_DTYPE

REQUEST_ATTRIBUTE = "hquant.request"
CONSTANTS_ATTRIBUTE = "hquant.constants"
KERNEL_ATTRIBUTE = "hquant.kernel"
BIT_EXACT_ATTRIBUTE = "hquant.bit_exact"
"""False on layers whose kernel is within a bound of the contract; absent on all others."""


def is_view(request: KernelRequest) -> bool:
    """Whether a request is a reshape, which needs no kernel: the runtime gives the same memory another shape."""
    return isinstance(request.operator, Movement) and request.operator.function == "reshape"


def kernel_symbol(kernel: Kernel) -> str:
    """A stable name for the compiled function of a kernel: equal requests share it."""
    digest = hashlib.sha256(f"{kernel.name}|{encode(kernel.request)}".encode()).hexdigest()[:12]
    return f"{re.sub(r'[^0-9A-Za-z]+', '_', kernel.name).strip('_')}_{digest}"


def kernel_layer_function(
    attributes: Mapping[str, Any],
    shapes: Sequence[Sequence[int]],
    request: KernelRequest,
    constants: LayerConstants,
    kernel: tuple[Kernel, Any] | None,
) -> Any:
    """A private function that calls one kernel.

    ``kernel`` is the kernel with its ``GlobalVar``, or None for a view. The constants are packed for it.
    """
    builder = relax.BlockBuilder()
    storages = request.inputs if request.interleaved is None else (*request.inputs, request.output)
    parameters = [
        relax.Var(f"input_{i}", relax.TensorType(list(shape), STORAGE_DTYPE[storage]))
        for i, (shape, storage) in enumerate(zip(shapes, storages, strict=True))
    ]
    marks: dict[str, Any] = {REQUEST_ATTRIBUTE: encode(request), CONSTANTS_ATTRIBUTE: type(constants).__name__}
    if kernel is not None:
        marks[KERNEL_ATTRIBUTE] = kernel[0].name
        if not kernel[0].is_bit_exact:
            marks[BIT_EXACT_ATTRIBUTE] = False
    output_shape = list(request.output_shape)
    with builder.function("layer", parameters, {**attributes, **marks}, private=True):
        with builder.dataflow():
            if kernel is None:
                value = builder.emit(relax.op.reshape(parameters[0], output_shape))
            else:
                packed = [relax.const(runtime_tensor(a)) for a in kernel[0].pack(constants)]
                output_type = relax.TensorType(output_shape, STORAGE_DTYPE[request.output])
                if request.overwritten is None:
                    call = relax.call_tir(kernel[1], [*parameters, *packed], out_ty=output_type)
                else:
                    others = [p for i, p in enumerate(parameters) if i != request.overwritten]
                    arguments = [*others, *packed, parameters[request.overwritten]]
                    call = relax.op.call_tir_inplace(kernel[1], arguments, len(arguments) - 1, output_type)
                value = builder.emit(call)
            result = builder.emit_output(value)
        builder.emit_func_output(result)
    return builder.finalize()["layer"]


def in_place_function(function: Any) -> Any:
    """A private function that gives back its only argument: the output of a layer that other layers have stored where it
    belongs, or, for a slice, what it lies in."""
    is_alone = len(function.params) == 1
    buffer = relax.Var("buffer", function.params[0].ty if is_alone else function.ret_ty)
    builder = relax.BlockBuilder()
    with builder.function("layer", [buffer], {**dict(function.attrs), KERNEL_ATTRIBUTE: IN_PLACE}, private=True):
        with builder.dataflow():
            result = builder.emit_output(buffer)
        builder.emit_func_output(result)
    return builder.finalize()["layer"]


def read_realized(function: Any) -> tuple[KernelRequest, LayerConstants] | None:
    """Request and constants of a realized layer function; None of one that stays as it is (opaque, float)."""
    if REQUEST_ATTRIBUTE not in function.attrs:
        return None
    request: KernelRequest = decode(str(function.attrs[REQUEST_ATTRIBUTE]))
    arrays = call_constants(function)
    if isinstance(request.operator, Dense):
        # Reference kernels keep the matrix of a dense layer without the axes of a window.
        arrays[0] = arrays[0][..., None, None]
    constants = from_arrays(str(function.attrs[CONSTANTS_ATTRIBUTE]), arrays)
    if isinstance(constants, FloatElementwiseConstants) and isinstance(request.operator, Unary):
        # A function without parameters is stored with one zero, for there are no empty constants.
        constants = FloatElementwiseConstants(constants.parameters[: len(request.operator.parameters)])
    return request, constants


def layers_of_functions(mod: IRModule) -> dict[str, list[str]]:
    """The layers of a lowered module that call each kernel, by the kernel's symbol."""
    found: dict[str, list[str]] = {}
    for _, function in mod.functions_items():
        if not isinstance(function, relax.Function) or KERNEL_ATTRIBUTE not in (function.attrs or {}):
            continue
        for binding in function.body.blocks[0].bindings:
            call = binding.value
            if isinstance(call, relax.Call) and isinstance(call.args[0], GlobalVar):
                found.setdefault(str(call.args[0].name_hint), []).append(str(function.attrs[LAYER_ATTRIBUTE]))
    return found


def call_constants(function: Any) -> list[Array]:
    """The constant arrays that the kernel call of a layer function passes."""
    call = function.body.blocks[0].bindings[0].value
    arguments = call.args[1].fields if len(call.args) > 1 and isinstance(call.args[1], relax.Tuple) else []
    return [constant_array(a) for a in arguments if is_constant(a)]


def with_kernels(
    mod: IRModule,
    graph: LayerGraph,
    realized: Mapping[str, tuple[KernelRequest, LayerConstants] | None],
    families: Sequence[KernelFamily],
    in_place: Collection[str] = (),
    read: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> IRModule:
    """The module with every layer in ``realized`` turned into a call of the kernel that ``families`` have for it.

    Layers whose entry is None keep their body; those ``in_place`` give back what they get. ``read`` are the tensors whose
    buffers layers get, where these are others than in the graph.

    Raises:
        KernelError: no family has a kernel for a request.
    """
    builder = relax.BlockBuilder()
    symbols: dict[KernelRequest, tuple[Kernel, Any]] = {}
    functions: dict[str, Any] = {}
    for layer in graph.layers:
        function = mod[layer.function_name]
        entry = realized[layer.name]
        if layer.name in in_place:
            functions[layer.name] = in_place_function(function)
            continue
        if entry is None:
            # Public, so that it stays a function of its own: verification calls it by name.
            functions[layer.name] = function.with_attr("global_symbol", function_identifier(layer.name))
            continue
        request, constants = entry
        of_kernel = (KERNEL_ATTRIBUTE, BIT_EXACT_ATTRIBUTE)
        attributes = {k: v for k, v in dict(function.attrs).items() if k not in of_kernel}
        if not is_view(request) and request not in symbols:
            kernel = select_kernel(families, request)
            symbol = kernel_symbol(kernel)
            symbols[request] = (kernel, builder.add_func(kernel.function.with_attr("global_symbol", symbol), symbol))
        shapes = [tuple(int(d) for d in p.ty.shape) for p in function.params]
        if not request.has_own_buffers:
            shapes = [shape for shape, _ in activation_types(request)]
        functions[layer.name] = kernel_layer_function(attributes, shapes, request, constants, symbols.get(request))
    calls = [(layer.name, read.get(layer.name, layer.inputs)) for layer in graph.layers]
    return rebuild_main(builder, mod, graph, functions, [*calls, ("", graph.outputs)])
