"""The top-1 drop to expect of a plan, from few samples.

A budget of one point on 200 samples is two samples. Of the samples whose class a plan changes some get worse and some better,
so the measured drop has a standard error of about one point where 2 % of 200 classes change: a search that follows it follows
chance, and its plans differ from one half of the samples to the other. Two averages take nearly all of that chance away.

*Which samples change class.* Quantization adds noise to the lead that the float model's class has over the best other one.
The leads m_i of all samples and the noises d_j = (lead of the quantized model) − m_j are both known, so instead of counting
the samples for which their own noise happens to exceed their lead, every lead is taken with every noise: f_i = share of j
with d_j < −m_i. (n² pairs instead of n: a U-statistic, W. Hoeffding, Annals of Mathematical Statistics 19, 1948. It takes
noise to be independent of lead.)

*What a change costs.* A class can only change to the worse by as much as the old one was better. That is nearly nothing for
samples that the float model itself was about to give another class, and those are the ones that change. So a change costs
κ·(p₁ − p₂), with the float model's two highest probabilities, instead of the label's verdict of 1, 0 or −1. Networks are too
sure of themselves, each by a factor of its own (C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017); the
labels tell it: κ = Σ(1 if the first class is right, −1 if the second is) / Σ(p₁ − p₂), over all samples.

The drop to expect is the mean of f_i·κ·(p₁ − p₂)_i. Where it was compared with measurements (classifiers of CIFAR-10 and
ImageNet in 4 to 8 bits, 4000 and 400 samples), its standard deviation over draws of 200 samples was 20 times less than that of
the measured drop where half a point is lost, and half of it where 16 points are; the share of changed classes that it rests on
was right within a fifth. Where much is lost, classes behind the second
one count too, and the expectation is too low. But there the measurement itself says much: never is less expected than the
lower bound of the measured drop's 95 % interval.

How much it may be (:func:`drop_upper_bound`): the error is a factor, found by the bootstrap, as long as some noise exceeds some
lead. Where none of n samples' noises exceeds any lead, resamples have nothing to say. Then, with confidence c, no more than
1 − (1 − c)^(1/n) of the classes change, and first those of the smallest lead; so as much is always allowed for.
"""

from __future__ import annotations

import numpy as np

from tvm_hquant.simulator.margins import SCORED
from tvm_hquant.simulator.metrics import Floats, Metric, MetricAccumulator
from tvm_hquant.statistics import factor_upper_bound, proportion_upper_bound

SCORES: tuple[Metric, ...] = (SCORED["top1"], SCORED["margin"], SCORED["preference"])
"""What :func:`expected_drop` needs to know of a plan, in this order."""


def expected_drop(top1: MetricAccumulator, margin: MetricAccumulator, preference: MetricAccumulator) -> float:
    """The expected drop in top-1 of a plan with these scores on the same samples, a fraction; never below 0."""
    expected = drop_by_margins(margin.table, preference.table)
    return max(expected, top1.loss_interval().low)


def drop_upper_bound(margins: Floats, preferences: Floats, confidence: float = 0.9, seed: int = 0) -> float:
    """What :func:`drop_by_margins` is below with some confidence, from the same arguments; 0 where no lead differs at all."""
    leads, quantized = margins.T
    if np.array_equal(leads, quantized):
        return 0.0
    both = np.stack([margins, preferences], axis=1)
    bound = factor_upper_bound(both, lambda rows: drop_by_margins(rows[:, 0], rows[:, 1]), confidence, seed)
    # A change costs what it costs where it is likeliest; from few samples κ may be anything, so it counts as 1 at least.
    cost = float(preferences[np.argmin(leads), 0]) * max(1.0, _calibration(preferences))
    return max(bound, proportion_upper_bound(0, len(leads), confidence) * cost)


def drop_by_margins(margins: Floats, preferences: Floats) -> float:
    """The mean of f_i·κ·(p₁ − p₂)_i; both arguments are float64 [samples, 2], as their metrics score. Never below 0."""
    leads, quantized = margins.T
    noises = np.sort(quantized - leads)
    changes = np.searchsorted(noises, -leads, side="left") / len(noises)
    return max(0.0, float(np.mean(changes * preferences[:, 0])) * _calibration(preferences))


def _calibration(preferences: Floats) -> float:
    """κ."""
    sure, right = preferences.T
    return max(0.0, float(right.sum())) / max(float(sure.sum()), np.finfo(np.float64).tiny)
