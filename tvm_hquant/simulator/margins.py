"""What the drop in top-1 of a plan is expected from: margins between classes, and what they are worth.

See :mod:`tvm_hquant.search.expected_drop`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tvm_hquant.errors import DataError
from tvm_hquant.simulator.metrics import METRICS, Floats, Metric, Outputs, Score, log_probabilities


class Margin(Metric):
    """Lead of the float model's class over the best other one, in log-probability, in the float and the quantized model.

    The float model's lead is not negative; the quantized one's is where it gives another class.
    """

    name = "margin"

    def score(self, float_outputs: Outputs, outputs: Outputs, label: int | None = None) -> Score:
        expected, actual = log_probabilities(float_outputs, outputs)
        chosen = int(np.argmax(expected))
        lead = _lead(expected, chosen)
        return Score(lead, _lead(actual, chosen) if np.isfinite(actual).all() else -math.inf)

    def value(self, scores: Floats) -> float:
        return float(np.mean(scores[:, 1]))

    def loss(self, scores: Floats) -> float:
        return float(np.mean(scores[:, 0] - scores[:, 1]))


class Preference(Metric):
    """By how much the float model's class is better than its second: by its own probabilities, and by the label.

    The two numbers are the difference of the two probabilities, and 1 if the first class is right, −1 if the second one
    is, else 0. They do not depend on the quantized model.
    """

    name = "preference"
    needs_labels = True

    def score(self, float_outputs: Outputs, outputs: Outputs, label: int | None = None) -> Score:
        if label is None:
            raise DataError("top1 needs labels, but the data has none: add labels, or use agreement, kl, mse or sqnr")
        expected, _ = log_probabilities(float_outputs, float_outputs)
        first = int(np.argmax(expected))
        others = expected.copy()
        others[first] = -np.inf
        second = int(np.argmax(others))
        return Score(
            float(np.exp(expected[first]) - np.exp(expected[second])), float(label == first) - float(label == second)
        )

    def score_all(self, float_outputs: Outputs, outputs: Sequence[Outputs], label: int | None = None) -> list[Score]:
        return [self.score(float_outputs, float_outputs, label)] * len(outputs)

    def value(self, scores: Floats) -> float:
        return float(np.mean(scores[:, 1]))

    def loss(self, scores: Floats) -> float:
        return float(np.mean(scores[:, 0] - scores[:, 1]))


SCORED: dict[str, Metric] = {**METRICS, **{metric.name: metric for metric in (Margin(), Preference())}}
"""All that programs can be scored by, by name; a budget is set in one of the metrics."""


def _lead(log_probabilities_: Floats, chosen: int) -> float:
    others = np.delete(log_probabilities_, chosen)
    return float(log_probabilities_[chosen] - others.max())
