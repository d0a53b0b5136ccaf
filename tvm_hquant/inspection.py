"""Which precisions each layer may have on a target, and why not others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm_hquant.errors import PrecisionError
from tvm_hquant.formats import is_float_only
from tvm_hquant.layers import Layer
from tvm_hquant.precision import REALIZED, Precision, parse_precision
from tvm_hquant.session import QuantizationSession


@dataclass(frozen=True)
class InspectedLayer:
    """One layer. ``refused`` groups the names of precisions by the reason against them."""

    name: str
    operator: str
    output_shape: tuple[int, ...]
    allowed: tuple[str, ...]
    refused: Mapping[str, tuple[str, ...]]


def inspect_layers(session: QuantizationSession) -> tuple[InspectedLayer, ...]:
    """Every layer of the model, without any data: what calibration would still rule out is not known yet."""
    return tuple(_inspect(session, layer) for layer in session.graph.layers)


def _inspect(session: QuantizationSession, layer: Layer) -> InspectedLayer:
    allowed: list[str] = []
    refused: dict[str, list[str]] = {}
    names = REALIZED if layer.is_anchor else ("a8w8", "int8", "a16w8", "float16", "bfloat16", "float32")
    for name in names:
        why = _reason(session, layer, parse_precision(name))
        if why is None:
            allowed.append(name)
        else:
            refused.setdefault(why, []).append(name)
    kind = layer.operator_kind
    if kind == "opaque":
        kind = f"opaque ({getattr(layer.operator, 'name', '')})"
    reasons = {why: tuple(n) for why, n in refused.items()}
    return InspectedLayer(layer.name, kind, layer.operator.output_shape, tuple(allowed), reasons)


def _reason(session: QuantizationSession, layer: Layer, precision: Precision) -> str | None:
    against = session.spec.reason_against(precision.name, layer.operator_kind, layer.name)
    if against is not None:
        return against
    if not layer.is_anchor:
        if precision.name != "float32" and is_float_only(layer, precision):
            return "no kernel: computed in float32"
        return None
    try:
        session.layer_weights(layer, precision)
    except PrecisionError as error:
        return f"no kernel: {error}"
    return None
