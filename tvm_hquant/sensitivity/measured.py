"""Per-layer loss by measurement: the loss of the whole network when one layer alone changes precision.

Source: X. Mao, "Hierarchical Quantization Algorithm for Deep Learning Network Models", section 3.2, step 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm_hquant.calibration.samples import DataSource
from tvm_hquant.precision import FLOAT32, parse_precision
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.metrics import METRICS


@dataclass(frozen=True)
class SensitivityTable:
    """Losses by (layer, precision), in ``metric``, on ``samples`` samples."""

    losses: Mapping[tuple[str, str], float]
    metric: str
    samples: int

    def of_layer(self, layer: str) -> dict[str, float]:
        """The losses of one layer by precision."""
        return {precision: loss for (name, precision), loss in self.losses.items() if name == layer}


def measure_sensitivities(
    session: QuantizationSession, candidates: Mapping[str, Sequence[str]], samples: DataSource, metric: str = "kl"
) -> SensitivityTable:
    """The table for all candidates of all layers with weights.

    The loss is a smooth one by default, the divergence from the float model's own output: with a few dozen samples the
    share of right classes would tell most layers apart by chance. float32 loses nothing and is not run.
    """
    everything_float = {layer.name: FLOAT32 for layer in session.graph.anchors}
    pairs = [(layer, p) for layer, precisions in candidates.items() for p in precisions if p != "float32"]
    programs = [session.program({**everything_float, layer: parse_precision(p)}) for layer, p in pairs]
    scores = session.evaluate(programs, samples, METRICS[metric], "measuring layers")
    losses = {pair: score.loss for pair, score in zip(pairs, scores, strict=True)}
    losses.update({(layer, "float32"): 0.0 for layer, precisions in candidates.items() if "float32" in precisions})
    return SensitivityTable(losses, metric, samples.count or len(scores[0].scores if scores else ()))
