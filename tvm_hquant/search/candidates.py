"""Which precisions a search may give each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property

from tvm_hquant.cost.predicted import predicted_cycles, weight_bytes
from tvm_hquant.errors import PrecisionError
from tvm_hquant.layers import Layer
from tvm_hquant.precision import FLOAT32, Precision, parse_precision
from tvm_hquant.session import QuantizationSession, Refusal

HIERARCHY: tuple[str, ...] = ("a8w8", "int8", "a16w8", "float16", "bfloat16", "a16w16", "float32")
"""The precisions that every search chooses from by default, where the target offers them."""

_STARTS = ("a8w8", "int8")
"""What searches start from."""

_NARROW = tuple(f"a8w{bits}" for bits in range(7, 1, -1))


def precisions_to_search(session: QuantizationSession, objective: str) -> tuple[str, ...]:
    """The default: the hierarchy, and narrower weights where they make something cheaper.

    For ``latency`` those that some operator computes faster than wider ones; for ``size`` and ``macs`` all.
    """
    if objective != "latency":
        return (*HIERARCHY, *_NARROW)
    spec = session.spec
    kinds = {layer.operator_kind for layer in session.graph.anchors}
    faster: list[str] = []
    best = dict.fromkeys(kinds, 0.0)
    for name in ("a8w8", *_NARROW):
        offered = {kind: spec.macs_per_cycle(name, kind) for kind in kinds if spec.reason_against(name, kind) is None}
        if name != "a8w8" and any(rate > best[kind] for kind, rate in offered.items()):
            faster.append(name)
        best.update({kind: max(best[kind], rate) for kind, rate in offered.items()})
    return (*HIERARCHY, *faster)


class CandidateRules:
    """Candidates of layers under what the target offers and the user wants.

    Args:
        precisions: names to choose from. Given by the user, all of them are meant, the cheapest first; by default the search
            starts from 8 bits.
        fixed: precisions fixed by the user, for layers by name or pattern.
        objective: what is minimized.
        keep_all: whether to keep precisions that cannot make a layer faster, since each has to go to some layers.

    For latency a layer may not have what the target computes no faster than something more exact: weights of fewer bits than
    others of the same speed, and, unless the user names precisions, anything as slow as float32: less has to be measured.
    What the user names although it is faster nowhere stays.
    """

    def __init__(
        self,
        session: QuantizationSession,
        precisions: Sequence[str] | None = None,
        fixed: Mapping[str, str] | None = None,
        objective: str = "latency",
        keep_all: bool = False,
    ) -> None:
        self._session = session
        self._given = precisions is not None
        names = precisions if precisions is not None else precisions_to_search(session, objective)
        self._precisions = tuple(dict.fromkeys(parse_precision(name).name for name in names))
        self._rules = dict(fixed or {})
        self._objective = objective
        self._keep_all = keep_all

    def of(self, layer: Layer) -> tuple[str, ...]:
        """Precisions that the search may give a layer: where it starts first, then by cost, the most exact last.

        Raises:
            PrecisionError: the layer can have none of them, or not the one that the user fixed.
        """
        fixed = self.fixed(layer)
        if fixed is not None:
            return (fixed,)
        allowed = [name for name in self._precisions if self._session.refusal(layer, parse_precision(name)) is None]
        if not allowed:
            raise PrecisionError(
                f"layer {layer.name} ({layer.operator_kind}) can have none of {', '.join(self._precisions)} on "
                f"{self._session.spec.name}; 'hquant inspect' shows why"
            )
        if self._objective == "latency" and not self._keep_all:
            pointless = self._no_faster(layer.operator_kind, allowed)
            pointless -= self._nowhere_faster if self._given else frozenset()
            allowed = [name for name in allowed if name not in pointless]
        # a8w8 and int8 cost the same: the one that the target prefers stands for both.
        offered = self._session.spec.offered_precisions(layer.operator_kind)
        eight = [name for name in offered if name in allowed and name in ("a8w8", "int8")][:1]
        others = [name for name in allowed if name not in ("a8w8", "int8")]
        ordered = sorted([*eight, *others], key=lambda name: self._order(layer, parse_precision(name)))
        return tuple(ordered) if self._given else (*eight, *(name for name in ordered if name not in eight))

    def fixed(self, layer: Layer) -> str | None:
        """The precision that the user fixed for a layer, or None.

        Raises:
            PrecisionError: it is impossible for the layer.
        """
        for pattern, precision in self._rules.items():
            if fnmatchcase(layer.name, pattern):
                refusal = self._session.refusal(layer, parse_precision(precision))
                if refusal is not None:
                    raise PrecisionError(f"layer {layer.name} cannot be {precision}: {refusal.detail}")
                return parse_precision(precision).name
        return None

    def refused(self, layer: Layer) -> Refusal | None:
        """Why a layer may have none of the integer precisions that are chosen from; None if it may have one.

        Where none of them are integer, of all but float32.
        """
        low = [precision for name in self._precisions if (precision := parse_precision(name)) != FLOAT32]
        integers = [precision for precision in low if precision.is_integer]
        refusals = [self._session.refusal(layer, precision) for precision in integers or low]
        return refusals[0] if refusals and all(refusals) else None

    def unused(self) -> tuple[str, ...]:
        """Patterns that match no layer."""
        names = [layer.name for layer in self._session.graph.layers]
        return tuple(p for p in self._rules if not any(fnmatchcase(name, p) for name in names))

    def _no_faster(self, kind: str, names: Sequence[str]) -> frozenset[str]:
        """Precisions that a more exact one equals in speed, by the rates of the spec for a kind of operator."""
        spec, precisions = self._session.spec, {name: parse_precision(name) for name in names}
        rates = {name: spec.macs_per_cycle(name, kind) for name in names if spec.reason_against(name, kind) is None}
        found = {
            name
            for name, rate in rates.items()
            for other, other_rate in rates.items()
            if other_rate >= rate and _is_wider(precisions[other], precisions[name])
        }
        if not self._given and "float32" in rates:
            found |= {name for name, rate in rates.items() if rate <= rates["float32"] and name not in _STARTS}
        return frozenset(found - {"float32"})

    @cached_property
    def _nowhere_faster(self) -> frozenset[str]:
        """Precisions that are no faster in any layer. Where the user names some, they are meant for something else."""
        kinds = {layer.operator_kind for layer in self._session.graph.anchors}
        return frozenset.intersection(*(self._no_faster(kind, self._precisions) for kind in kinds))

    def _order(self, layer: Layer, precision: Precision) -> tuple[bool, float, float]:
        cycles = predicted_cycles(self._session.spec, layer, precision)
        return precision == FLOAT32, cycles, weight_bytes(layer, precision)


def _is_wider(precision: Precision, other: Precision) -> bool:
    """Whether both read the same codes and have one tensor of weight codes, this one of more bits: finer steps."""
    if not all(p.is_integer and p.weight_points == 1 for p in (precision, other)):
        return False
    same_activations = (precision.activation_bits, precision.symmetric) == (other.activation_bits, other.symmetric)
    return same_activations and precision.weight_bits > other.weight_bits
