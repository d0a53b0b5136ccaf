"""Per-layer loss by measurement: the loss of the whole network when one layer alone changes precision.

Source: X. Mao, "Hierarchical Quantization Algorithm for Deep Learning Network Models", section 3.2, step 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm_hquant.calibration.samples import DataSource
from tvm_hquant.precision import FLOAT32, parse_precision
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
    """

    def __init__(self, session: QuantizationSession, samples: DataSource, metric: str = "kl") -> None:
        self._session = session
        self.samples = samples
        self._metric = METRICS[metric]
        self._losses: dict[tuple[str, str], float] = {}

    def measure(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Losses of the network with one layer alone in a precision, for all pairs (layer, precision)."""
        self._losses.update({pair: 0.0 for pair in pairs if pair[1] == "float32"})
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._losses]
        if missing:
            everything_float = {layer.name: FLOAT32 for layer in self._session.graph.anchors}
            programs = [self._session.program({**everything_float, n: parse_precision(p)}) for n, p in missing]
            scores = self._session.evaluate(programs, self.samples, self._metric, "measuring layers")
            self._losses.update({pair: score.loss for pair, score in zip(missing, scores, strict=True)})
        return {pair: self._losses[pair] for pair in pairs}

    @property
    def evaluations(self) -> int:
        """How many pairs were measured."""
        return sum(1 for _, precision in self._losses if precision != "float32")

    def of_layer(self, layer: str) -> dict[str, float]:
        """The losses of one layer by precision, as far as they were measured."""
        return {precision: loss for (name, precision), loss in self._losses.items() if name == layer}
