"""Quantizes a model: calibrates, measures what layers lose, searches a plan, and reports.

The shape of the API is Figure 1 of "Hierarchical Quantization Algorithm for Deep Learning Network Models": search a
strategy, make a quantizer with it, then ``simulate()`` or ``quantize()``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from tvm import IRModule

from tvm_hquant.calibration.data import open_data
from tvm_hquant.calibration.samples import DataSource, count_samples
from tvm_hquant.calibration.split import count_shared_samples, random_samples, split_calibration, two_fold
from tvm_hquant.calibration.validation import check_classes
from tvm_hquant.cost.plan_costs import OBJECTIVES, plan_costs
from tvm_hquant.cost.predicted import weight_bytes
from tvm_hquant.errors import BudgetError, SearchError
from tvm_hquant.layers import Layer
from tvm_hquant.plan import LayerDecision, PrecisionPlan
from tvm_hquant.planning import make_plan, stored_bits_of, with_stored_bits
from tvm_hquant.precision import A8W8, BFLOAT16, FLOAT16, FLOAT32, INT8, Precision, parse_precision
from tvm_hquant.report.quantization_report import LayerReport, ModelRow, QuantizationReport, SampleCounts
from tvm_hquant.search.archive import EvaluatedPlan, PlanArchive
from tvm_hquant.search.candidates import CandidateRules
from tvm_hquant.search.joint_losses import JointLosses, expected_loss, scored_by
from tvm_hquant.search.problem import (
    Assignment,
    CheckingStrategy,
    CostModel,
    SearchProblem,
    SearchResult,
    SearchStrategy,
)
from tvm_hquant.search.registry import (
    DEFAULT_STRATEGY,
    NO_SETTINGS,
    StrategyContext,
    StrategySettings,
    check_strategy,
    make_strategy,
)
from tvm_hquant.sensitivity.measured import SensitivityTable
from tvm_hquant.sensitivity.single_layers import SingleLayerPlans, suffix_precisions
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.metrics import METRICS, Metric, MetricAccumulator, make_metric, number_of_classes
from tvm_hquant.simulator.program import Program
from tvm_hquant.statistics import Interval
from tvm_hquant.target_spec import TargetSpec

BASELINES = (A8W8, INT8, FLOAT16, BFLOAT16)
"""The uniform quantizations of the paper's Table 1, printed beside the plan that was made."""

SENSITIVITY_SAMPLES = 32


@dataclass(frozen=True)
class Options:
    """How to quantize.

    Attributes:
        metric: top1, agreement, kl, mse or sqnr; by default top1 with labels and kl without.
        max_drop: the budget, in the metric's unit (:mod:`tvm_hquant.simulator.metrics`).
        precisions: what the search may choose from; by default what the target makes cheaper.
        fixed: precisions fixed by the user, for layers by name or pattern.
        seed: of the splits.
        baselines: whether to measure the uniform quantizations too.
        objective: what the search minimizes: latency, size or macs (:mod:`tvm_hquant.cost.plan_costs`).
        levels: how many layers have to get each precision, for strategies that can do that; without ``precisions`` the
            search chooses from these.
        suffix_precision: what layers behind a measured one compute in while single layers are measured; by default the fastest
            16-bit candidate, or float32 (:func:`~tvm_hquant.sensitivity.single_layers.suffix_precisions`).
        settings: what only some strategies know.

    Raises:
        BudgetError: the budget is not a number.
        PrecisionError: there is no such precision.
        SearchError: there is no such objective, or a level is none of the precisions.
    """

    metric: str | None = None
    max_drop: float = 0.01
    precisions: tuple[str, ...] | None = None
    fixed: Mapping[str, str] | None = None
    seed: int = 0
    baselines: bool = True
    objective: str = "latency"
    levels: Mapping[str, int] | None = None
    suffix_precision: str | None = None
    settings: StrategySettings = NO_SETTINGS

    def __post_init__(self) -> None:
        if math.isnan(self.max_drop):
            raise BudgetError("the loss budget max_drop is not a number: give one, such as 0.01")
        if self.objective not in OBJECTIVES:
            raise SearchError(f"unknown objective {self.objective!r}: use one of {', '.join(OBJECTIVES)}")
        if self.suffix_precision is not None:
            parse_precision(self.suffix_precision)
        chosen = None if self.precisions is None else {parse_precision(name).name for name in self.precisions}
        for name in self.levels or ():
            if chosen is not None and name not in chosen:
                raise SearchError(f"the levels have {name}, the precisions {', '.join(self.precisions or ())} have not")


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


def assign_roles(calibration: Any, evaluation: Any, session: QuantizationSession, options: Options) -> DataRoles:
    """Opens the data and splits it.

    Without evaluation data half of the calibration samples are kept aside for it. The evaluation samples are split in two
    halves: the search sees one, the report is measured on the other.

    Raises:
        DataError: data do not fit the model, there are too few samples to split, there is no such metric, or it needs labels
            that the data lacks or that are none of the model's classes.
    """
    graph, signature, seed = session.graph, session.signature, options.seed
    source = open_data(calibration, signature)
    shared = 0
    if evaluation is None:
        source, kept = split_calibration(source, 0.5, seed)
    else:
        kept = open_data(evaluation, signature)  # type: ignore[assignment]
        shared = count_shared_samples(source, kept)
    # Said now, not after the calibration, which takes long.
    if make_metric(options.metric, kept.has_labels).needs_labels:
        check_classes(kept, number_of_classes(math.prod(graph.tensor_shape(graph.outputs[0]))))
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
        self.table = SensitivityTable(session, samples, plans=lambda: self.single_layer_plans)
        self.archive = PlanArchive()
        self._losses: list[JointLosses] = []
        self.layer_times: Mapping[tuple[str, str], float] = {}

    # Search.

    @cached_property
    def rules(self) -> CandidateRules:
        """Which precisions layers may have."""
        options = self.options
        precisions = options.precisions or (tuple(options.levels) if options.levels else None)
        keep_all = options.levels is not None
        return CandidateRules(self.session, precisions, options.fixed, options.objective, keep_all)

    @cached_property
    def candidates(self) -> Mapping[str, tuple[str, ...]]:
        """The precisions that each layer with weights may have, the cheapest first.

        Raises:
            PrecisionError: a layer can have no precision at all.
        """
        return {layer.name: self.rules.of(layer) for layer in self.session.graph.anchors}

    @cached_property
    def single_layer_plans(self) -> SingleLayerPlans:
        """The plans by which single layers are measured."""
        suffix = suffix_precisions(self.session, self.candidates, self.options.suffix_precision)
        return SingleLayerPlans(list(self.candidates), suffix)

    def problem(self, with_check: bool = False, front: bool = False) -> SearchProblem:
        """What a strategy has to solve: the candidates of all layers, and the ways to measure them.

        Args:
            with_check: keeps a third of the search samples back from what plans are chosen by, and checks plans.
            front: whether a whole front is wanted; smooth losses are those of all search samples then.

        Raises:
            PrecisionError: a layer can have no precision at all.
            SearchError: there is no such objective.
        """
        anchors = self.session.graph.anchors
        costs = plan_costs(self.session, self.candidates, self.options.objective, self.layer_times)
        samples = self.roles.search
        keep_back = with_check and count_samples(samples) >= 3
        losses = JointLosses(self.session, samples, self.metric, self.options.seed, keep_back, front)
        self._losses.append(losses)

        def evaluate(assignments: Sequence[Assignment], stored_bits: int | None = None) -> list[float]:
            self._keep(assignments, losses, self._as_stored(costs, stored_bits), stored_bits)
            return losses.losses(assignments, stored_bits)

        is_accuracy = self.metric.name == "top1"
        return SearchProblem(
            self.candidates,
            self.table.measure,
            costs,
            evaluate,
            self.options.max_drop,
            losses.checked_losses if with_check else None,
            self._float_value(samples) if is_accuracy else 1.0,
            {layer.name: layer.parameter_count for layer in anchors},
            self.options.levels,
            self.options.seed,
            losses.smooth_losses,
            lambda pairs: losses.of_layers(pairs, self.single_layer_plans),
            evaluate,
            lambda pairs: self.single_layer_plans.plans(pairs),
            partial(self._as_stored, costs),
        )

    def _as_stored(self, costs: CostModel, stored_bits: int | None) -> CostModel:
        """What plans cost whose weights are stored in so many bits where a precision has more: that changes bytes alone."""
        if stored_bits is None or self.options.objective != "size":
            return costs
        return plan_costs(self.session, self.candidates, "size", stored_bits=stored_bits)

    def search(self, strategy: SearchStrategy | str | None = None, front: bool = False) -> SearchResult:
        """Finds precisions for all layers with weights; ``archive`` then holds all plans that were evaluated.

        Args:
            strategy: or its name (:data:`~tvm_hquant.search.registry.STRATEGIES`).
            front: whether a strategy that is given by its name should look for a whole front, or for one plan only.

        Raises:
            PrecisionError: a layer can have no precision at all.
            SearchError: no strategy or objective has that name, or no plan has the levels that are asked for.
        """
        if strategy is None or isinstance(strategy, str):
            check_strategy(strategy or DEFAULT_STRATEGY, self.options.levels is not None, self.options.settings)
            context = StrategyContext(self.session, self.table.samples, self.options.seed, front, self.options.settings)
            strategy = make_strategy(strategy or DEFAULT_STRATEGY, context)
        problem = self.problem(isinstance(strategy, CheckingStrategy), front)
        result = strategy.search(problem)
        chosen = {layer: decision.precision for layer, decision in result.decisions.items()}
        stored_bits = stored_bits_of(result.decisions)
        if self.archive.find(chosen, stored_bits) is None:
            self._keep([chosen], self._losses[-1], self._as_stored(problem.costs, stored_bits), stored_bits)
        decided = {
            layer.name: self._with_rules(layer, result.decisions[layer.name]) for layer in self.session.graph.anchors
        }
        remark = self._losses[-1].remark(self.options.max_drop) if isinstance(strategy, CheckingStrategy) else ""
        return replace(result, decisions={**result.decisions, **decided}, remark=remark)

    def _with_rules(self, layer: Layer, decision: LayerDecision) -> LayerDecision:
        """A search's decision with the reason that lies before the search: the user, the spec, or a missing kernel."""
        if self.rules.fixed(layer) is not None:
            return replace(decision, reason="chosen by the user", detail="")
        refusal = self.rules.refused(layer) if decision.reason in ("within budget", "no kernel") else None
        return decision if refusal is None else replace(decision, reason=refusal.reason, detail=refusal.detail)

    def _keep(
        self, assignments: Sequence[Assignment], losses: JointLosses, costs: CostModel, stored_bits: int | None
    ) -> None:
        """Notes plans in the archive, with their losses on all search samples."""
        before = self.evaluations
        found = losses.scores(assignments, stored_bits)
        after = self.evaluations
        self.archive.add(
            [
                EvaluatedPlan(
                    dict(assignment),
                    costs.total(assignment),
                    scores.loss(),
                    scores.interval,
                    scores.smooth_loss(),
                    scores.divergence,
                    stored_bits_of(with_stored_bits(assignment, stored_bits)),
                    min(before + position, after),
                )
                for position, (assignment, scores) in enumerate(zip(assignments, found, strict=True), 1)
            ]
        )

    def _float_value(self, samples: DataSource) -> float:
        scores = self.session.evaluate([self.session.float_program], samples, self.metric, "measuring float32")
        return scores[0].value

    @property
    def evaluations(self) -> int:
        """Plans that were asked for so far: single layers on calibration samples, and joint ones; each counts once."""
        return self.table.evaluations + len(frozenset().union(*(losses.digests for losses in self._losses)))

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
        metrics: list[Metric] = [*scored_by(self.metric), METRICS["agreement"]]
        scores = session.evaluate_metrics(programs, self.roles.held_out, metrics, "measuring")
        rows = tuple(
            self._row(name, p, remark, own[:-1], own[-1], plan.layers if p is program else {})
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
            self.rules.unused(),
            result.remark if result else "",
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
        scores: Sequence[MetricAccumulator],
        agreement: MetricAccumulator,
        decisions: Mapping[str, LayerDecision],
    ) -> ModelRow:
        precisions, graph = program.formats.precisions, self.session.graph
        stored = {**precisions, **{n: d.weight_precision for n, d in decisions.items()}}
        low = low_bit_share(graph.layers, precisions)
        size = sum(weight_bytes(layer, stored[layer.name]) for layer in graph.anchors)
        loss = scores[0].loss_interval() if name != "float32" else Interval(0.0, 0.0, 0.0)
        expected = expected_loss(scores)
        return ModelRow(
            name, scores[0].value, loss, expected, agreement.value, low, size, len(program.conversions), remark
        )

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
            self._is_bit_exact(decision.precision, layer.operator_kind),
        )

    def _is_bit_exact(self, precision: str, operator_kind: str) -> bool:
        spec = self.session.spec
        return spec.reason_against(precision, operator_kind) is not None or spec.is_bit_exact(precision, operator_kind)


def low_bit_share(layers: Iterable[Layer], precisions: Mapping[str, Precision]) -> float:
    """Share of the multiply-accumulates of layers that compute with codes of at most 8 bits; 0 where there are none.

    Layers that TVM computes in float32 count as what they are.
    """
    macs: Counter[bool] = Counter()
    for layer in layers:
        precision = precisions[layer.name]
        is_low_bit = precision.is_integer and max(precision.activation_bits, precision.weight_bits) <= 8
        macs[is_low_bit] += layer.macs
    return macs[True] / (macs.total() or 1)


@dataclass(frozen=True, eq=False)
class QuantizationResult:
    """What :func:`tvm_hquant.quantize` gives: the partitioned float module, the plan, the report, and the target."""

    module: IRModule
    plan: PrecisionPlan
    report: QuantizationReport | None
    spec: TargetSpec
