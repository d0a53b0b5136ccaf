"""Operators and formats as JSON text and back: how they ride in function attributes and in files."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tvm_hquant import operators, tensor_format
from tvm_hquant.kernels import interface

_CLASSES: dict[str, type[Any]] = {
    c.__name__: c
    for c in (
        operators.Window, operators.Epilogue, operators.Conv2D, operators.Dense, operators.Add, operators.BiasAdd,
        operators.Multiply, operators.BatchMatmul, operators.MaxPool2D, operators.AveragePool2D, operators.Resize2D,
        operators.Concat, operators.Unary, operators.Composition, operators.Step, operators.Movement, operators.Softmax,
        operators.LocalResponseNormalization, operators.GroupNormalization, operators.Opaque, operators.Convert,
        tensor_format.TensorFormat, interface.KernelRequest, interface.Placement,
        interface.Interleaving, interface.ProvenEnding,
    )
}  # fmt: skip


def to_jsonable(value: Any) -> Any:
    """Frozen dataclasses become objects with a ``type`` field, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [to_jsonable(v) for v in value]
    return value


def from_jsonable(value: Any) -> Any:
    """The inverse of :func:`to_jsonable`.

    Raises:
        KeyError: the type is not one of those that are written.
    """
    if isinstance(value, dict):
        fields = {k: from_jsonable(v) for k, v in value.items() if k != "type"}
        return _CLASSES[value["type"]](**fields)
    if isinstance(value, list):
        return tuple(from_jsonable(v) for v in value)
    return value


def encode(value: Any) -> str:
    """JSON text of an operator, a format, a request, or a tuple of them."""
    return json.dumps(to_jsonable(value))


def decode(text: str) -> Any:
    """What :func:`encode` made the text from."""
    return from_jsonable(json.loads(text))
