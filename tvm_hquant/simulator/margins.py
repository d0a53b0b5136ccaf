"""What the drop in top-1 of a plan is expected from: margins between classes, and what they are worth.

See :mod:`tvm_hquant.search.expected_drop`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_hquant.errors import DataError
from tvm_hquant.simulator.metrics import METRICS, Floats, Metric, Outputs, log_probabilities


class Margin(Metric):
    """Lead of the float model's class over the best other one, in log-probability, in the float and the quantized model.

    The float model's lead is not negative; the quantized one's is where it gives another class.
    """

    name = "margin"

    def score_all(self, float_outputs: Outputs, outputs: Sequence[Outputs], label: int | None = None) -> Floats:
        expected, actual = log_probabilities(float_outputs, outputs)
        chosen = int(np.argmax(expected))
        reference, *leads = _leads(np.concatenate((expected[None], actual)), chosen).tolist()
        return np.array([(reference, lead) for lead in leads]).reshape(-1, 2)

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

    def score_all(self, float_outputs: Outputs, outputs: Sequence[Outputs], label: int | None = None) -> Floats:
        if label is None:
            raise DataError("top1 needs labels, but the data has none: add labels, or use agreement, kl, mse or sqnr")
        expected, _ = log_probabilities(float_outputs, [])
        first = int(np.argmax(expected))
        others = expected.copy()
        others[first] = -np.inf
        second = int(np.argmax(others))
        score = np.exp(expected[first]) - np.exp(expected[second]), float(label == first) - float(label == second)
        return np.tile(np.array(score), (len(outputs), 1))

    def value(self, scores: Floats) -> float:
        return float(np.mean(scores[:, 1]))

    def loss(self, scores: Floats) -> float:
        return float(np.mean(scores[:, 0] - scores[:, 1]))


SCORED: dict[str, Metric] = {**METRICS, **{metric.name: metric for metric in (Margin(), Preference())}}
"""All that programs can be scored by, by name; a budget is set in one of the metrics."""


def _leads(rows: Floats, chosen: int) -> Floats:
    """Of one class over the best other one in each row of log-probabilities; −∞ where a row is not finite."""
    others = np.delete(rows, chosen, axis=1)
    return np.where(np.isfinite(rows).all(axis=1), rows[:, chosen] - others.max(axis=1), -np.inf)
