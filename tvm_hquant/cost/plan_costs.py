"""What whole plans cost, and the model of it that an integer program can minimize.

=============  =====================================================================================================
objective      cost of a plan
=============  =====================================================================================================
``latency``    microseconds of one core: every layer in its precision, and every conversion between formats; layers with
               weights as measured, where times were given, all others as the target spec predicts
``size``       bytes of all weights with their scales and biases
``macs``       multiply-accumulates, each counted by its widths: activation bits · weight bits / 64, so that one in 8
               bits counts 1 (bit operations of Baskin et al., arXiv 1804.10969, over 64)
=============  =====================================================================================================

What a layer costs depends on its neighbours, since formats follow from who reads a tensor. The model is the expansion of the
exact cost to second order around the plan in which every layer has its first candidate: what changing one layer adds, and
what changing two neighbours adds beyond both. Neighbours are a layer and those that read what it makes, through layers
without weights, and layers that read one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from itertools import pairwise
from typing import TypeVar

from tvm_hquant.cost.predicted import predicted_cycles, weight_bytes
from tvm_hquant.errors import SearchError
from tvm_hquant.formats import assign_formats, codes_name
from tvm_hquant.layers import Layer, LayerGraph
from tvm_hquant.operators import Movement
from tvm_hquant.precision import Precision, parse_precision
from tvm_hquant.search.problem import Assignment, CostModel, LayerPrecision
from tvm_hquant.session import QuantizationSession
from tvm_hquant.tensor_format import float_format

OBJECTIVES = ("latency", "size", "macs")
_Key = TypeVar("_Key")
_Value = TypeVar("_Value", covariant=True)


def plan_costs(
    session: QuantizationSession,
    candidates: Mapping[str, tuple[str, ...]],
    objective: str,
    measured: Mapping[LayerPrecision, float] | None = None,
    stored_bits: int | None = None,
) -> CostModel:
    """The cost model of all plans that can be made of the candidates.

    Args:
        measured: times in microseconds of layers with weights, for ``latency``; those that are not in it are predicted.
        stored_bits: of all weights in the artifact, where a precision has more: they count for ``size``.

    Raises:
        SearchError: there is no such objective.
    """
    if objective == "latency":
        return _expanded(session, candidates, _Latency(session, measured or {}))
    layers = session.graph.by_name
    if objective == "size":
        return CostModel(
            {
                (n, p): weight_bytes(layers[n], _as_stored(parse_precision(p), stored_bits))
                for n, ps in candidates.items()
                for p in ps
            }
        )
    if objective == "macs":
        return CostModel(
            {(n, p): weighted_macs(layers[n], parse_precision(p)) for n, ps in candidates.items() for p in ps}
        )
    raise SearchError(f"unknown objective {objective!r}: use one of {', '.join(OBJECTIVES)}")


def _as_stored(precision: Precision, bits: int | None) -> Precision:
    """The precision that weights take the bytes of if they are stored in at most so many bits."""
    if bits is None or precision.weight_bits <= bits:
        return precision
    return precision.computed.with_stored_weights(bits)


def weighted_macs(layer: Layer, precision: Precision) -> float:
    """Multiply-accumulates of a layer in units of 8 × 8 bits. Weights that are only stored in few bits count as float32."""
    computed = precision.computed
    weight_bits = computed.weight_bits if computed.activation_bits < 32 else 32
    return layer.macs * computed.activation_bits * weight_bits / 64


class _Latency:
    """Microseconds of one core for plans of one model."""

    def __init__(self, session: QuantizationSession, measured: Mapping[LayerPrecision, float]) -> None:
        self._session = session
        self._measured = measured
        self._predicted_time = lru_cache(maxsize=None)(self._predicted)

    def of(self, assignment: Assignment) -> float:
        """The time of a whole plan."""
        return self.of_part(assignment, self._session.graph)

    def of_part(self, assignment: Assignment, graph: LayerGraph) -> float:
        """The time of a part of the graph."""
        session = self._session
        anchors = {name: parse_precision(p) for name, p in assignment.items()}
        precisions = session.all_precisions(anchors, part=graph)
        formats = assign_formats(graph, precisions, session.scales(precisions.values()))
        total = sum(self.of_layer(layer.name, precisions[layer.name].name) for layer in graph.layers)
        for conversion in formats.conversions(graph):
            elements = math.prod(graph.tensor_shape(conversion.tensor))
            rate = session.spec.conversion_elements_per_cycle(conversion.source.dtype, conversion.target.dtype)
            total += elements / rate / (1e3 * session.spec.units[0].clock_ghz)
        return total

    def of_layer(self, layer: str, precision: str) -> float:
        """The time of one layer by itself."""
        known = self._measured.get((layer, precision))
        return self._predicted_time(layer, precision) if known is None else known

    def _predicted(self, layer_name: str, precision: str) -> float:
        spec, layer = self._session.spec, self._session.graph.by_name[layer_name]
        if isinstance(layer.operator, Movement) and layer.operator.function == "reshape":
            return 0.0
        computed = parse_precision(precision)
        clock = spec.unit_for(computed.name, layer.operator_kind).clock_ghz
        return predicted_cycles(spec, layer, computed) / (1e3 * clock)


class _Changes:
    """What other precisions of some layers add to the time of a plan; it is enough to look around these layers."""

    def __init__(self, session: QuantizationSession, latency: _Latency, base: Assignment) -> None:
        self._graph, self._latency, self._base = session.graph, latency, base
        self._around = lru_cache(maxsize=None)(self._part)

    def added(self, changes: Assignment) -> float:
        """Microseconds."""
        part, own, time = self._around(tuple(changes))
        return self._latency.of_part({**own, **changes}, part) - time

    def _part(self, names: tuple[str, ...]) -> tuple[LayerGraph, Assignment, float]:
        part = self._graph.around(names)
        own = {layer.name: self._base[layer.name] for layer in part.anchors}
        return part, own, self._latency.of_part(own, part)


def _expanded(session: QuantizationSession, candidates: Mapping[str, tuple[str, ...]], latency: _Latency) -> CostModel:
    """The model, whose parts are computed when they are read: who knows what to ask for needs the exact cost alone."""
    base = {layer: precisions[0] for layer, precisions in candidates.items()}
    changes = _Changes(session, latency, base)
    own = {layer: latency.of_layer(layer, precision) for layer, precision in base.items()}

    @cache
    def added() -> dict[LayerPrecision, float]:
        return {
            (n, p): changes.added({n: p}) if p != base[n] else 0.0
            for n, precisions in candidates.items()
            for p in precisions
        }

    def layers() -> dict[LayerPrecision, float]:
        return {(n, p): own[n] + more for (n, p), more in added().items()}

    def pairs() -> dict[tuple[str, str], dict[tuple[str, str], float]]:
        both = [pair for pair in neighbours(session.graph) if all(name in candidates for name in pair)]
        found = {pair: _pair(base, *pair, candidates, added(), changes.added) for pair in both}
        return {pair: extra for pair, extra in found.items() if extra}

    return CostModel(_Computed(layers), _Computed(pairs), latency.of(base) - sum(own.values()), latency.of)


class _Computed(Mapping[_Key, _Value]):
    """A mapping that is computed when something is read of it for the first time."""

    def __init__(self, compute: Callable[[], Mapping[_Key, _Value]]) -> None:
        self._content = cache(compute)

    def __getitem__(self, key: _Key) -> _Value:
        return self._content()[key]

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._content())

    def __len__(self) -> int:
        return len(self._content())


def _pair(
    base: Assignment,
    first: str,
    second: str,
    candidates: Mapping[str, tuple[str, ...]],
    added: Mapping[LayerPrecision, float],
    added_by: Callable[[Assignment], float],
) -> dict[tuple[str, str], float]:
    """What two layers cost beyond what each adds alone, where it is not 0."""
    known: dict[tuple[str, str], float] = {}
    extra: dict[tuple[str, str], float] = {}
    for p in candidates[first]:
        for q in candidates[second]:
            # It depends on the formats of their activations alone.
            kinds = (_format_kind(p), _format_kind(q))
            if kinds[0] == _format_kind(base[first]) or kinds[1] == _format_kind(base[second]):
                continue
            if kinds not in known:
                known[kinds] = added_by({first: p, second: q}) - added[first, p] - added[second, q]
            if abs(known[kinds]) > 1e-9:
                extra[p, q] = known[kinds]
    return extra


def _format_kind(precision: str) -> str:
    parsed = parse_precision(precision)
    return codes_name(parsed) if parsed.is_integer else float_format(parsed).dtype


def neighbours(graph: LayerGraph) -> list[tuple[str, str]]:
    """Pairs of layers with weights whose precisions meet: (maker, reader), and layers that read one tensor, in order."""
    makers: dict[str, dict[str, None]] = {name: {name: None} for name in graph.inputs}
    readers: dict[str, dict[str, None]] = {}
    for layer in graph.layers:
        found = {maker: None for tensor in layer.inputs for maker in makers[tensor]}
        makers[layer.name] = {layer.name: None} if layer.is_anchor else found
        if layer.is_anchor:
            for maker in found:
                readers.setdefault(maker, {})[layer.name] = None
    pairs: dict[tuple[str, str], None] = {}
    for maker, names in readers.items():
        if maker not in graph.inputs:
            pairs.update(dict.fromkeys((maker, name) for name in names))
        pairs.update(dict.fromkeys(pairwise(names)))
    return list(pairs)
