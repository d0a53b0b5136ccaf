"""An additive model of what plans lose, corrected by what plans did lose.

Rounding errors of different layers hardly correlate, and small errors change the divergence of the output by their power, so
the smooth loss of a plan is nearly the sum of what its layers lose alone: over five decades of loss within some 10 to 15 %, if
both are measured on the same samples. What the sum misses is learned from the joint losses l of the plans evaluated so far:

    Σ_layers ratio(layer, precision) · alone(layer, precision)  ≈  l

by ridge regression of the relative errors, all ratios being drawn towards a common one. (Products of the errors of neighbours,
2·√(alone·alone), were tried as further terms; they explained nothing.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_hquant.search.problem import Assignment, LayerPrecision

_LEAST_RATIO = 0.2
"""Of the common ratio; a correction never makes a loss vanish."""


@dataclass(frozen=True)
class LossModel:
    """Predicts losses of plans.

    Attributes:
        alone: loss of the network with one layer alone in a precision; not negative.
        losses: the same, corrected; they add up to the loss of a plan.
    """

    alone: Mapping[LayerPrecision, float]
    losses: Mapping[LayerPrecision, float]

    @classmethod
    def of(cls, alone: Mapping[LayerPrecision, float]) -> LossModel:
        """Without any correction."""
        positive = {pair: max(0.0, loss) for pair, loss in alone.items()}
        return cls(positive, positive)

    def predict(self, plan: Assignment) -> float:
        """The loss of a plan."""
        return sum(self.losses[pair] for pair in plan.items())

    def fitted(self, plans: Sequence[Assignment], joint: Sequence[float]) -> LossModel:
        """The model corrected by joint losses; those of 0 and infinite ones say nothing and are left out."""
        pairs = [pair for pair, loss in self.alone.items() if 0 < loss < math.inf]
        number = {pair: n for n, pair in enumerate(pairs)}
        rows: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
        for plan, loss in zip(plans, joint, strict=True):
            if not 0 < loss < math.inf or any(math.isinf(self.alone[pair]) for pair in plan.items()):
                continue
            row = np.zeros(len(pairs))
            for pair in plan.items():
                if pair in number:
                    row[number[pair]] = self.alone[pair] / loss
            if row.any():
                rows.append(row)
        if not rows:
            return self
        features = np.array(rows)
        common = 1.0 / float(np.median(features.sum(axis=1)))
        # In the dual form, since there are fewer plans than ratios: ratio = c + Fᵀ(F·Fᵀ + 1)⁻¹(1 − c·F·1).
        missed = 1.0 - common * features.sum(axis=1)
        ratios = common + features.T @ np.linalg.solve(features @ features.T + np.eye(len(rows)), missed)
        corrected = dict(zip(pairs, np.maximum(ratios, _LEAST_RATIO * common).tolist(), strict=True))
        return LossModel(
            self.alone,
            {pair: loss * corrected[pair] if pair in corrected else loss for pair, loss in self.alone.items()},
        )
