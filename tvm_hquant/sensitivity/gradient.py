"""Gradients of the loss with respect to what layers read and to their weights, at the float model or at other weights.

The differentiated network (:mod:`tvm_hquant.passes.differentiate`) is a network of layers, so the simulation engine runs it
with the same kernels; other weights are other constants of the same kernels and compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import IRModule

from tvm_hquant.blas_threads import one_blas_thread
from tvm_hquant.calibration.samples import Sample
from tvm_hquant.calibration.validation import check_class
from tvm_hquant.errors import DataError
from tvm_hquant.kernels.interface import KernelFamily
from tvm_hquant.layers import Layer, LayerGraph, read_layers
from tvm_hquant.operators import Conv2D, Dense
from tvm_hquant.passes.differentiate import (
    DATA_GRADIENT,
    INPUT_GRADIENT,
    LOG_PROBABILITIES,
    SUM_GRADIENT,
    TARGET,
    differentiate,
)
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.precision import FLOAT32
from tvm_hquant.relax_ir.gradient_rules import turned_weight_values
from tvm_hquant.sensitivity.weight_gradient import weight_gradient
from tvm_hquant.simulator.engine import SimulationEngine, as_calls
from tvm_hquant.simulator.kernel_cache import default_kernel_cache
from tvm_hquant.simulator.machine import CallProgram, Schedule
from tvm_hquant.simulator.program import ProgramBuilder

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
        network = partition_layers()(differentiate()(mod))
        self._engine = SimulationEngine(network, families, host_target, default_kernel_cache())
        self._graph: LayerGraph = self._engine.graph
        self._batch, self.classes = self._graph.inputs[TARGET].shape
        tensor_of = dict(zip(self._graph.output_names, self._graph.outputs, strict=True))
        names = [layer.name for layer in self.layers]
        self._read = (
            tensor_of[LOG_PROBABILITIES],
            *(tensor_of[name + INPUT_GRADIENT] for name in names),
            *(tensor_of[name + SUM_GRADIENT] for name in names),
            *(self._graph.by_name[name].inputs[0] for name in names),
        )
        self._own = self._schedule({})

    def probabilities(self, sample: Sample) -> Array:
        """The float model's probabilities of all classes for a sample, float32 [classes]."""
        logarithms, *_ = self._run(self._own, sample, np.zeros(self.classes, np.float32))
        return np.asarray(np.exp(logarithms.reshape(-1, self.classes)[0]))

    def label(self, sample: Sample) -> Array:
        """A target: 1 for the class that the sample's label names, or, without label, for the class that the model predicts.

        The divergence from the model's own output cannot stand in here: at the model itself its gradient is 0 everywhere.

        Raises:
            DataError: the label is none of the model's classes.
        """
        label = sample.label if sample.label is not None else int(self.probabilities(sample).argmax())
        check_class(label, self.classes)
        target = np.zeros(self.classes, np.float32)
        target[label] = 1.0
        return target

    @one_blas_thread()
    def mean(
        self, samples: Iterable[Sample], targets: Targets, weights: Weights | None = None, of_weights: bool = False
    ) -> MeanGradients:
        """Mean gradients over samples, at the model's weights or at others; those of weights only if asked for.

        Raises:
            DataError: there is no sample.
        """
        schedule = self._schedule(weights) if weights else self._own
        loss, count, layers = 0.0, 0, len(self.layers)
        inputs: dict[str, Floats] = {}
        by_weight: dict[str, Floats] = {}
        for sample in samples:
            target = targets(sample)
            logarithms, *tensors = self._run(schedule, sample, target)
            loss -= float(np.sum(target * logarithms.reshape(-1, self.classes)[0], dtype=np.float64))
            count += 1
            for number, layer in enumerate(self.layers):
                _accumulate(inputs, layer.name, tensors[number])
                if of_weights:
                    assert isinstance(layer.operator, (Conv2D, Dense))
                    at_sums, read = tensors[layers + number], tensors[2 * layers + number]
                    _accumulate(by_weight, layer.name, weight_gradient(layer.operator, read, at_sums))
        if not count:
            raise DataError("gradients are means over samples, but there is no sample: give at least one")
        return MeanGradients(
            loss / count,
            {name: values / count for name, values in inputs.items()},
            {name: values / count for name, values in by_weight.items()},
            count,
        )

    def _schedule(self, weights: Weights) -> Schedule:
        """The differentiated network with some weights replaced, ready to run."""
        layers = tuple(self._with_weights(layer, weights) for layer in self._graph.layers)
        graph = replace(self._graph, layers=layers)
        builder = ProgramBuilder(graph, lambda _layer, _precision: None)
        program = builder.program({layer.name: FLOAT32 for layer in layers}, {})
        self._engine.compile([program])
        for step in program.steps:
            # Names of realizations do not tell float weights apart, so layers with weights are bound anew every time.
            if not self._engine.machine.has(step.realization) or (step.layer is not None and step.layer.is_anchor):
                self._engine.machine.bind(step.realization, self._engine.bound_kernel(step))
        keys = {
            **{name: key for key, name in enumerate(graph.inputs)},
            **{step.tensor: step.key for step in program.steps},
        }
        calls = CallProgram(as_calls(program).calls, tuple(keys[name] for name in self._read))
        return self._engine.machine.schedule([calls])

    def _with_weights(self, layer: Layer, weights: Weights) -> Layer:
        name = layer.name.removesuffix(DATA_GRADIENT)
        if name not in weights or not layer.is_anchor:
            return layer
        values = weights[name]
        if name != layer.name:
            forward = self._graph.by_name[name].operator
            values = turned_weight_values(values, forward.groups if isinstance(forward, Conv2D) else 1)
        return replace(layer, weights=np.ascontiguousarray(values, np.float32))

    def _run(self, schedule: Schedule, sample: Sample, target: Array) -> tuple[Array, ...]:
        given = {**sample.inputs, TARGET: np.asarray(target, np.float32)[None]}
        # A sample alone fills the whole batch axis, so that means over the batch are those of the sample.
        inputs = [np.broadcast_to(given[name], tensor.shape) for name, tensor in self._graph.inputs.items()]
        outputs: tuple[Array, ...] = schedule.run(inputs)[0]
        return outputs


def _accumulate(sums: dict[str, Floats], name: str, values: Array) -> None:
    if name not in sums:
        sums[name] = np.zeros(values.shape, np.float64)
    sums[name] += values
