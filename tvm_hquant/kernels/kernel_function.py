"""The TIR function around a kernel's body, and the shapes of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.interface import KernelRequest, Placement
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    BatchMatmul,
    Concat,
    Conv2D,
    Dense,
    MaxPool2D,
    Movement,
    Multiply,
    Opaque,
    Operator,
    Resize2D,
    Shape,
)
from tvm_hquant.tensor_format import STORAGE_DTYPE

Buffer = Any
"""A TIR buffer."""

ArrayType = tuple[Shape, str]
"""Shape and dtype of an argument."""

Emit = Callable[[Sequence[Buffer], Sequence[Buffer], Buffer], None]
"""Writes a function's body, given its input, constant and output buffers."""


def input_shapes(operator: Operator) -> tuple[Shape, ...]:
    """Shapes of the activations that an operator reads, in order; a fused residual last."""
    match operator:
        case Conv2D() | Dense():
            return (operator.input_shape, *((operator.output_shape,) if operator.epilogue.has_residual else ()))
        case Add():
            return operator.shape, operator.shape
        case Concat() | Multiply() | BatchMatmul() | Opaque():
            return operator.input_shapes
        case MaxPool2D() | AveragePool2D() | Resize2D() | Movement():
            return (operator.input_shape,)
        case _:
            return (operator.shape,)


def input_place(request: KernelRequest, number: int) -> Placement:
    """Where the channels of an input lie in the buffer that the kernel gets for it."""
    placement = request.sources[number] if request.sources else None
    return placement or Placement(0, input_shapes(request.operator)[number][-1])


def interleaved_place(request: KernelRequest) -> Placement:
    """Where the channels of the tensor that is stored in turns with the output lie in its buffer."""
    source = request.interleaved.source if request.interleaved is not None else None
    return source or Placement(0, request.operator.output_shape[-1])


def activation_types(request: KernelRequest) -> list[ArrayType]:
    """Types of the activations that a kernel reads: the operator's in order, then what it stores in turns with its output.

    Raises:
        KernelError: the request names more or fewer storages than the operator reads.
    """
    shapes = input_shapes(request.operator)
    if len(shapes) != len(request.inputs):
        raise KernelError(
            f"{request.operator} reads {len(shapes)} tensors, but the request names {len(request.inputs)} storages: "
            "give one for each, a fused residual last"
        )
    if request.sources:
        shapes = tuple((*shape[:-1], input_place(request, number).channels) for number, shape in enumerate(shapes))
    types: list[ArrayType] = [
        (shape, STORAGE_DTYPE[storage]) for shape, storage in zip(shapes, request.inputs, strict=True)
    ]
    if request.interleaved is not None:
        shape = request.operator.output_shape
        types.append(((*shape[:-1], interleaved_place(request).channels), STORAGE_DTYPE[request.output]))
    return types


def argument_types(request: KernelRequest) -> tuple[list[ArrayType], ArrayType]:
    """Types of the activations of a request, but for one that the output is written over, and of its output.

    Raises:
        KernelError: the request names more or fewer storages than the operator reads.
    """
    inputs = activation_types(request)
    output = request.output_shape, STORAGE_DTYPE[request.output]
    if request.overwritten is not None and inputs.pop(request.overwritten) != output:
        raise KernelError(f"{request.operator} cannot be written over an input of another shape or storage")
    return inputs, output


def imported_functions(definitions: str) -> Any:
    """A scope whose statements may call functions defined in LLVM's language; an empty text defines none."""
    return T.attr(0, "pragma_import_llvm", definitions) if definitions else nullcontext()


def kernel_function(request: KernelRequest, constants: Sequence[ArrayType], emit: Emit) -> Any:
    """The TIR function of a request: arguments (inputs…, constants…, output), body written by ``emit``.

    An input that the output is written over is no argument; ``emit`` gets the output's buffer for it.
    """
    input_types, output_type = argument_types(request)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        inputs = [T.arg(f"input_{i}", T.buffer(shape, dtype)) for i, (shape, dtype) in enumerate(input_types)]
        arrays = [T.arg(f"constant_{i}", T.buffer(shape, dtype)) for i, (shape, dtype) in enumerate(constants)]
        output = T.arg("output", T.buffer(*output_type))
        T.func_attr({"tirx.noalias": True})
        if request.overwritten is not None:
            inputs.insert(request.overwritten, output)
        emit(inputs, arrays, output)
    return builder.get()
