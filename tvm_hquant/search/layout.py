"""Precision layouts from gradients, and the Hessian-based layout that they are compared with.

Source: D. Cheng, W. Chen, "Quantization in Layer's Input is Matter" (arXiv 2202.05137). To first order, rounding errors ε_i of
what layers read and δ_i of their weights change the loss by Σ ∂ℓ/∂h_i · ε_i + ∂ℓ/∂w_i · δ_i (Equation 3). In a trained network
the mean gradient of the weights is 0, that of what layers read is not, so (Problem 2)

    mean loss added  ≤  Σ_i ‖mean over samples of ∂ℓ/∂h_i‖ · ‖ε_i‖

* *gradient* (Algorithm 1): the layers with the larger norms get the levels with the smaller errors. ‖ε_i‖ is taken as the
  largest error of a level (:func:`~tvm_hquant.search.surrogate.largest_error`), as the paper does.
* *monotone* (Algorithm 2) is :mod:`tvm_hquant.search.monotone`.
* *after-storage* (Algorithm 3): the weights were rounded for storage, so their gradients, taken at the rounded weights, are not
  0. Where weights and inputs share a level the sum of both norms ranks the layers; else each ranks its own.
* *hawq-v2* (Z. Dong et al., NeurIPS 2020): Ω = average Hessian trace · ‖Q(W) − W‖², the least sum.

A level is given to "the layer and the output of the layer before it": here a layer's precision says in which codes it reads,
which is the same. The paper prescribes how many layers get each level (``levels`` of the problem); without levels, these
sums bound a knapsack (:mod:`tvm_hquant.search.surrogate`), which is not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from tvm_hquant.calibration.samples import DataSource, Sample
from tvm_hquant.errors import PrecisionError, SearchError
from tvm_hquant.layers import Layer
from tvm_hquant.precision import Arithmetic, Precision, parse_precision
from tvm_hquant.quantized_weights import quantize_layer_weights
from tvm_hquant.search.problem import Assignment, LayerPrecision, SearchProblem, SearchResult
from tvm_hquant.search.surrogate import (
    activation_error,
    largest_error,
    one_plan,
    search_by_prediction,
    weight_error,
    with_levels,
)
from tvm_hquant.sensitivity.gradient import GradientEvaluator
from tvm_hquant.sensitivity.hessian import average_traces
from tvm_hquant.session import QuantizationSession


@dataclass(frozen=True, eq=False)
class LayoutData:
    """A model, and the samples over which gradients are taken.

    Without labels, Algorithm 1 takes the predicted class for the label; the others take the divergence from the float model.
    """

    session: QuantizationSession
    samples: DataSource

    @cached_property
    def evaluator(self) -> GradientEvaluator:
        """Compiled when it is first needed."""
        engine = self.session.engine
        return GradientEvaluator(self.session.mod, engine.families, engine.target)

    def target(self, sample: Sample) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """The label, or what the float model gives."""
        evaluator = self.evaluator
        return evaluator.label(sample) if sample.label is not None else evaluator.probabilities(sample)


@dataclass(frozen=True, eq=False)
class GradientStrategy:
    """Algorithm 1."""

    data: LayoutData

    @property
    def name(self) -> str:
        return "gradient"

    def norms(self) -> dict[str, float]:
        """For each layer the norm of the mean gradient at what it reads."""
        evaluator = self.data.evaluator
        return _norms(evaluator.mean(self.data.samples, evaluator.label).inputs)

    def predict(self, pairs: Sequence[LayerPrecision]) -> dict[LayerPrecision, float]:
        """For each (layer, precision) the norm times the precision's largest error; of layers that are not named, nothing."""
        norms = self.norms()
        return {(layer, p): norms[layer] * largest_error(parse_precision(p)) for layer, p in pairs}

    def search(self, problem: SearchProblem) -> SearchResult:
        """Levels by falling error to layers by rising norm, or the cheapest plan for the budget.

        Raises:
            SearchError: no plan has the prescribed levels.
        """
        norms = self.norms()
        return search_by_prediction(problem, _times_error(problem, norms), lambda n: f"gradient norm {norms[n]:.3g}")


@dataclass(frozen=True, eq=False)
class AfterStorageStrategy:
    """Algorithm 3.

    Attributes:
        stored_bits: of all weights in the artifact, 2 to 8.
        shared: whether a layer's weights and its input share a level (first branch), or each gets its own (second branch).
    """

    data: LayoutData
    stored_bits: int = 8
    shared: bool = True

    @property
    def name(self) -> str:
        return "after-storage"

    def norms(self) -> tuple[dict[str, float], dict[str, float]]:
        """For each layer the norms of the mean gradients at its input and of its weights, at the weights as stored."""
        session, stored = self.data.session, parse_precision(f"w{self.stored_bits}")
        weights = {a.name: quantize_layer_weights(a, stored, session.rounding).real() for a in session.graph.anchors}
        found = self.data.evaluator.mean(self.data.samples, self.data.target, weights, of_weights=True)
        return _norms(found.inputs), _norms(found.weights)

    def search(self, problem: SearchProblem) -> SearchResult:
        """Levels by falling error to layers by rising norm, or the cheapest plan for the budget; weights stored apart.

        Joint losses and bytes are those of the weights as they are stored.

        Raises:
            SearchError: no plan has the prescribed levels.
        """
        of_inputs, of_weights = self.norms()
        if problem.evaluate_stored is not None:
            problem = replace(problem, evaluate=partial(_stored, problem.evaluate_stored, self.stored_bits))
        if problem.stored_costs is not None:
            problem = replace(problem, costs=problem.stored_costs(self.stored_bits))

        def describe(layer: str) -> str:
            return f"gradient norm of the input {of_inputs[layer]:.3g}, of the weights {of_weights[layer]:.3g}"

        if self.shared:
            sums = {name: of_inputs[name] + of_weights[name] for name in of_inputs}
            found = search_by_prediction(problem, _times_error(problem, sums), describe)
        elif problem.levels is not None:
            inputs = with_levels(problem, _times_error(problem, of_inputs))
            weights = with_levels(problem, _times_error(problem, of_weights))
            plan = {n: combined(inputs[n], weights[n], problem.candidates[n]) for n in problem.candidates}
            found = one_plan(problem, plan, describe)
        else:
            found = search_by_prediction(problem, _apart(problem, of_inputs, of_weights), describe)
        decisions = {
            name: replace(d, stored_bits=self.stored_bits)
            if parse_precision(d.precision).weight_bits > self.stored_bits
            else d
            for name, d in found.decisions.items()
        }
        return replace(found, decisions=decisions)


@dataclass(frozen=True, eq=False)
class HessianStrategy:
    """HAWQ-v2. ``draws`` and ``seed`` are Hutchinson's."""

    data: LayoutData
    draws: int = 4
    seed: int = 0

    @property
    def name(self) -> str:
        return "hawq-v2"

    def traces(self) -> dict[str, float]:
        """For each layer the average trace of its block of the Hessian; estimates below 0 count as 0."""
        samples = list(self.data.samples)
        found = average_traces(self.data.evaluator, samples, self.data.target, self.draws, self.seed)
        return {name: max(0.0, trace) for name, trace in found.items()}

    def search(self, problem: SearchProblem) -> SearchResult:
        """The least Σ Ω under the prescribed levels, or the cheapest plan for the budget.

        Raises:
            SearchError: no plan has the prescribed levels.
        """
        traces = self.traces()
        layers = self.data.session.graph.by_name
        predicted = {
            (name, p): traces[name] * squared_perturbation(layers[name], parse_precision(p))
            for name, candidates in problem.candidates.items()
            for p in candidates
        }
        return search_by_prediction(problem, predicted, lambda n: f"average Hessian trace {traces[n]:.3g}")


def _stored(
    evaluate: Callable[[Sequence[Assignment], int], Sequence[float]], bits: int, plans: Sequence[Assignment]
) -> Sequence[float]:
    return evaluate(plans, bits)


def squared_perturbation(layer: Layer, precision: Precision) -> float:
    """‖Q(W) − W‖² of a layer's weights in a precision."""
    assert layer.weights is not None
    own = layer.weights.astype(np.float64)
    if precision.name == "float32":
        return 0.0
    if precision.arithmetic is Arithmetic.FLOAT:
        bits = {"float16": 11, "bfloat16": 8}[precision.name]
        mantissa, exponent = np.frexp(own)
        rounded = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
        return float(np.sum((rounded - own) ** 2))
    codes = quantize_layer_weights(layer, precision)
    shape = (*codes.scales.shape, *[1] * (own.ndim - 1))
    total = np.sum(codes.codes.astype(np.float64) * codes.scales.astype(np.float64).reshape(shape), axis=0)
    return float(np.sum((total - own) ** 2))


def combined(inputs: str, weights: str, candidates: Sequence[str]) -> str:
    """The precision that reads as one does and has the weights of another; where there is none, the more exact of the two.

    Raises:
        SearchError: a layer may have none of these.
    """
    read, stored = parse_precision(inputs), parse_precision(weights)
    wanted: list[str] = []
    if inputs == weights:
        wanted.append(inputs)
    elif read.is_integer and stored.is_integer and not read.symmetric:
        wanted.append(f"a{read.activation_bits}w{stored.weight_bits}")
    elif read.name == "float32" and stored.weight_bits <= 8:
        wanted.append(f"w{stored.weight_bits}")
    wanted += sorted((inputs, weights), key=lambda name: largest_error(parse_precision(name)))
    for name in wanted:
        try:
            canonical = parse_precision(name).name
        except PrecisionError:
            continue
        if canonical in candidates:
            return canonical
    raise SearchError(f"a layer may be none of {', '.join(wanted)}")


def _apart(
    problem: SearchProblem, of_inputs: Mapping[str, float], of_weights: Mapping[str, float]
) -> dict[LayerPrecision, float]:
    """Errors of inputs and of weights, each times its own norm."""
    return {
        (name, p): of_inputs[name] * activation_error(parse_precision(p))
        + of_weights[name] * weight_error(parse_precision(p))
        for name, candidates in problem.candidates.items()
        for p in candidates
    }


def _times_error(problem: SearchProblem, norms: Mapping[str, float]) -> dict[LayerPrecision, float]:
    return {
        (name, p): norms[name] * largest_error(parse_precision(p))
        for name, candidates in problem.candidates.items()
        for p in candidates
    }


def _norms(gradients: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]) -> dict[str, float]:
    return {name: float(np.linalg.norm(values)) for name, values in gradients.items()}
