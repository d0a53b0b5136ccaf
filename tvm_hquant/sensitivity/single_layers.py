"""Plans by which single layers are measured: float32 before the layer, the *suffix precision* behind it.

With s_j the suffix precision of layer j and L the loss of a whole plan, what layer l loses in precision p is

    loss(l, p) = max(0, L(float32 … float32, p, s_(l+1) … s_n) − L(float32 … float32, float32, s_(l+1) … s_n))

With s = float32 the second term is 0: the layer alone has a precision (X. Mao, "Hierarchical Quantization Algorithm for Deep
Learning Network Models", section 3.2, step 1). Nearly all the time that measuring takes goes into the layers behind the
measured one, so a suffix of twice the speed halves it. Every plan can be deployed as it is; in the suffix precision itself the
losses of all layers add up to the loss of the network that has it everywhere, where none had to be raised to 0.

The difference also holds twice the product of both errors, the layer's and the suffix's. They hardly correlate, so over samples
that is noise, but noise that grows with the suffix's error: 16-bit suffixes tell 8-bit layers apart as well as float32 does,
8-bit ones do not (docs/search.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from tvm_hquant.cost.predicted import predicted_cycles
from tvm_hquant.layers import Layer
from tvm_hquant.precision import FLOAT32, parse_precision
from tvm_hquant.search.problem import Assignment, LayerPrecision
from tvm_hquant.session import QuantizationSession

SUFFIX_PRECISIONS = ("bfloat16", "float16", "a16w8", "a16w16")
"""What may be chosen by itself, beside float32; of equally fast ones the first."""

_WORTH_CHOOSING = 1.25
"""How much faster than float32 a network has to be in a suffix precision that is chosen by itself."""


class SingleLayerPlans:
    """The plans of one network.

    Args:
        layers: names of those with weights, in the order in which they run.
        suffix: what each computes in behind a measured layer; float32 where nothing is said.
    """

    def __init__(self, layers: Sequence[str], suffix: Mapping[str, str] | None = None) -> None:
        self._layers = tuple(layers)
        self._suffix = {layer: (suffix or {}).get(layer, FLOAT32.name) for layer in layers}

    def plan(self, layer: str, precision: str) -> dict[str, str]:
        """The precision of every layer while one is measured."""
        number = self._layers.index(layer)
        behind = {other: self._suffix[other] for other in self._layers[number + 1 :]}
        return {**dict.fromkeys(self._layers[:number], FLOAT32.name), layer: precision, **behind}

    def plans(self, pairs: Iterable[LayerPrecision]) -> list[dict[str, str]]:
        """All that have to be evaluated to measure some pairs, layer by layer; none in which all layers are float32."""
        wanted: dict[str, dict[str, None]] = {}
        for layer, precision in pairs:
            wanted.setdefault(layer, {FLOAT32.name: None})[precision] = None
        found = (self.plan(layer, p) for layer in self._layers if layer in wanted for p in wanted[layer])
        unique = {tuple(plan.values()): plan for plan in found}
        return [plan for values, plan in unique.items() if set(values) != {FLOAT32.name}]

    def losses(
        self, pairs: Iterable[LayerPrecision], evaluate: Callable[[Sequence[Assignment]], Sequence[float]]
    ) -> dict[LayerPrecision, float]:
        """What layers lose, from the losses of plans that ``evaluate`` gives."""
        pairs = list(pairs)
        plans = self.plans(pair for pair in pairs if pair[1] != FLOAT32.name)
        found = zip(plans, evaluate(plans), strict=True) if plans else ()
        known = {tuple(plan.values()): loss for plan, loss in found}

        def loss(layer: str, precision: str) -> float:
            return known.get(tuple(self.plan(layer, precision).values()), 0.0)

        return {
            (layer, p): 0.0 if p == FLOAT32.name else _difference(loss(layer, p), loss(layer, FLOAT32.name))
            for layer, p in pairs
        }


def suffix_precisions(
    session: QuantizationSession, candidates: Mapping[str, Sequence[str]], name: str | None = None
) -> dict[str, str]:
    """What each layer with weights computes in behind a measured one.

    Args:
        session: the model and the target.
        candidates: what each layer may have in a search.
        name: of the precision; layers that cannot have it get float32. None: of the 16-bit candidates the one in which the
            target computes the network fastest, where that is faster than float32 by a quarter, for the layers that may have
            it. The plans of the suffix then are as many as those that a search measures anyway.

    Raises:
        PrecisionError: no precision has that name.
    """
    anchors = session.graph.anchors
    if name is not None:
        given = session.uniform(parse_precision(name))
        return {layer: precision.name for layer, precision in given.items()}

    def precision_of(layer: Layer, wanted: str) -> str:
        return wanted if wanted in candidates[layer.name] else FLOAT32.name

    def cycles(wanted: str) -> float:
        return sum(_cycles(session, layer, precision_of(layer, wanted)) for layer in anchors)

    best = min(SUFFIX_PRECISIONS, key=cycles)
    if not anchors or cycles(best) * _WORTH_CHOOSING > cycles(FLOAT32.name):
        best = FLOAT32.name
    return {layer.name: precision_of(layer, best) for layer in anchors}


def _cycles(session: QuantizationSession, layer: Layer, precision: str) -> float:
    """Of one layer; as many as multiply-accumulates where the target does not offer the precision at all."""
    if session.spec.reason_against(precision, layer.operator_kind, layer.name) is not None:
        return float(layer.macs)
    return predicted_cycles(session.spec, layer, parse_precision(precision))


def _difference(loss: float, without: float) -> float:
    return loss if math.isinf(loss) else max(0.0, loss - without)
