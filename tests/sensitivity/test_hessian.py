"""Protects the estimate of Hessian traces against the exact Hessian of a small smooth network."""

from __future__ import annotations

import numpy as np

from benchmarks.float64_network import Float64Network, cross_entropy
from tests.onnx_models import node, onnx_model, random_weights
from tests.planned_models import host_spec
from tvm_hquant.calibration.samples import Sample
from tvm_hquant.kernels.registry import families_for_target, host_instruction_sets
from tvm_hquant.layers import read_layers
from tvm_hquant.preparation import prepare_module
from tvm_hquant.sensitivity.gradient import GradientEvaluator
from tvm_hquant.sensitivity.hessian import average_traces


def test_average_traces() -> None:
    """Exact second differences in float64 against Hutchinson's estimate, and the same seed twice."""
    nodes = [
        node("Conv", "x w0", "a"), node("Tanh", "a", "b"), node("Flatten", "b", "c"), node("Gemm", "c w1", "y", transB=1),
    ]  # fmt: skip
    model = onnx_model(nodes, random_weights(w0=(3, 2, 2, 2), w1=(3, 12)), {"x": (1, 2, 3, 3)})
    mod = prepare_module(model)
    evaluator = GradientEvaluator(mod, families_for_target(host_instruction_sets()), host_spec().tvm_target())
    network = Float64Network(read_layers(mod))
    random = np.random.default_rng(0)
    samples = [Sample({"x": random.normal(size=(1, 2, 3, 3)).astype(np.float32)}, label) for label in (0, 2)]

    def loss(name: str, weights: np.ndarray) -> float:
        return float(
            np.mean(
                [cross_entropy(network.logits(s.inputs, weights={name: weights}), [s.label or 0])[0] for s in samples]
            )
        )

    estimates = [average_traces(evaluator, samples, evaluator.label, draws=10, seed=s, step=1e-2) for s in range(16)]
    for name, own in network.weights.items():
        step, trace = 1e-4, 0.0
        for index in np.ndindex(own.shape):
            moved = np.zeros_like(own)
            moved[index] = step
            trace += (loss(name, own + moved) - 2 * loss(name, own) + loss(name, own - moved)) / step**2
        values = [estimate[name] for estimate in estimates]
        error = float(np.std(values)) / np.sqrt(len(values))
        assert abs(np.mean(values) - trace / own.size) < 3 * error + 1e-3, (name, values, trace / own.size)
        assert error < 0.1 * np.max(np.abs(own))
    again = average_traces(evaluator, samples, evaluator.label, draws=2, seed=5)
    assert again == average_traces(evaluator, samples, evaluator.label, draws=2, seed=5)
    assert again != average_traces(evaluator, samples, evaluator.label, draws=2, seed=6)
