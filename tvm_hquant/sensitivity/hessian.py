"""Average traces of the Hessian's diagonal blocks, by Hutchinson's estimator.

Source: Z. Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020, Equation 6 and
Algorithm 2: Tr(H) = E[vᵀHv] for random v of independent signs.

Hv is the difference of the gradients at W + δv and W − δv over 2δ, so it needs no second derivatives. All layers are moved at
once, each by signs of its own: in the estimate for one layer the terms with the signs of the others have the mean 0. δ is a
small part of the root mean square of a layer's weights. Where the network is piecewise linear, as with ReLU, differences
see its bends, which a derivative at one point would miss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_hquant.calibration.samples import Sample
from tvm_hquant.sensitivity.gradient import GradientEvaluator, Targets


def average_traces(
    evaluator: GradientEvaluator,
    samples: Sequence[Sample],
    targets: Targets,
    draws: int = 8,
    seed: int = 0,
    step: float = 1e-3,
) -> dict[str, float]:
    """For each layer the trace of its block of the Hessian of the mean loss, over the number of its weights.

    Args:
        evaluator: of the network.
        samples, targets: over which the loss is taken.
        draws: random vectors; each costs two gradients for every sample.
        seed: of the signs; equal seeds give equal traces.
        step: δ over the root mean square of a layer's weights.

    Returns:
        Nats per squared unit of a weight. An estimate may be below 0.
    """
    random = np.random.default_rng(seed)
    weights = {layer.name: layer.weights for layer in evaluator.layers if layer.is_anchor and layer.weights is not None}
    deltas = {
        name: step * max(float(np.sqrt(np.mean(w.astype(np.float64) ** 2))), 1e-12) for name, w in weights.items()
    }
    sums = dict.fromkeys(weights, 0.0)
    for _ in range(draws):
        signs = {name: random.integers(0, 2, w.shape) * 2.0 - 1.0 for name, w in weights.items()}
        above, below = (
            evaluator.mean(
                samples,
                targets,
                {name: (w + side * deltas[name] * signs[name]).astype(np.float32) for name, w in weights.items()},
                of_weights=True,
            ).weights
            for side in (1, -1)
        )
        for name in weights:
            product = float(np.sum(signs[name] * (above[name] - below[name])))
            sums[name] += product / (2 * deltas[name] * weights[name].size)
    return {name: total / draws for name, total in sums.items()}
