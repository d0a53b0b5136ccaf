"""Gradients of the loss with respect to what layers read and to their weights, at the float model or at other weights.

The differentiated network (:mod:`tvm_hquant.passes.differentiate`) is a network of layers, so the simulation engine runs it with
the same kernels; other weights are other constants of the same kernels and compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import IRModule

from tvm_hquant.calibration.samples import Sample
from tvm_hquant.kernels.interface import KernelFamily
from tvm_hquant.layers import Layer, LayerGraph, read_layers
from tvm_hquant.operators import Conv2D, Dense
from tvm_hquant.passes.differentiate import (
    DATA_GRADIENT,
    INPUT_GRADIENT,
    LOG_PROBABILITIES,
    LOSS,
    SUM_GRADIENT,
    TARGET,
    differentiate,
)
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.precision import FLOAT32
from tvm_hquant.relax_ir.gradient_rules import turned_weight_values
from tvm_hquant.sensitivity.weight_gradient import weight_gradient
from tvm_hquant.simulator.engine import SimulationEngine
from tvm_hquant.simulator.program import Program, ProgramBuilder

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Weights = Mapping[str, Array]
"""Weights [out_channels, in_channels / groups, kernel_h, kernel_w] of some layers, in place of the model's own."""
Targets = Callable[[Sample], Array]
"""Gives the probabilities of all classes, float32 [classes], against which the loss of a sample is taken."""


@dataclass(frozen=True, eq=False)
class MeanGradients:
    """Means over samples, float64.

    Attributes:
        loss: mean cross entropy, in nats.
        inputs: for each layer ∂loss/∂(what it reads), in the shape of one sample's tensor (channels-last, batch axis first).
        weights: for each layer ∂loss/∂W, in the shape of its weights; empty if not asked for.
        samples: how many.
    """

    loss: float
    inputs: Mapping[str, Floats]
    weights: Mapping[str, Floats]
    samples: int


class GradientEvaluator:
    """Runs the differentiated network.

    Args:
        mod: the partitioned float module.
        families, host_target: kernels and TVM target of this machine.

    Raises:
        ModelError: an operator has no gradient.
    """

    def __init__(self, mod: IRModule, families: Sequence[KernelFamily], host_target: Any) -> None:
        self.layers: tuple[Layer, ...] = read_layers(mod).anchors
        self._engine = SimulationEngine(partition_layers()(differentiate()(mod)), families, host_target)
        self._graph: LayerGraph = self._engine.graph
        self._own = self._program({})
        self._tensor_of = dict(zip(self._graph.output_names, self._graph.outputs, strict=True))
        self.classes: int = self._graph.inputs[TARGET].shape[1]
        self._batch: int = self._graph.inputs[TARGET].shape[0]

    def probabilities(self, sample: Sample, weights: Weights | None = None) -> Array:
        """The network's probabilities of all classes for a sample, float32 [classes]."""
        found = self._tensors(sample, np.zeros(self.classes, np.float32), self._program(weights or {}))
        return np.exp(found[self._tensor_of[LOG_PROBABILITIES]].reshape(-1, self.classes)[0])

    def label(self, sample: Sample) -> Array:
        """A target: 1 for the class that the sample's label names, or, without label, for the class that the model predicts.

        The divergence from the model's own output cannot stand in here: at the model itself its gradient is 0 everywhere.
        """
        label = sample.label if sample.label is not None else int(self.probabilities(sample).argmax())
        return np.eye(1, self.classes, label, dtype=np.float32)[0]

    def own_output(self, sample: Sample) -> Array:
        """A target: the probabilities of the float model, for the divergence of other weights from it."""
        return self.probabilities(sample)

    def mean(
        self, samples: Iterable[Sample], targets: Targets, weights: Weights | None = None, of_weights: bool = False
    ) -> MeanGradients:
        """Mean gradients over samples, at the model's weights or at others; those of weights only if asked for."""
        program = self._program(weights or {})
        loss, count = 0.0, 0
        inputs: dict[str, Floats] = {}
        by_weight: dict[str, Floats] = {}
        for sample in samples:
            tensors = self._tensors(sample, targets(sample), program)
            loss += float(tensors[self._tensor_of[LOSS]].reshape(()))
            count += 1
            for layer in self.layers:
                _accumulate(inputs, layer.name, tensors[self._tensor_of[layer.name + INPUT_GRADIENT]])
                if of_weights:
                    assert isinstance(layer.operator, (Conv2D, Dense))
                    read = tensors[self._graph.by_name[layer.name].inputs[0]]
                    at_sums = tensors[self._tensor_of[layer.name + SUM_GRADIENT]]
                    _accumulate(by_weight, layer.name, weight_gradient(layer.operator, read, at_sums))
        self.forget(program)
        scale = 1.0 / max(count, 1)
        return MeanGradients(
            loss * scale,
            {name: values * scale for name, values in inputs.items()},
            {name: values * scale for name, values in by_weight.items()},
            count,
        )

    def forget(self, program: Program) -> None:
        """Gives back what the weights of a program take, unless it is that of the model itself."""
        if program is not self._own:
            self._engine.forget(program)

    def _program(self, weights: Weights) -> Program:
        if not weights and hasattr(self, "_own"):
            return self._own
        layers = []
        for layer in self._graph.layers:
            name = layer.name.removesuffix(DATA_GRADIENT)
            values = weights.get(name)
            if values is not None and name != layer.name:
                forward = self._graph.by_name[name].operator
                values = turned_weight_values(values, forward.groups if isinstance(forward, Conv2D) else 1)
            layers.append(layer if values is None else replace(layer, weights=np.ascontiguousarray(values, np.float32)))
        graph = replace(self._graph, layers=tuple(layers))
        program = ProgramBuilder(graph, lambda _layer, _precision: None).program(
            {layer.name: FLOAT32 for layer in graph.layers}, {}
        )
        self._engine.compile([program])
        return program

    def _tensors(self, sample: Sample, target: Array, program: Program) -> dict[str, Array]:
        repeated = np.repeat(np.asarray(target, np.float32)[None], self._batch, axis=0)
        return self._engine.tensors({**sample.inputs, TARGET: repeated}, program)


def _accumulate(sums: dict[str, Floats], name: str, values: Array) -> None:
    if name not in sums:
        sums[name] = np.zeros(values.shape, np.float64)
    sums[name] += values
