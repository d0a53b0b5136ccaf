"""How much worse a quantized model is than the float model, sample by sample.

Every metric compares the outputs of both models for one sample and gives a :class:`Score`. From the scores of many
samples come a *value*, as one would report it, and a *loss*, which is 0 for the float model itself and larger for a
worse model; a search keeps the loss within a budget.

=============  ==========================================  =====================================================
name           value                                       loss
=============  ==========================================  =====================================================
``top1``       share of samples whose class is the label   that share of the float model, less the value (below 0
                                                           where quantization happens to help)
``agreement``  share of samples with the float model's     1 − value
               class
``kl``         mean divergence KL(float ‖ quantized) of    the value
               the class probabilities, in nats
``mse``        mean squared difference of the outputs      the value
``sqnr``       10·log10(Σ float² / Σ difference²), dB,     150 − min(value, 150): dB lost of the 150 dB taken for
               sums over all samples                       "equal"; float32 itself resolves about 150 dB
=============  ==========================================  =====================================================

``top1``, ``agreement`` and ``kl`` look at the first output, all its elements being classes; a single element z is a
binary logit, class 1 being z > 0. ``mse`` and ``sqnr`` look at all outputs, joined. An output with NaN has no class,
and an infinite loss in the other metrics.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tvm_hquant.calibration.validation import check_class
from tvm_hquant.errors import DataError
from tvm_hquant.statistics import (
    Interval,
    bootstrap_interval,
    factor_upper_bound,
    paired_difference_interval,
    proportion_upper_bound,
    wilson_interval,
)

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Outputs = Sequence[Array]
"""All outputs of a model for one sample, batch axes of 1 included or not."""

EQUAL_SQNR = 150.0
"""Signal to noise ratio in dB from which outputs count as equal: 24 bits of float32 resolve 6.02·24 + 1.76 = 146."""

_SMALLEST_PROBABILITY = 2.0**-24
_RESAMPLES = 200
"""For upper bounds, which searches ask for often."""


class Score(NamedTuple):
    """What one sample adds to a metric: for the float model, and for the quantized one."""

    reference: float
    value: float


class Metric(ABC):
    """One way to compare two models; see the table of the module."""

    name: str
    needs_labels: bool = False

    def score(self, float_outputs: Outputs, outputs: Outputs, label: int | None = None) -> Score:
        """The score of one sample; see :meth:`score_all`."""
        return Score(*self.score_all(float_outputs, [outputs], label)[0].tolist())

    @abstractmethod
    def score_all(self, float_outputs: Outputs, outputs: Sequence[Outputs], label: int | None = None) -> Floats:
        """The scores of one sample under several quantized models, float64 [models, 2], columns as in :class:`Score`.

        The outputs of all of them are held in float64 at once.

        Raises:
            DataError: the float model's output holds NaN or infinity, or a label is missing or not among its classes.
            ValueError: the outputs differ in shape.
        """

    @abstractmethod
    def value(self, scores: Floats) -> float:
        """What is reported; ``scores`` is float64 [samples, 2], columns as in :class:`Score`."""

    @abstractmethod
    def loss(self, scores: Floats) -> float:
        """What a search keeps small; 0 for the float model itself."""

    def loss_interval(self, scores: Floats, level: float = 0.95, seed: int = 0) -> Interval:
        """The loss with its confidence interval; by the bootstrap unless a metric knows better."""
        return bootstrap_interval(scores, self.loss, level, seed)

    def loss_upper_bound(self, scores: Floats, confidence: float = 0.9, seed: int = 0) -> float:
        """What the loss is below with some confidence; by the bootstrap unless a metric knows better."""
        return bootstrap_interval(scores, self.loss, 2 * confidence - 1, seed).high


class Top1(Metric):
    """Share of samples whose class is the label."""

    name = "top1"
    needs_labels = True

    def score_all(self, float_outputs: Outputs, outputs: Sequence[Outputs], label: int | None = None) -> Floats:
        reference, rows = _first_outputs(float_outputs, outputs)
        if label is None:
            raise DataError("top1 needs labels, but the data has none: add labels, or use agreement, kl, mse or sqnr")
        check_class(label, number_of_classes(reference.size))
        return _table(_classes(reference[None])[0] == label, _classes(rows) == label)

    def value(self, scores: Floats) -> float:
        return float(np.mean(scores[:, 1]))

    def loss(self, scores: Floats) -> float:
        # One difference of exact integers: the same samples right give exactly 0.
        return float(np.sum(scores[:, 0] - scores[:, 1])) / len(scores)

    def loss_interval(self, scores: Floats, level: float = 0.95, seed: int = 0) -> Interval:
        """By Newcombe's method for paired proportions."""
        return paired_difference_interval(scores[:, 0], scores[:, 1], level)

    def loss_upper_bound(self, scores: Floats, confidence: float = 0.9, seed: int = 0) -> float:
        """The upper end of Newcombe's interval."""
        return paired_difference_interval(scores[:, 0], scores[:, 1], 2 * confidence - 1).high


class Agreement(Metric):
    """Share of samples with the float model's class."""

    name = "agreement"

    def score_all(self, float_outputs: Outputs, outputs: Sequence[Outputs], label: int | None = None) -> Floats:
        reference, rows = _first_outputs(float_outputs, outputs)
        return _table(1.0, _classes(rows) == _classes(reference[None])[0])

    def value(self, scores: Floats) -> float:
        return float(np.mean(scores[:, 1]))

    def loss(self, scores: Floats) -> float:
        return float(np.sum(1.0 - scores[:, 1])) / len(scores)

    def loss_interval(self, scores: Floats, level: float = 0.95, seed: int = 0) -> Interval:
        """By Wilson's method for a proportion."""
        return wilson_interval(int(np.sum(1.0 - scores[:, 1])), len(scores), level)

    def loss_upper_bound(self, scores: Floats, confidence: float = 0.9, seed: int = 0) -> float:
        """Clopper and Pearson's: without any disagreement 1 − (1 − confidence)^(1 / samples), not 0."""
        return proportion_upper_bound(int(np.sum(1.0 - scores[:, 1])), len(scores), confidence)


class Divergence(Metric):
    """Mean Kullback–Leibler divergence of class probabilities from the float model's, in nats.

    Outputs that the float model gives as probabilities (none negative, sum 1) are taken as such, others as logits.
    """

    name = "kl"

    def score_all(self, float_outputs: Outputs, outputs: Sequence[Outputs], label: int | None = None) -> Floats:
        expected, actual = log_probabilities(float_outputs, outputs)
        divergences = np.sum(np.exp(expected) * (expected - actual), axis=1)
        # Rounding can leave the sum for equal outputs a little below zero.
        return _table(0.0, np.where(np.isfinite(divergences), np.maximum(divergences, 0.0), np.inf))

    def value(self, scores: Floats) -> float:
        return _mean(scores[:, 1])

    def loss(self, scores: Floats) -> float:
        return self.value(scores)

    def loss_upper_bound(self, scores: Floats, confidence: float = 0.9, seed: int = 0) -> float:
        """By the bootstrap of the logarithm: the error of a loss that is never negative is a factor."""
        return factor_upper_bound(scores, self.loss, confidence, seed, _RESAMPLES)


class MeanSquaredError(Metric):
    """Mean squared difference of all outputs."""

    name = "mse"

    def score_all(self, float_outputs: Outputs, outputs: Sequence[Outputs], label: int | None = None) -> Floats:
        reference, rows = _joined_outputs(float_outputs, outputs)
        return _table(0.0, _noises(reference, rows) / reference.size)

    def value(self, scores: Floats) -> float:
        return _mean(scores[:, 1])

    def loss(self, scores: Floats) -> float:
        return self.value(scores)

    def loss_upper_bound(self, scores: Floats, confidence: float = 0.9, seed: int = 0) -> float:
        """By the bootstrap of the logarithm: the error of a loss that is never negative is a factor."""
        return factor_upper_bound(scores, self.loss, confidence, seed, _RESAMPLES)


class SignalToQuantizationNoise(Metric):
    """Energy of the float model's outputs over the energy of the difference, in dB. Scores hold the two energies."""

    name = "sqnr"

    def score_all(self, float_outputs: Outputs, outputs: Sequence[Outputs], label: int | None = None) -> Floats:
        reference, rows = _joined_outputs(float_outputs, outputs)
        return _table(np.sum(reference**2), _noises(reference, rows))

    def value(self, scores: Floats) -> float:
        signal, noise = math.fsum(scores[:, 0]), math.fsum(scores[:, 1])
        if noise == 0.0:
            return math.inf
        if signal == 0.0 or math.isinf(noise):
            return -math.inf
        return 10.0 * math.log10(signal / noise)

    def loss(self, scores: Floats) -> float:
        return EQUAL_SQNR - min(self.value(scores), EQUAL_SQNR)

    def loss_upper_bound(self, scores: Floats, confidence: float = 0.9, seed: int = 0) -> float:
        """By the bootstrap of the logarithm of noise over signal, whose error is a factor."""
        ratio = factor_upper_bound(scores, _noise_over_signal, confidence, seed, _RESAMPLES)
        if ratio == 0.0 or math.isinf(ratio):
            return ratio
        return max(0.0, EQUAL_SQNR + 10.0 * math.log10(ratio))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (Top1(), Agreement(), Divergence(), MeanSquaredError(), SignalToQuantizationNoise())
}
"""All metrics by name."""


def make_metric(name: str | None = None, has_labels: bool = True) -> Metric:
    """The metric called ``name``; without a name ``top1`` for data with labels and ``kl`` for data without.

    Raises:
        DataError: no metric has that name, or it needs labels that the data does not have.
    """
    metric = METRICS.get(name or ("top1" if has_labels else "kl"))
    if metric is None:
        raise DataError(f"unknown metric {name!r}: use one of {', '.join(METRICS)}")
    if metric.needs_labels and not has_labels:
        usable = ", ".join(other.name for other in METRICS.values() if not other.needs_labels)
        raise DataError(f"metric {name} needs labels, but the data has none: add labels, or use one of {usable}")
    return metric


@dataclass(frozen=True, eq=False)
class MetricAccumulator:
    """A metric over samples. Keeps the two numbers of each sample's score, for confidence intervals.

    ``table`` is float64 [samples, 2], columns as in :class:`Score`: a search keeps one for each of thousands of plans.
    """

    metric: Metric
    table: Floats = field(default_factory=lambda: np.empty((0, 2)))

    @property
    def scores(self) -> tuple[Score, ...]:
        """The rows of the table."""
        return tuple(Score(*row) for row in self.table.tolist())

    def with_sample(self, float_outputs: Outputs, outputs: Outputs, label: int | None = None) -> MetricAccumulator:
        """With one more sample. See :meth:`Metric.score` for what it raises."""
        return self.with_scores([self.metric.score(float_outputs, outputs, label)])

    def with_scores(self, scores: Iterable[Score]) -> MetricAccumulator:
        """With more samples whose scores are known."""
        added = np.array(list(scores), np.float64).reshape(-1, 2)
        return MetricAccumulator(self.metric, np.concatenate([self.table, added]))

    def of(self, samples: Sequence[int]) -> MetricAccumulator:
        """Some of the samples, by position."""
        return MetricAccumulator(self.metric, self.table[list(samples)])

    def merge(self, other: MetricAccumulator) -> MetricAccumulator:
        """With the samples of another accumulator of the same metric."""
        if type(self.metric) is not type(other.metric):
            raise ValueError(f"{self.metric.name} and {other.metric.name} cannot be merged")
        return MetricAccumulator(self.metric, np.concatenate([self.table, other.table]))

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.table)

    @property
    def value(self) -> float:
        """The metric as one would report it. Raises DataError without samples."""
        return self.metric.value(self._table())

    @property
    def loss(self) -> float:
        """How much worse than the float model. Raises DataError without samples."""
        return self.metric.loss(self._table())

    def loss_interval(self, level: float = 0.95, seed: int = 0) -> Interval:
        """The loss with its confidence interval. Raises DataError without samples."""
        return self.metric.loss_interval(self._table(), level, seed)

    def loss_upper_bound(self, confidence: float = 0.9, seed: int = 0) -> float:
        """What the loss is below with some confidence. Raises DataError without samples."""
        return self.metric.loss_upper_bound(self._table(), confidence, seed)

    def _table(self) -> Floats:
        if not len(self.table):
            raise DataError(f"{self.metric.name} of no samples: evaluate at least one")
        return self.table


def log_probabilities(float_outputs: Outputs, outputs: Sequence[Outputs]) -> tuple[Floats, Floats]:
    """Logarithms of the class probabilities of the first output of the float model, float64 [classes], and of several
    quantized ones, float64 [models, classes]; at least two classes.

    Outputs that the float model gives as probabilities (none negative, sum 1) are taken as such, others as logits. What a
    quantized model gives is NaN throughout where its output is not finite.
    """
    reference, rows = _first_outputs(float_outputs, outputs)
    are_probabilities = reference.size > 1 and reference.min() >= 0 and abs(float(reference.sum()) - 1.0) < 1e-3
    logarithms = _log_of_probabilities if are_probabilities else _log_softmax
    expected = logarithms(reference[None])[0]
    actual = np.full((len(rows), expected.size), np.nan)
    is_finite = np.isfinite(rows).all(axis=1)
    actual[is_finite] = logarithms(rows[is_finite])
    return expected, actual


def number_of_classes(elements: int) -> int:
    """How many classes the first output tells apart: one for each element, two where it is a single one."""
    return max(2, elements)


def _first_outputs(float_outputs: Outputs, outputs: Sequence[Outputs]) -> tuple[Floats, Floats]:
    return _checked(np.ravel(float_outputs[0]), [np.ravel(own[0]) for own in outputs])


def _joined_outputs(float_outputs: Outputs, outputs: Sequence[Outputs]) -> tuple[Floats, Floats]:
    return _checked(_joined(float_outputs), [_joined(own) for own in outputs])


def _joined(outputs: Outputs) -> Floats:
    return np.concatenate([np.ravel(output).astype(np.float64) for output in outputs])


def _checked(reference: Array, outputs: Sequence[Array]) -> tuple[Floats, Floats]:
    """The float model's output [elements], and those of the others [models, elements], in float64."""
    for output in outputs:
        if reference.shape != output.shape or reference.size == 0:
            raise ValueError(f"outputs have {output.size} elements, the float model's {reference.size}")
    if not np.isfinite(reference).all():
        raise DataError("the float model's output holds NaN or infinity: check the model and the data's preprocessing")
    rows = np.stack(outputs) if outputs else np.empty((0, reference.size))
    return reference.astype(np.float64), rows.astype(np.float64)


def _table(references: npt.ArrayLike, values: npt.ArrayLike) -> Floats:
    """Scores [models, 2]; one reference for all models."""
    values = np.asarray(values, np.float64)
    return np.column_stack((np.broadcast_to(np.asarray(references, np.float64), values.shape), values))


def _classes(rows: Floats) -> npt.NDArray[np.int64]:
    """The class of each output; −1, which is none, for NaN."""
    found = (rows[:, 0] > 0).astype(np.int64) if rows.shape[1] == 1 else np.argmax(rows, axis=1)
    return np.where(np.isnan(rows).any(axis=1), -1, found)


def _log_softmax(logits: Floats) -> Floats:
    if logits.shape[1] == 1:
        logits = np.concatenate((np.zeros_like(logits), logits), axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True)), np.float64)


def _log_of_probabilities(probabilities: Floats) -> Floats:
    """A quantized probability can be 0; it counts as the smallest that float32 resolves next to 1."""
    floored = np.maximum(probabilities, _SMALLEST_PROBABILITY)
    return np.asarray(np.log(floored / floored.sum(axis=1, keepdims=True)), np.float64)


def _noises(reference: Floats, rows: Floats) -> Floats:
    """Energy of each difference; infinite where an output is not finite."""
    is_finite = np.isfinite(rows).all(axis=1)
    noises = np.full(len(rows), np.inf)
    noises[is_finite] = np.sum((rows[is_finite] - reference) ** 2, axis=1)
    return noises


def _noise_over_signal(energies: Floats) -> float:
    """Of samples with the energies of the float outputs and of the differences; infinite where there is noise alone."""
    signal, noise = energies.sum(axis=0)
    return 0.0 if noise == 0.0 else math.inf if signal == 0.0 else float(noise / signal)


def _mean(values: Floats) -> float:
    """Rounded once, so that the order of the samples does not matter."""
    return math.fsum(values) / len(values)
