"""Stage 7, second half: kernels write into the buffer of a concatenation themselves.

Before::

    def main(x):
        lv = cls.expand1x1(x)              # call_tir(cls.avx2_conv2d_…, (x, …), out (1, 55, 55, 64))
        lv1 = cls.expand3x3(x)
        lv2 = cls.concat_0(lv, lv1)        # call_tir(cls.common_concat_…, (lv, lv1), out (1, 55, 55, 128))

After::

    def main(x):
        lv = cls.expand1x1(x)              # call_tir(cls.avx2_conv2d_…, (x, …), out (1, 55, 55, 128)): channels 0 … 63
        lv1 = cls.expand3x3(x, lv)         # call_tir_inplace(cls.avx2_conv2d_…, (x, …, lv), 5): channels 64 … 127 of lv
        lv2 = cls.concat_0(lv1)            # lv1

A tensor that others read, too, or whose kernel cannot write in place, is made by itself and copied into the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import IRModule, relax

from tvm_hquant.concat_parts import ConcatPart, find_concat_parts, part_name
from tvm_hquant.kernel_graph import IN_PLACE, KernelCall
from tvm_hquant.kernels.interface import Kernel, KernelFamily
from tvm_hquant.kernels.kernel_function import activation_types
from tvm_hquant.layers import LAYER_ATTRIBUTE, OPERATOR_ATTRIBUTE, LayerGraph, read_layers
from tvm_hquant.operator_codec import decode, encode
from tvm_hquant.relax_ir.kernel_calls import (
    KERNEL_ATTRIBUTE,
    REQUEST_ATTRIBUTE,
    call_constants,
    in_place_function,
    kernel_symbol,
)
from tvm_hquant.relax_ir.relax_functions import rebuild_main
from tvm_hquant.tensor_format import STORAGE_DTYPE


def write_concat_in_place(families: Sequence[KernelFamily]) -> Any:
    """The pass. It needs a lowered module; ``families`` are the kernel families of the target, the best first."""

    def transform(mod: IRModule, _context: Any) -> IRModule:
        graph = read_layers(mod)
        calls = [KernelCall(layer.name, _request(mod, layer.function_name), layer.inputs) for layer in graph.layers]
        parts = find_concat_parts(calls, graph.outputs, families)
        return _Rewriter(mod, graph, parts).module() if parts else mod

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.write_concat_in_place")


def _request(mod: IRModule, function_name: str) -> Any:
    attributes = mod[function_name].attrs
    is_name = KERNEL_ATTRIBUTE in attributes and attributes[KERNEL_ATTRIBUTE] == IN_PLACE
    return decode(str(attributes[REQUEST_ATTRIBUTE])) if REQUEST_ATTRIBUTE in attributes and not is_name else None


class _Rewriter:
    def __init__(self, mod: IRModule, graph: LayerGraph, parts: Any) -> None:
        self.mod, self.graph, self.parts = mod, graph, parts
        self.builder = relax.BlockBuilder()
        self.symbols: dict[str, Any] = {}
        self.functions: dict[str, Any] = {}
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.buffers: dict[str, str] = {}
        """For each concatenation, the layer that wrote into its buffer last."""

    def module(self) -> IRModule:
        placed = {
            part.tensor: (concat, part) for concat, parts in self.parts.items() for part in parts if not part.is_copy
        }
        for layer in self.graph.layers:
            function = self.mod[layer.function_name]
            if layer.name in placed:
                concat, part = placed[layer.name]
                self._write(layer.name, layer.inputs, concat, part, dict(function.attrs), call_constants(function))
            elif layer.name in self.parts:
                self._join(layer.name, function)
            else:
                self.functions[layer.name] = function
                self.calls.append((layer.name, layer.inputs))
        self.calls.append(("", self.graph.outputs))
        return rebuild_main(self.builder, self.mod, self.graph, self.functions, self.calls)

    def _join(self, concat: str, function: Any) -> None:
        """Copies what is not in the buffer yet; the concatenation itself becomes a name for the buffer."""
        for number, part in enumerate(self.parts[concat]):
            if part.is_copy:
                name = part_name(concat, number)
                attributes = {LAYER_ATTRIBUTE: name, OPERATOR_ATTRIBUTE: encode(part.kernel.request.operator)}
                self._write(name, (part.tensor,), concat, part, attributes, [])
        self.functions[concat] = in_place_function(function)
        self.calls.append((concat, (self.buffers[concat],)))

    def _write(
        self,
        name: str,
        inputs: tuple[str, ...],
        concat: str,
        part: ConcatPart,
        attributes: dict[str, Any],
        constants: Sequence[Any],
    ) -> None:
        """A layer that writes its part; the first one makes the buffer, the others get it."""
        request = part.kernel.request
        before = None if part.makes_buffer else self.buffers[concat]
        self.buffers[concat] = name
        operands = [
            relax.Var(f"input_{i}", _tensor(shape, dtype)) for i, (shape, dtype) in enumerate(activation_types(request))
        ]
        output = _tensor(request.output_shape, STORAGE_DTYPE[request.output])
        buffer = [relax.Var("buffer", output)] if before is not None else []
        marks = {REQUEST_ATTRIBUTE: encode(request), KERNEL_ATTRIBUTE: part.kernel.name}
        packed = [relax.const(tvm.runtime.tensor(array)) for array in constants]
        arguments = [*operands, *packed, *buffer]
        builder = relax.BlockBuilder()
        with builder.function("layer", [*operands, *buffer], {**attributes, **marks}, private=True):
            with builder.dataflow():
                symbol = self._symbol(part.kernel)
                if before is None:
                    value = builder.emit(relax.call_tir(symbol, arguments, out_ty=output))
                else:
                    value = builder.emit(relax.op.call_tir_inplace(symbol, arguments, len(arguments) - 1, output))
                result = builder.emit_output(value)
            builder.emit_func_output(result)
        self.functions[name] = builder.finalize()["layer"]
        self.calls.append((name, (*inputs, before) if before is not None else inputs))

    def _symbol(self, kernel: Kernel) -> Any:
        name = kernel_symbol(kernel)
        if name not in self.symbols:
            function = kernel.function.with_attr("global_symbol", name)
            self.symbols[name] = self.builder.add_func(function, name)
        return self.symbols[name]


def _tensor(shape: Sequence[int], dtype: str) -> Any:
    return relax.TensorType(list(shape), dtype)
