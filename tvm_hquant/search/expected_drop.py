"""The top-1 drop to expect of a plan, from few samples.

Of the samples whose class a plan changes, some get worse and some better, and the measured drop is the difference of the two
counts: on 200 samples it is mostly chance. The share of changed samples itself is known much better. So the drop to expect
is taken as that share times the part of all changes that are losses, which is pooled over all plans that the search has
evaluated (they change much the same samples) and drawn towards a typical value while there are few.
"""

from __future__ import annotations

import numpy as np

from tvm_hquant.simulator.metrics import MetricAccumulator

TYPICAL_LOSS = 0.15
"""Net losses per changed sample of networks with 60 to 90 % top-1, as seen on image classifiers."""
TYPICAL_WEIGHT = 100.0
"""Changed samples that the typical value counts for."""


class ExpectedDrop:
    """Expects the drop of one plan after the other; every plan adds to what is known."""

    def __init__(self) -> None:
        self._changed = TYPICAL_WEIGHT
        self._lost = TYPICAL_LOSS * TYPICAL_WEIGHT

    def of(self, top1: MetricAccumulator, agreement: MetricAccumulator) -> float:
        """The expected drop of the plan with these scores on the same samples, a fraction; never below 0."""
        scores = np.array(top1.scores, np.float64)
        changed = agreement.count * (1.0 - agreement.value)
        self._changed += changed
        self._lost += float(np.sum(scores[:, 0] - scores[:, 1]))
        return max(0.0, self._lost / self._changed) * changed / agreement.count
