"""One model, one target and the data: everything that searches, reports and builds work with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from tvm import IRModule

from tvm_hquant.blas_threads import one_blas_thread
from tvm_hquant.calibration.input_moments import InputMomentsCollector
from tvm_hquant.calibration.observers import MinMaxObserver, make_observer
from tvm_hquant.calibration.ranges import CalibratedRanges, same_scale_groups
from tvm_hquant.calibration.samples import DataSource, Signature
from tvm_hquant.errors import DataError, PrecisionError
from tvm_hquant.formats import TensorScales, follow_consumers
from tvm_hquant.kernels.interface import KernelFamily
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.layers import Layer, LayerGraph
from tvm_hquant.operators import BatchMatmul
from tvm_hquant.precision import FLOAT32, INT8, Precision, parse_precision
from tvm_hquant.progress import Progress, silent_progress
from tvm_hquant.quantized_weights import QuantizedWeights, quantize_layer_weights
from tvm_hquant.rounding import bias_correction
from tvm_hquant.rounding.weight_rounding import Method, rounding_for
from tvm_hquant.simulator.engine import SimulationEngine
from tvm_hquant.simulator.evaluator import ProgramEvaluator
from tvm_hquant.simulator.journal import EvaluationJournal
from tvm_hquant.simulator.kernel_cache import default_kernel_cache
from tvm_hquant.simulator.metrics import Metric, MetricAccumulator
from tvm_hquant.simulator.program import Program, ProgramBuilder
from tvm_hquant.target_spec import TargetSpec

FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True)
class Refusal:
    """Why a layer cannot have a precision; ``detail`` says more.

    ``reason`` is ``the spec forbids`` where a rule of the spec does, and ``no kernel`` where nothing computes it: no unit
    offers it, or the layer's values do not fit it.
    """

    reason: str
    detail: str


class QuantizationSession:
    """A partitioned model with simulator and calibration.

    Args:
        mod: the partitioned module.
        spec: the target.
        families, host_target: kernels and TVM target of this machine, on which is simulated.
        observer: name of the observer for activations (:func:`make_observer`).
        progress: shows progress of long steps.
        rounding: how weights become codes, where the target's rules leave a choice.

    ``evaluator`` measures programs; give it a journal (:meth:`use_journal`) to remember them.
    """

    def __init__(
        self,
        mod: IRModule,
        spec: TargetSpec,
        families: Sequence[KernelFamily],
        host_target: Any,
        observer: str = "mean-squared-error",
        progress: Progress = silent_progress,
        rounding: Method = "output-error",
    ) -> None:
        self.mod = mod
        self.spec = spec
        self.engine = SimulationEngine(mod, families, host_target, default_kernel_cache())
        self.graph: LayerGraph = self.engine.graph
        self.builder = ProgramBuilder(self.graph, self.layer_weights)
        self.observer = observer
        self.rounding = rounding_for(spec.rules, rounding)
        self.progress = progress
        self.ranges: CalibratedRanges | None = None
        self._scales: dict[str, dict[str, Any]] = {}
        self._codes: frozenset[Precision] = frozenset()
        self._weights: dict[tuple[object, ...], QuantizedWeights] = {}
        all_float = {layer.name: FLOAT32 for layer in self.graph.layers}
        self.float_program: Program = self.builder.program(all_float, {})
        self.evaluator = ProgramEvaluator(self.engine, self.float_program, progress=progress)

    @cached_property
    def target_engine(self) -> SimulationEngine:
        """Runs programs with the target's own kernels, to time them; the target has to be one that this machine can run.

        It is ``engine`` itself unless the target leaves some of this machine's instructions unused.
        """
        families = families_for_target(self.spec.instruction_sets, self.spec.processor)
        if families == self.engine.families:
            return self.engine
        return SimulationEngine(self.mod, families, self.spec.tvm_target(), self.engine.cache)

    @property
    def signature(self) -> Signature:
        """Shapes and dtypes of the graph inputs, batch axis first."""
        return {name: (t.shape, t.dtype) for name, t in self.graph.inputs.items()}

    def layer_weights(self, layer: Layer, precision: Precision) -> QuantizedWeights | None:
        """Weight codes of a layer in a precision; None for float precisions."""
        if not layer.is_anchor or not (precision.is_integer or precision.name.startswith("w")):
            return None
        if not precision.is_integer:
            name = (layer.name, precision.name)
            if name not in self._weights:
                self._weights[name] = quantize_layer_weights(layer, precision, self.rounding)
            return self._weights[name]
        if self.ranges is None:
            return quantize_layer_weights(layer, precision, self.rounding)
        # Precisions that differ in their activations alone have the same weights.
        identity = (layer.name, precision.weight_bits, precision.point_bits, precision.terms, precision.weight_points)
        if identity not in self._weights:
            moments = self.ranges.input_moments[layer.name]
            codes = quantize_layer_weights(layer, precision, self.rounding, moments)
            self._weights[identity] = bias_correction.corrected(layer, codes, moments.means)
        return self._weights[identity]

    @one_blas_thread()
    def calibrate(self, source: DataSource, limit: int | None = None) -> CalibratedRanges:
        """Observes all tensors of the float model in one pass over the samples (at most ``limit``).

        Raises:
            DataError: an activation is NaN or infinite; the message names the tensor and the sample.
        """
        observers: dict[str, MinMaxObserver] = {}
        moments = InputMomentsCollector(self.graph.anchors)
        self.engine.compile([self.float_program])
        samples = 0
        for sample in self.progress("calibrating", islice(source, limit), _count(source, limit)):
            for name, values in self.engine.tensors(sample.inputs, self.float_program).items():
                if name not in observers:
                    made = make_observer(self.observer, name)
                    assert isinstance(made, MinMaxObserver)
                    observers[name] = made
                try:
                    observers[name].observe(values)
                except DataError as error:
                    raise DataError(f"calibration sample {samples} of {source.name}: {error}") from None
                moments.observe(name, values)
            samples += 1
        self.ranges = CalibratedRanges(observers, same_scale_groups(self.graph, observers), moments.moments(), samples)
        self._codes = frozenset()
        self._weights.clear()
        return self.ranges

    def scales(self, precisions: Iterable[Precision]) -> TensorScales:
        """Formats of all tensors for (at least) these precisions, and in int8 where products of activations read it as their
        second matrix; nothing without calibration."""
        wanted = frozenset(p for p in precisions if p.is_integer)
        if wanted and any(isinstance(layer.operator, BatchMatmul) for layer in self.graph.layers):
            wanted |= {INT8}
        if self.ranges is not None and not wanted <= self._codes:
            self._codes |= wanted
            self._scales = self.ranges.scales(sorted(self._codes))
        return self._scales

    def all_precisions(
        self,
        anchors: Mapping[str, Precision],
        fixed: Mapping[str, Precision] | None = None,
        part: LayerGraph | None = None,
    ) -> dict[str, Precision]:
        """Precisions of all layers, or those of a part of the graph, when those with weights have the given ones."""
        followed = follow_consumers(self.graph if part is None else part, anchors, fixed or {}, self.output_precision)
        return {**{name: f.precision for name, f in followed.items()}, **anchors}

    @property
    def output_precision(self) -> Precision:
        """In what layers that make graph outputs are computed: float32, or the widest that the target has."""
        if self.spec.reason_against("float32", "average_pool2d") is None:
            return FLOAT32
        offered = [parse_precision(p) for p in self.spec.offered_precisions("average_pool2d")]
        return max(offered, key=lambda p: p.activation_bits, default=FLOAT32)

    def program(
        self, anchors: Mapping[str, Precision], stored_bits: int | None = None, part: LayerGraph | None = None
    ) -> Program:
        """The program in which layers with weights have the given precisions.

        ``stored_bits`` are those of all weights in the artifact, where a precision has more; ``part`` is a part of the graph to
        look at alone.
        """
        computed = {name: precision.computed for name, precision in anchors.items()}
        precisions = self.all_precisions(computed, part=part)
        stored = {name: precision for name, precision in anchors.items() if precision.computed != precision}
        weights = partial(self._stored_weights, stored, stored_bits) if stored or stored_bits is not None else None
        return self.builder.program(precisions, self.scales(precisions.values()), weights, part)

    def _stored_weights(
        self, stored: Mapping[str, Precision], bits: int | None, layer: Layer, precision: Precision
    ) -> QuantizedWeights | None:
        own = stored.get(layer.name, precision)
        if bits is not None and layer.is_anchor and own.weight_bits > bits:
            own = precision.with_stored_weights(bits)
        return self.layer_weights(layer, own.with_stored_weights(None))

    def uniform(self, precision: Precision) -> dict[str, Precision]:
        """One precision for all layers with weights; float32 for those that cannot have it at all."""
        return {
            layer.name: precision if self.impossible(layer, precision) is None else FLOAT32
            for layer in self.graph.anchors
        }

    def impossible(self, layer: Layer, precision: Precision) -> str | None:
        """Why a layer cannot even be simulated in a precision, or None."""
        if precision.computed.name == "float16" and self.ranges is not None:
            for tensor in (*layer.inputs, layer.name):
                if (largest := self.ranges.largest_magnitude(tensor)) > FLOAT16_LARGEST:
                    return f"tensor {tensor} reaches {largest:.3g}, float16 ends at {FLOAT16_LARGEST:g}"
        if self.ranges is None and precision.needs_calibration:
            return "it needs calibration data"
        try:
            part = self.graph.around([layer.name])
            anchors = {other.name: FLOAT32 for other in part.anchors}
            self.program({**anchors, layer.name: precision}, part=part)
        except PrecisionError as error:
            return str(error)
        return None

    def refusal(self, layer: Layer, precision: Precision) -> Refusal | None:
        """Why a layer cannot be deployed in a precision, or None."""
        asked = (precision.name, layer.operator_kind, layer.name)
        forbidden = self.spec.rule_against(*asked)
        if forbidden is not None:
            return Refusal("the spec forbids", forbidden)
        against = self.spec.reason_against(*asked)
        if against is not None:
            return Refusal("no kernel", against)
        impossible = self.impossible(layer, precision)
        return Refusal("no kernel", impossible) if impossible is not None else None

    def evaluate(
        self, programs: Sequence[Program], source: DataSource, metric: Metric, description: str
    ) -> list[MetricAccumulator]:
        """Every program against the float model, on every sample."""
        return [scores[0] for scores in self.evaluate_metrics(programs, source, [metric], description)]

    def evaluate_metrics(
        self, programs: Sequence[Program], source: DataSource, metrics: Sequence[Metric], description: str
    ) -> list[list[MetricAccumulator]]:
        """For every program its scores in every metric."""
        return self.evaluator.scores(programs, source, metrics, description)

    def use_journal(self, path: Path | str) -> None:
        """Keeps all scores in a file, and finds those there that it holds.

        Raises:
            JournalError: the file cannot be used.
        """
        self.evaluator.journal = EvaluationJournal(path, self.graph.fingerprint)


def _count(source: DataSource, limit: int | None) -> int | None:
    if source.count is None:
        return limit
    return source.count if limit is None else min(limit, source.count)
