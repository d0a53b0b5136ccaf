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
"""

from __future__ import annotations

import numpy as np

from tvm_hquant.simulator.margins import SCORED
from tvm_hquant.simulator.metrics import Floats, Metric, MetricAccumulator

SCORES: tuple[Metric, ...] = (SCORED["top1"], SCORED["margin"], SCORED["preference"])
"""What :func:`expected_drop` needs to know of a plan, in this order."""


def expected_drop(top1: MetricAccumulator, margin: MetricAccumulator, preference: MetricAccumulator) -> float:
    """The expected drop in top-1 of a plan with these scores on the same samples, a fraction; never below 0."""
    expected = drop_by_margins(margin.table, preference.table)
    return max(expected, top1.loss_interval().low)


def drop_by_margins(margins: Floats, preferences: Floats) -> float:
    """The mean of f_i·κ·(p₁ − p₂)_i; both arguments are float64 [samples, 2], as their metrics score. Never below 0."""
    leads, quantized = margins.T
    sure, right = preferences.T
    noises = np.sort(quantized - leads)
    changes = np.searchsorted(noises, -leads, side="left") / len(noises)
    calibration = max(0.0, float(right.sum())) / max(float(sure.sum()), np.finfo(np.float64).tiny)
    return max(0.0, float(np.mean(changes * sure)) * calibration)
