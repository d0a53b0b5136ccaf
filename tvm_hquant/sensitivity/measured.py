"""Per-layer loss by measurement: how much more the whole network loses when one layer changes precision.

Source: X. Mao, "Hierarchical Quantization Algorithm for Deep Learning Network Models", section 3.2, step 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from tvm_hquant.calibration.samples import DataSource
from tvm_hquant.precision import parse_precision
from tvm_hquant.search.problem import Assignment, LayerPrecision
from tvm_hquant.sensitivity.single_layers import SingleLayerPlans
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.metrics import METRICS


class SensitivityTable:
    """Losses by (layer, precision), measured when they are asked for.

    The loss is a smooth one by default, the divergence from the float model's own output: with a few dozen samples the
    share of right classes would tell most layers apart by chance. float32 loses nothing and is not run.

    Args:
        session: the calibrated model.
        samples: to measure on.
        metric: name of a metric that needs no labels.
        plans: gives the plans by which layers are measured, once the first is; by default all other layers compute in float32.
    """

    def __init__(
        self,
        session: QuantizationSession,
        samples: DataSource,
        metric: str = "kl",
        plans: Callable[[], SingleLayerPlans] | None = None,
    ) -> None:
        self._session = session
        self.samples = samples
        self._metric = METRICS[metric]
        self._make_plans = plans
        self._losses: dict[LayerPrecision, float] = {}
        self._evaluated: dict[str, float] = {}

    @cached_property
    def _plans(self) -> SingleLayerPlans:
        if self._make_plans is not None:
            return self._make_plans()
        return SingleLayerPlans([layer.name for layer in self._session.graph.anchors])

    def measure(self, pairs: Sequence[LayerPrecision]) -> dict[LayerPrecision, float]:
        """What the network loses by each layer in each precision, for all pairs (layer, precision)."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._losses]
        self._losses.update(self._plans.losses(missing, self._evaluate))
        return {pair: self._losses[pair] for pair in pairs}

    def _evaluate(self, plans: Sequence[Assignment]) -> list[float]:
        programs = [self._session.program({n: parse_precision(p) for n, p in plan.items()}) for plan in plans]
        new = {program.digest: program for program in programs if program.digest not in self._evaluated}
        if new:
            scores = self._session.evaluate(list(new.values()), self.samples, self._metric, "measuring layers")
            self._evaluated.update((digest, score.loss) for digest, score in zip(new, scores, strict=True))
        return [self._evaluated[program.digest] for program in programs]

    @property
    def evaluations(self) -> int:
        """How many plans were measured."""
        return len(self._evaluated)

    def of_layer(self, layer: str) -> dict[str, float]:
        """The losses of one layer by precision, as far as they were measured."""
        return {precision: loss for (name, precision), loss in self._losses.items() if name == layer}
