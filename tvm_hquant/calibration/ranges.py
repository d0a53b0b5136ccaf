"""From observed activations to a format for every tensor: scales, zero points, and who shares them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tvm_hquant import numerics
from tvm_hquant.calibration.input_moments import InputMoments
from tvm_hquant.calibration.observers import MinMaxObserver
from tvm_hquant.formats import codes_name, is_transparent
from tvm_hquant.layers import Layer, LayerGraph
from tvm_hquant.operators import Concat
from tvm_hquant.precision import Precision
from tvm_hquant.tensor_format import TensorFormat, code_limits

_SHARED_RANGE_RATIO = 0.5
"""A tensor that others read too shares the scale of a concatenation if its range fills at least this part of it."""


@dataclass(frozen=True, eq=False)
class CalibratedRanges:
    """Observers of all tensors after one pass over the calibration data.

    Attributes:
        observers: one per tensor.
        groups: tensors that share one scale; every tensor is in at most one.
        input_moments: for layers with weights, the moments of what they read.
        samples: how many samples were observed.
    """

    observers: Mapping[str, MinMaxObserver]
    groups: tuple[tuple[str, ...], ...]
    input_moments: Mapping[str, InputMoments]
    samples: int

    def scales(self, precisions: Iterable[Precision]) -> dict[str, dict[str, TensorFormat]]:
        """For every tensor its format in the codes of each integer precision."""
        leaders = {name: group[0] for group in self.groups for name in group}
        wanted = {codes_name(p): p for p in precisions if p.is_integer}
        made: dict[tuple[str, str], TensorFormat] = {}
        result: dict[str, dict[str, TensorFormat]] = {}
        for name in self.observers:
            leader = leaders.get(name, name)
            for codes, precision in wanted.items():
                if (leader, codes) not in made:
                    _, q_min, q_max = code_limits(precision)
                    lower, upper = self.observers[leader].range(q_min, q_max, precision.symmetric)
                    made[leader, codes] = numerics.activation_format(lower, upper, precision)
                result.setdefault(name, {})[codes] = made[leader, codes]
        return result

    def largest_magnitude(self, tensor: str) -> float:
        """The largest absolute value seen in a tensor."""
        lower, upper = extent(self.observers[tensor])
        return max(-lower, upper)


def extent(observer: MinMaxObserver) -> tuple[float, float]:
    """The lowest and the highest value that an observer has seen, 0 included."""
    return float(observer.lower[0]), float(observer.upper[0])


def same_scale_groups(graph: LayerGraph, observers: Mapping[str, MinMaxObserver]) -> tuple[tuple[str, ...], ...]:
    """Groups of tensors that share a scale, the one with the widest range first.

    Pools, reshapes and the like pass codes through, so their input and output share one. A concatenation shares its scale
    with an input that nothing else reads, whose producer then writes it directly; an input with other readers keeps a
    scale of its own where sharing would cost it more than one bit (DenseNet), and is requantized for the concatenation.
    """
    parent = {name: name for name in observers}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    def width(name: str) -> float:
        lower, upper = extent(observers[name])
        return upper - lower

    for layer in graph.layers:
        if not is_transparent(layer):
            continue
        for tensor in layer.inputs:
            if not isinstance(layer.operator, Concat) or _joins(graph, layer, tensor, width(tensor), width(layer.name)):
                parent[root(tensor)] = root(layer.name)
    joined = {layer.name for layer in graph.layers if isinstance(layer.operator, Concat)}
    members: dict[str, list[str]] = {}
    for name in observers:
        members.setdefault(root(name), []).append(name)
    # A concatenation has seen all values of its group, so it speaks for it where ranges are equally wide.
    return tuple(
        tuple(sorted(group, key=lambda name: (-width(name), name not in joined)))
        for group in members.values()
        if len(group) > 1
    )


def _joins(graph: LayerGraph, layer: Layer, tensor: str, own: float, joined: float) -> bool:
    readers = {name for name, _ in graph.consumers[tensor]}
    if readers == {layer.name} and tensor not in graph.inputs and tensor not in graph.outputs:
        return True
    return own >= _SHARED_RANGE_RATIO * joined
