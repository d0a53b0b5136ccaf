"""The search must not follow chance: protects how a drop is expected from few samples."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_hquant.search.expected_drop import SCORES, expected_drop
from tvm_hquant.simulator.metrics import MetricAccumulator


def scores_of(logits: np.ndarray, noise: np.ndarray, labels: np.ndarray) -> list[MetricAccumulator]:
    """Scores of a model whose logits [samples, classes] get noise."""
    return [
        MetricAccumulator(metric).with_scores(
            metric.score((f,), (f + d,), int(label)) for f, d, label in zip(logits, noise, labels, strict=True)
        )
        for metric in SCORES
    ]


def drawn(count: int, sharpness: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their probabilities; a classifier that gives the logits times ``sharpness``."""
    rng = np.random.default_rng(seed)
    logits = 2.0 * rng.normal(size=(count, 10))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) > rng.uniform(size=(count, 1))).argmax(axis=1)
    return sharpness * logits, labels


def test_nothing_changed_means_no_drop() -> None:
    """Without noise nothing is lost."""
    logits, labels = drawn(50, 1.0, 0)
    assert expected_drop(*scores_of(logits, np.zeros_like(logits), labels)) == 0.0


def test_by_hand() -> None:
    """Two samples, leads 1 and 3, noises −2 and 0: one of two noises exceeds the first lead, none the second. Both first
    classes are right, so κ = 2 / (0.462 + 0.905), and 0.5 · 0.462 · κ / 2 is expected."""
    logits = np.array([[2.0, 1.0], [4.0, 1.0]])
    sure = np.tanh((logits[:, 0] - logits[:, 1]) / 2)
    scores = scores_of(logits, np.array([[-2.0, 0.0], [0.0, 0.0]]), np.array([0, 0]))
    assert expected_drop(*scores) == pytest.approx(0.5 * sure[0] * (2 / sure.sum()) / 2)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_few_samples_say_what_many_measure(sharpness: float) -> None:
    """Expected from 200 samples: near the drop of 200,000, with much less scatter than the drop measured on 200, for
    networks that are sure of themselves to a right, a smaller or a larger degree."""
    rng = np.random.default_rng(1)
    logits, labels = drawn(200_000, sharpness, 2)
    noise = 0.4 * sharpness * rng.normal(size=logits.shape)
    rights = [logits.argmax(axis=1) == labels, (logits + noise).argmax(axis=1) == labels]
    truth = float(rights[0].mean() - rights[1].mean())
    expected, measured = [], []
    for start in range(0, 200 * 30, 200):
        part = slice(start, start + 200)
        scores = scores_of(logits[part], noise[part], labels[part])
        expected.append(expected_drop(*scores))
        measured.append(scores[0].loss)
    assert np.mean(expected) == pytest.approx(truth, rel=0.4)
    assert np.std(expected) < np.std(measured) / 3


def test_a_large_measured_drop_is_believed() -> None:
    """Noise that always strikes the right class is no chance: at least the lower bound of the measured drop is expected."""
    logits, labels = drawn(200, 1.0, 3)
    noise = np.zeros_like(logits)
    noise[np.arange(200), labels] = -3.0
    scores = scores_of(logits, noise, labels)
    assert expected_drop(*scores) >= scores[0].loss_interval().low > 0.1


def test_no_output_at_all_changes_every_class() -> None:
    """NaN gives no class; what is expected then is no less than what was measured."""
    logits, labels = drawn(100, 1.0, 4)
    scores = scores_of(logits, np.full_like(logits, np.nan), labels)
    assert expected_drop(*scores) >= scores[0].loss_interval().low > 0.2


def test_binary_logits_and_probabilities() -> None:
    """One logit counts as two classes; probabilities give what their logarithms give."""
    rng = np.random.default_rng(5)
    logits, labels = 3 * rng.normal(size=(100, 1)), rng.integers(0, 2, size=100)
    noise = rng.normal(size=logits.shape)
    two = np.concatenate([np.zeros_like(logits), logits], axis=1)
    two_noise = np.concatenate([np.zeros_like(noise), noise], axis=1)
    assert expected_drop(*scores_of(logits, noise, labels)) == expected_drop(*scores_of(two, two_noise, labels))
    softmax = np.exp(two) / np.exp(two).sum(axis=1, keepdims=True)
    noisy = np.exp(two + two_noise) / np.exp(two + two_noise).sum(axis=1, keepdims=True)
    by_probability = expected_drop(*scores_of(softmax, noisy - softmax, labels))
    assert by_probability == pytest.approx(expected_drop(*scores_of(two, two_noise, labels)), rel=1e-6)
