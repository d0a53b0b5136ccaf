"""Quantizes a model: calibrates, measures what layers lose, searches a plan, and reports.

The shape of the API is Figure 1 of "Hierarchical Quantization Algorithm for Deep Learning Network Models": search a
strategy, make a quantizer with it, then ``simulate()`` or ``quantize()``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from tvm import IRModule

from tvm_hquant.calibration.data import open_data
from tvm_hquant.calibration.samples import DataSource, count_samples
from tvm_hquant.calibration.split import count_shared_samples, random_samples, split_calibration, two_fold
from tvm_hquant.cost.predicted import predicted_cycles, weight_bytes
from tvm_hquant.errors import BudgetError, PrecisionError
from tvm_hquant.layers import Layer
from tvm_hquant.plan import LayerDecision, PrecisionPlan
from tvm_hquant.planning import make_plan
from tvm_hquant.precision import A8W8, BFLOAT16, FLOAT16, FLOAT32, INT8, Precision, parse_precision
from tvm_hquant.report.quantization_report import LayerReport, ModelRow, QuantizationReport, SampleCounts
from tvm_hquant.search.expected_drop import SCORES, expected_drop
from tvm_hquant.search.problem import Assignment, CostModel, SearchProblem, SearchResult, SearchStrategy
from tvm_hquant.search.registry import DEFAULT_STRATEGY, StrategyContext, make_strategy
from tvm_hquant.sensitivity.measured import SensitivityTable
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.metrics import METRICS, Metric, MetricAccumulator, make_metric
from tvm_hquant.simulator.program import Program
from tvm_hquant.statistics import Interval
from tvm_hquant.target_spec import TargetSpec

HIERARCHY: tuple[str, ...] = ("a8w8", "int8", "a16w8", "float16", "bfloat16", "a16w16", "float32")
"""The precisions that the search chooses from by default, where the target offers them."""

BASELINES = (A8W8, INT8, FLOAT16, BFLOAT16)
"""The uniform quantizations of the paper's Table 1, printed beside the plan that was made."""

SENSITIVITY_SAMPLES = 32


@dataclass(frozen=True)
class Options:
    """How to quantize.

    Attributes:
        metric: top1, agreement, kl, mse or sqnr; by default top1 with labels and kl without.
        max_drop: the budget, in the metric's unit (:mod:`tvm_hquant.simulator.metrics`).
        precisions: what the search may choose from.
        fixed: precisions fixed by the user, for layers by name or pattern.
        seed: of the splits.
        baselines: whether to measure the uniform quantizations too.
    """

    metric: str | None = None
    max_drop: float = 0.01
    precisions: tuple[str, ...] = HIERARCHY
    fixed: Mapping[str, str] | None = None
    seed: int = 0
    baselines: bool = True

    def __post_init__(self) -> None:
        if math.isnan(self.max_drop):
            raise BudgetError("the loss budget max_drop is not a number: give one, such as 0.01")


@dataclass(frozen=True)
class DataRoles:
    """Which samples do what: calibration, search, and the final measurement. No sample has two roles."""

    calibration: DataSource
    search: DataSource
    held_out: DataSource
    shared: int

    def counts(self) -> SampleCounts:
        return SampleCounts(
            count_samples(self.calibration), count_samples(self.search), count_samples(self.held_out), self.shared
        )


def assign_roles(calibration: Any, evaluation: Any, signature: Any, seed: int) -> DataRoles:
    """Opens the data and splits it.

    Without evaluation data half of the calibration samples are kept aside for it. The evaluation samples are split in two
    halves: the search sees one, the report is measured on the other.

    Raises:
        DataError: data do not fit the model, or there are too few samples to split.
    """
    source = open_data(calibration, signature)
    shared = 0
    if evaluation is None:
        source, kept = split_calibration(source, 0.5, seed)
    else:
        kept = open_data(evaluation, signature)  # type: ignore[assignment]
        shared = count_shared_samples(source, kept)
    search, held_out = two_fold(kept, seed)
    return DataRoles(source, search, held_out, shared)


class Quantizer:
    """Searches, simulates and quantizes with one session.

    Args:
        session: the model and the target; it is calibrated on first use.
        roles: the data.
        options: how to quantize.
    """

    def __init__(self, session: QuantizationSession, roles: DataRoles, options: Options) -> None:
        self.session = session
        self.roles = roles
        self.options = options
        self.metric: Metric = make_metric(options.metric, roles.search.has_labels)
        if session.ranges is None:
            session.calibrate(roles.calibration)
        samples = random_samples(roles.calibration, SENSITIVITY_SAMPLES, options.seed)
        self.table = SensitivityTable(session, samples)

    # Search.

    def candidates(self, layer: Layer) -> tuple[str, ...]:
        """Precisions that the search may give a layer, 8 bits first, then in order of predicted cost, float32 last."""
        fixed = self._fixed(layer)
        if fixed is not None:
            return (fixed,)
        spec = self.session.spec
        allowed = [p for p in self.options.precisions if self.session.refusal(layer, parse_precision(p)) is None]
        if not allowed:
            raise PrecisionError(
                f"layer {layer.name} ({layer.operator_kind}) can have none of {', '.join(self.options.precisions)} on "
                f"{spec.name}; 'hquant inspect' shows why"
            )
        # a8w8 and int8 cost the same: the one that the target prefers stands for both.
        eight = [p for p in spec.offered_precisions(layer.operator_kind) if p in allowed and p in ("a8w8", "int8")]
        others = [p for p in allowed if p not in ("a8w8", "int8")]
        others.sort(key=lambda p: (p == "float32", predicted_cycles(spec, layer, parse_precision(p))))
        return (*eight[:1], *others)

    def problem(self) -> SearchProblem:
        """What a strategy has to solve: the candidates of all layers, and the ways to measure them.

        Raises:
            PrecisionError: a layer can have no precision at all.
        """
        anchors = self.session.graph.anchors
        candidates = {layer.name: self.candidates(layer) for layer in anchors}
        return SearchProblem(
            candidates,
            self.table.measure,
            CostModel(self._costs(candidates)),
            self._joint_losses,
            self.options.max_drop,
            parameters={layer.name: layer.parameter_count for layer in anchors},
            seed=self.options.seed,
        )

    def search(self, strategy: SearchStrategy | str | None = None) -> SearchResult:
        """Finds precisions for all layers with weights.

        Args:
            strategy: or its name (:data:`~tvm_hquant.search.registry.STRATEGIES`).

        Raises:
            PrecisionError: a layer can have no precision at all.
            SearchError: no strategy has that name.
        """
        if strategy is None or isinstance(strategy, str):
            context = StrategyContext(self.session, self.table.samples, self.options.seed)
            strategy = make_strategy(strategy or DEFAULT_STRATEGY, context)
        result = strategy.search(self.problem())
        fixed = {
            layer.name: LayerDecision(result.decisions[layer.name].precision, "chosen by the user")
            for layer in self.session.graph.anchors
            if self._fixed(layer) is not None
        }
        return replace(result, decisions={**result.decisions, **fixed})

    def unused_rules(self) -> tuple[str, ...]:
        """Patterns of ``fixed`` that match no layer."""
        names = [layer.name for layer in self.session.graph.layers]
        return tuple(p for p in (self.options.fixed or {}) if not any(fnmatchcase(n, p) for n in names))

    def _fixed(self, layer: Layer) -> str | None:
        for pattern, precision in (self.options.fixed or {}).items():
            if fnmatchcase(layer.name, pattern):
                refusal = self.session.refusal(layer, parse_precision(precision))
                if refusal is not None:
                    raise PrecisionError(f"layer {layer.name} cannot be {precision}: {refusal.detail}")
                return parse_precision(precision).name
        return None

    def _costs(self, candidates: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], float]:
        layers = self.session.graph.by_name
        return {
            (name, p): predicted_cycles(self.session.spec, layers[name], parse_precision(p))
            for name, precisions in candidates.items()
            for p in precisions
        }

    def _joint_losses(self, assignments: Sequence[Assignment]) -> list[float]:
        programs = [self.session.program({name: parse_precision(p) for name, p in a.items()}) for a in assignments]
        metrics = SCORES if self.metric.name == "top1" else [self.metric]
        scores = self.session.evaluate_metrics(programs, self.roles.search, metrics, "searching")
        return [expected_drop(*own) if self.metric.name == "top1" else own[0].loss for own in scores]

    # Plan.

    def plan(self, decisions: Mapping[str, LayerDecision]) -> PrecisionPlan:
        """The plan for these decisions about layers with weights."""
        return make_plan(self.session, decisions)

    # Report.

    def report(self, plan: PrecisionPlan, model: str, result: SearchResult | None = None) -> QuantizationReport:
        """Measures the plan, the float model and the uniform quantizations on the held-out samples."""
        session = self.session
        uniform = BASELINES if self.options.baselines else ()
        named: list[tuple[str, Program, str]] = [("float32", session.float_program, "")]
        named += [(f"uniform {precision.name}", *self._uniform(precision)) for precision in uniform]
        program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
        named.append(("plan", program, ""))
        programs = [p for _, p, _ in named]
        metrics: list[Metric] = [self.metric, METRICS["agreement"]]
        scores = session.evaluate_metrics(programs, self.roles.held_out, metrics, "measuring")
        rows = tuple(
            self._row(name, p, remark, own[0], own[1], plan.layers if p is program else {})
            for (name, p, remark), own in zip(named, scores, strict=True)
        )
        kinds: dict[str, int] = {}
        for conversion in program.conversions:
            kinds[conversion.kind] = kinds.get(conversion.kind, 0) + 1
        return QuantizationReport(
            model,
            session.spec.name,
            self.metric.name,
            self.options.max_drop if result else None,
            result.within_budget if result else None,
            self.roles.counts(),
            rows,
            tuple(self._layer_report(plan, layer) for layer in session.graph.layers),
            kinds,
            self.unused_rules(),
        )

    def _uniform(self, precision: Precision) -> tuple[Program, str]:
        session = self.session
        anchors = session.uniform(precision)
        forbidden = [
            layer for layer in session.graph.anchors
            if session.spec.reason_against(precision.name, layer.operator_kind, layer.name) is not None
        ]  # fmt: skip
        in_float = sum(1 for p in anchors.values() if p == FLOAT32 != precision)
        remark = "not deployable here" if forbidden else f"{in_float} layers in float32" if in_float else ""
        return session.program(anchors), remark

    def _row(
        self,
        name: str,
        program: Program,
        remark: str,
        score: MetricAccumulator,
        agreement: MetricAccumulator,
        decisions: Mapping[str, LayerDecision],
    ) -> ModelRow:
        precisions, anchors = program.formats.precisions, self.session.graph.anchors
        stored = {**precisions, **{n: d.weight_precision for n, d in decisions.items()}}
        total = sum(layer.macs for layer in anchors) or 1
        low = sum(layer.macs for layer in anchors if is_low_bit(precisions[layer.name]))
        size = sum(weight_bytes(layer, stored[layer.name]) for layer in anchors)
        loss = score.loss_interval() if name != "float32" else Interval(0.0, 0.0, 0.0)
        return ModelRow(name, score.value, loss, agreement.value, low / total, size, len(program.conversions), remark)

    def _layer_report(self, plan: PrecisionPlan, layer: Layer) -> LayerReport:
        decision = plan.layers[layer.name]
        losses = self.table.of_layer(layer.name)
        size = weight_bytes(layer, decision.weight_precision)
        return LayerReport(
            layer.name,
            layer.operator_kind,
            decision.precision,
            decision.reason,
            decision.detail,
            layer.macs,
            size,
            losses,
        )


def is_low_bit(precision: Precision) -> bool:
    """Whether a layer computes with codes of at most 8 bits."""
    return precision.is_integer and max(precision.activation_bits, precision.weight_bits) <= 8


@dataclass(frozen=True, eq=False)
class QuantizationResult:
    """What :func:`tvm_hquant.quantize` gives: the partitioned float module, the plan, the report, and the target."""

    module: IRModule
    plan: PrecisionPlan
    report: QuantizationReport | None
    spec: TargetSpec
