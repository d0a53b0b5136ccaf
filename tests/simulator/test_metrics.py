"""Metrics: their values on cases known by hand, what they do at the edges, and merging."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from tvm_hquant.errors import DataError
from tvm_hquant.simulator.metrics import EQUAL_SQNR, METRICS, MetricAccumulator, make_metric

RANDOM = np.random.default_rng(0)
FLOAT = RANDOM.normal(size=(200, 1, 10)).astype(np.float32) * 3
QUANTIZED = FLOAT + RANDOM.normal(size=FLOAT.shape).astype(np.float32)
LABELS = (FLOAT + RANDOM.normal(size=FLOAT.shape) * 2).argmax(axis=-1)[:, 0]


def accumulated(name: str, outputs: np.ndarray = QUANTIZED) -> MetricAccumulator:
    accumulator = MetricAccumulator(METRICS[name])
    for reference, output, label in zip(FLOAT, outputs, LABELS, strict=True):
        accumulator = accumulator.with_sample([reference], [output], int(label))
    return accumulator


def test_top1_is_the_difference_of_two_accuracies() -> None:
    """The loss is what quantization cost, in the same samples."""
    accuracies = [float(np.mean(o.argmax(axis=-1)[:, 0] == LABELS)) for o in (FLOAT, QUANTIZED)]
    top1 = accumulated("top1")
    assert top1.value == pytest.approx(accuracies[1])
    assert top1.loss == pytest.approx(accuracies[0] - accuracies[1])
    interval = top1.loss_interval()
    assert interval.low < interval.estimate == top1.loss < interval.high


def test_agreement_counts_equal_classes() -> None:
    """Labels play no part."""
    equal = float(np.mean(FLOAT.argmax(axis=-1) == QUANTIZED.argmax(axis=-1)))
    assert accumulated("agreement").value == pytest.approx(equal)
    assert accumulated("agreement").loss == pytest.approx(1 - equal)


def test_divergence_equals_scipy() -> None:
    """The formula, in nats, averaged over samples."""
    p, q = (special.softmax(o.astype(np.float64), axis=-1) for o in (FLOAT, QUANTIZED))
    assert accumulated("kl").loss == pytest.approx(float(np.mean(special.rel_entr(p, q).sum(axis=-1))))


def test_squared_error_and_noise() -> None:
    """mse and sqnr by their definitions."""
    difference = QUANTIZED.astype(np.float64) - FLOAT
    assert accumulated("mse").value == pytest.approx(float(np.mean(difference**2)))
    expected = 10 * math.log10(float(np.sum(FLOAT.astype(np.float64) ** 2) / np.sum(difference**2)))
    assert accumulated("sqnr").value == pytest.approx(expected)
    assert accumulated("sqnr").loss == pytest.approx(EQUAL_SQNR - expected)


@pytest.mark.parametrize("name", METRICS)
def test_the_float_model_itself_has_no_loss(name: str) -> None:
    """0 exactly, so that a budget of 0 can be met."""
    assert accumulated(name, FLOAT).loss == 0.0


@pytest.mark.parametrize("name", METRICS)
def test_more_noise_is_more_loss(name: str) -> None:
    """Lower is better, for every metric."""
    noise = QUANTIZED - FLOAT
    losses = [accumulated(name, FLOAT + factor * noise).loss for factor in (0.1, 1.0, 4.0)]
    assert losses == sorted(losses)
    assert losses[0] < losses[2]


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(list(METRICS)), cut=st.integers(0, 200))
def test_merging_equals_one_pass(name: str, cut: int) -> None:
    """Processes may share the samples, in any order, without changing a bit of value or loss."""
    whole = accumulated(name)
    scores = whole.scores
    empty = MetricAccumulator(METRICS[name])
    merged = empty.with_scores(scores[cut:]).merge(empty.with_scores(scores[:cut]))
    assert (merged.count, merged.value, merged.loss) == (whole.count, whole.value, whole.loss)


@pytest.mark.parametrize("name", METRICS)
def test_intervals_contain_the_loss_and_repeat(name: str) -> None:
    """The same seed gives the same interval, and it lies around the estimate."""
    accumulator = accumulated(name)
    interval = accumulator.loss_interval(seed=3)
    assert interval == accumulator.loss_interval(seed=3)
    assert interval.low <= interval.estimate <= interval.high
    assert interval.estimate == pytest.approx(accumulator.loss)


def test_binary_logit_is_a_class_by_its_sign() -> None:
    """A single output is class 1 above 0, and its divergence that of the two probabilities."""
    positive, negative = [np.array([[2.0]])], [np.array([[-1.0]])]
    assert METRICS["top1"].score(positive, negative, 1) == (1.0, 0.0)
    assert METRICS["agreement"].score(positive, negative).value == 0.0
    p, q = special.expit(2.0), special.expit(-1.0)
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert METRICS["kl"].score(positive, negative).value == pytest.approx(expected)


def test_divergence_of_probabilities() -> None:
    """A model that ends with softmax is compared by its probabilities, quantized zeros among them."""
    p = special.softmax(FLOAT[0].astype(np.float64), axis=-1)
    q = special.softmax(QUANTIZED[0].astype(np.float64), axis=-1)
    score = METRICS["kl"].score([p], [q]).value
    assert score == pytest.approx(METRICS["kl"].score([FLOAT[0]], [QUANTIZED[0]]).value, rel=1e-4)
    with_zeros = METRICS["kl"].score([np.array([0.5, 0.5])], [np.array([1.0, 0.0])]).value
    assert 5 < with_zeros < 10


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(
        st.tuples(*[st.floats(allow_nan=False, allow_infinity=False, width=32)] * 2), min_size=1, max_size=8
    )
)
def test_divergence_is_finite_and_not_negative(logits: list[tuple[float, float]]) -> None:
    """Large logits neither overflow nor give NaN."""
    reference, output = (np.array(column, np.float32) for column in zip(*logits, strict=True))
    value = METRICS["kl"].score([reference], [output]).value
    assert 0 <= value < math.inf


def test_all_outputs_count_for_energies_and_the_first_for_classes() -> None:
    """A model with several outputs."""
    reference = [np.array([1.0, 2.0]), np.zeros((1, 2, 2))]
    output = [np.array([1.0, 2.0]), np.full((1, 2, 2), 3.0)]
    assert METRICS["agreement"].score(reference, output).value == 1.0
    assert METRICS["mse"].score(reference, output).value == pytest.approx(36 / 6)
    assert METRICS["sqnr"].score(reference, output) == (5.0, 36.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_quantized_nan_is_a_loss_and_float_nan_an_error(value: float) -> None:
    """A plan that overflows is never chosen; a float model that does is reported."""
    good, bad = [np.array([1.0, 2.0])], [np.array([value, 2.0])]
    assert METRICS["top1"].score(good, bad, 1) == (1.0, 0.0)
    assert METRICS["agreement"].score(good, bad).value == 0.0
    for name in ("kl", "mse", "sqnr"):
        accumulator = MetricAccumulator(METRICS[name]).with_sample(good, bad).with_sample(good, good)
        assert accumulator.loss == math.inf
    for name, metric in METRICS.items():
        with pytest.raises(DataError, match="float model's output holds NaN"):
            metric.score(bad, good, 1)
        with pytest.raises(ValueError, match="elements"):
            metric.score(good, [np.zeros(3)], 1)
        with pytest.raises(DataError, match=f"{name} of no samples"):
            _ = MetricAccumulator(metric).loss


def test_labels_are_checked() -> None:
    """Missing labels and labels outside the classes are mistakes of the data."""
    outputs = [np.array([[0.0, 1.0, 2.0]])]
    with pytest.raises(DataError, match="label 3 is none of the 3 classes"):
        METRICS["top1"].score(outputs, outputs, 3)
    with pytest.raises(DataError, match="top1 needs labels"):
        METRICS["top1"].score(outputs, outputs)


def test_choosing_a_metric() -> None:
    """Labels decide the default; what cannot work is refused with what can."""
    assert make_metric(has_labels=True).name == "top1"
    assert make_metric(has_labels=False).name == "kl"
    assert make_metric("sqnr", has_labels=False).name == "sqnr"
    with pytest.raises(DataError, match="use one of agreement, kl, mse, sqnr"):
        make_metric("top1", has_labels=False)
    with pytest.raises(DataError, match="unknown metric 'top5'"):
        make_metric("top5")
    with pytest.raises(ValueError, match="cannot be merged"):
        accumulated("kl").merge(accumulated("mse"))
