"""Names, shapes and dtypes of what goes into a model and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx

from tvm_hquant.errors import ModelError
from tvm_hquant.layers import INPUTS_ATTRIBUTE, OUTPUTS_ATTRIBUTE
from tvm_hquant.relax_ir.main_function import INPUT_COUNT_ATTRIBUTE


@dataclass(frozen=True)
class TensorSignature:
    """One input or output: the model's name for it, its shape, and its dtype as NumPy calls it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def input_signature(mod: IRModule) -> tuple[TensorSignature, ...]:
    """The inputs of an imported module, in the order in which ``main`` takes them."""
    main = mod["main"]
    names = _names(main, INPUTS_ATTRIBUTE)
    count = int(main.attrs[INPUT_COUNT_ATTRIBUTE]) if INPUT_COUNT_ATTRIBUTE in main.attrs else len(main.params)
    return tuple(_signature(n, p.ty) for n, p in zip(names, list(main.params)[:count], strict=True))


def output_signature(mod: IRModule) -> tuple[TensorSignature, ...]:
    """The outputs of an imported module, in the order in which ``main`` returns them."""
    main = mod["main"]
    types = list(main.ret_ty.fields) if isinstance(main.ret_ty, relax.TupleType) else [main.ret_ty]
    return tuple(_signature(n, t) for n, t in zip(_names(main, OUTPUTS_ATTRIBUTE), types, strict=True))


def static_shape(ty: Any) -> tuple[int, ...] | None:
    """The shape of a tensor type, None where it is no tensor or not known before running."""
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        return None
    dimensions = list(ty.shape)
    return tuple(int(d) for d in dimensions) if all(isinstance(d, tirx.IntImm) for d in dimensions) else None


def _names(main: Any, attribute: str) -> list[str]:
    if not main.attrs or attribute not in main.attrs:
        raise ModelError(f'main has no attribute "{attribute}": bring the module in with import_onnx or import_relax')
    return [str(n) for n in main.attrs[attribute]]


def _signature(name: str, ty: Any) -> TensorSignature:
    shape = static_shape(ty)
    if shape is None:
        raise ModelError(f"{name} is not one tensor of fixed shape: import the model with input_shapes")
    return TensorSignature(name, shape, str(ty.dtype))
