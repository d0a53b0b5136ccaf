"""The functions that a user calls; ``import tvm_hquant as hq`` has them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm import IRModule

from tvm_hquant.artifact import compile_artifact
from tvm_hquant.calibration.data import open_data
from tvm_hquant.calibration.observers import make_observer
from tvm_hquant.compilation import StageObserver, lower
from tvm_hquant.cost.measured import remembered_layer_times
from tvm_hquant.cpu_features import cpu_identity
from tvm_hquant.errors import DataError
from tvm_hquant.front import Front, FrontWriter
from tvm_hquant.kernels.registry import families_for_target, host_instruction_sets
from tvm_hquant.plan import PrecisionPlan, load_plan
from tvm_hquant.planning import make_plan, uniform_decisions, with_calibration
from tvm_hquant.precision import Precision, parse_precision
from tvm_hquant.preparation import prepare_module
from tvm_hquant.progress import Progress, silent_progress
from tvm_hquant.quantizer import Options, QuantizationResult, Quantizer, assign_roles
from tvm_hquant.report.quantization_report import QuantizationReport
from tvm_hquant.rounding.weight_rounding import check_method
from tvm_hquant.runtime import Artifact, check_folder
from tvm_hquant.search.problem import SearchResult, SearchStrategy
from tvm_hquant.search.registry import DEFAULT_STRATEGY, check_strategy
from tvm_hquant.search.uniform import UniformStrategy
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.runner import available_cores
from tvm_hquant.target_spec import TargetSpec, detect_host, load_target_spec
from tvm_hquant.tuning.records import Record, records_for


def open_session(
    model: Any,
    spec: TargetSpec | str,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    observer: str = "mean-squared-error",
    progress: Progress = silent_progress,
    observe: StageObserver | None = None,
    rounding: str = "output-error",
) -> QuantizationSession:
    """Imports and partitions a model and prepares its simulation on this machine for a target.

    Args:
        model: path of an ONNX file, an ``onnx.ModelProto`` or a Relax ``IRModule``.
        spec: a target spec, or the name or path of one.
        input_shapes: fixes dynamic dimensions by input name.
        observer: for activations: min-max, percentile, mean-squared-error or power-of-two.
        progress: wraps long loops, to show progress.
        observe: called with every stage's name and module.
        rounding: of weights: output-error, nearest, floor or power-of-two.

    Raises:
        ModelError, TargetSpecError: the model or the spec cannot be read.
        PrecisionError: there is no such rounding.
        DataError: there is no such observer.
    """
    method = check_method(rounding)
    make_observer(observer, "any")
    spec = load_target_spec(spec) if isinstance(spec, str) else spec
    if spec.rules.power_of_two_scales:
        observer = "power-of-two"
    mod = prepare_module(model, input_shapes, observe)
    # A target that this machine could run may leave its better instructions unused: the simulation does not.
    is_host = spec.instruction_sets == host_instruction_sets() and spec.is_host_compatible()
    host = spec if is_host else detect_host()
    return QuantizationSession(
        mod,
        spec,
        families_for_target(host.instruction_sets, host.processor),
        host.tvm_target(),
        observer,
        progress,
        method,
    )


def quantize(
    model: Any,
    spec: TargetSpec | str,
    calibration: Any = None,
    evaluation: Any = None,
    *,
    metric: str | None = None,
    max_drop: float = 0.01,
    precision: str | None = None,
    plan: PrecisionPlan | Path | str | None = None,
    precisions: Sequence[str] | None = None,
    fixed: Mapping[str, str] | None = None,
    strategy: SearchStrategy | str | None = None,
    objective: str = "latency",
    suffix_precision: str | None = None,
    journal: Path | str | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    observer: str = "mean-squared-error",
    rounding: str = "output-error",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    baselines: bool | None = None,
    progress: Progress = silent_progress,
    observe: StageObserver | None = None,
) -> QuantizationResult:
    """Quantizes a float model for a target.

    Args:
        model, spec, input_shapes, observer, rounding, progress, observe: as in :func:`open_session`.
        calibration: data to calibrate with: a path (``.npz``, ``.npy``, directory), arrays by input name, or an iterable.
            Weight-only and float precisions, and a plan that holds all scales, need none.
        evaluation: data to search and to measure with; half of the calibration samples if not given.
        metric: top1, agreement, kl, mse or sqnr; top1 with labels and kl without by default.
        max_drop: the loss budget in the metric's unit.
        precision: this one for all layers where the target allows it, instead of a search.
        plan: exactly this plan instead of a search.
        precisions: what the search may choose from.
        fixed: precisions for layers by name or pattern (``{"head*": "float32"}``).
        strategy: how to search, or the name of one (:data:`~tvm_hquant.search.registry.STRATEGIES`).
        objective: what the search makes small beside the loss: latency, size or macs.
        suffix_precision: what layers behind a measured one compute in while single layers are measured
            (:mod:`tvm_hquant.sensitivity.single_layers`).
        journal: file in which evaluations are kept and found, such as that of a search; None: nowhere.
        executor, workers: as in :func:`search_front`.
        seed: of the splits of the data.
        baselines: whether the report measures the uniform quantizations too; by default all but where ``precision`` names one.

    Raises:
        HQuantError: a subclass that says what is wrong with model, spec, data or plan.
    """
    options = Options(
        metric,
        max_drop,
        tuple(precisions) if precisions else None,
        fixed,
        seed,
        precision is None if baselines is None else baselines,
        objective,
        suffix_precision=suffix_precision,
    )
    if isinstance(strategy, str):
        check_strategy(strategy)
    session = open_session(model, spec, input_shapes, observer, progress, observe, rounding)
    _use_for_evaluations(session, journal, executor, workers)
    name = Path(model).name if isinstance(model, (str, Path)) else "model"
    if isinstance(plan, (str, Path)):
        plan = load_plan(plan)
    if plan is not None and evaluation is not None:
        return _with_plan(session, plan, calibration, evaluation, name, Options(metric, max_drop, seed=seed))
    if plan is not None or calibration is None:
        return plan_without_search(session, calibration, plan=plan, precision=precision)
    if precision is not None:
        wanted = parse_precision(precision).name
        options = replace(options, precisions=(wanted, "float32"))
        strategy = UniformStrategy(wanted)
    roles = assign_roles(calibration, evaluation, session, options)
    quantizer = Quantizer(session, roles, options)
    found = quantizer.search(strategy)
    made = quantizer.plan(found.decisions)
    return QuantizationResult(session.mod, made, quantizer.report(made, name, found), session.spec)


def compile(
    result: QuantizationResult,
    *,
    name: str | None = None,
    observe: StageObserver | None = None,
    tuning_records: Path | str | None = None,
) -> Artifact:
    """Compiles a quantized model for its target.

    ``tuning_records`` is a file of measured tiles and schedules (:mod:`tvm_hquant.tuning`); the module computes the same with
    and without.

    Raises:
        ToolchainError: a compiler or linker for the target is missing.
        TuningError: the file cannot be read, or holds no records of the target's CPU.
    """
    label = name or (result.report.model if result.report else "model")
    tuning: tuple[Record, ...] = ()
    if tuning_records is not None:
        here = cpu_identity() if result.spec.is_host_compatible() else None
        tuning = records_for(Path(tuning_records), here)
    return compile_artifact(result.module, result.plan, result.spec, result.report, label, observe, tuning)


def search_strategy(
    model: Any, spec: TargetSpec | str, calibration: Any, evaluation: Any = None, **options: Any
) -> tuple[SearchResult, Quantizer]:
    """Searches precisions (the paper's Figure 1, ``search_quantize_strategy``); gives them with the quantizer that did.

    ``options`` are the fields of :class:`tvm_hquant.quantizer.Options`.
    """
    session = open_session(model, spec)
    chosen = Options(**options)
    quantizer = Quantizer(session, assign_roles(calibration, evaluation, session, chosen), chosen)
    return quantizer.search(), quantizer


def search_front(
    model: Any,
    spec: TargetSpec | str,
    calibration: Any,
    evaluation: Any,
    folder: Path | str,
    *,
    strategy: str = DEFAULT_STRATEGY,
    options: Options | None = None,
    measure_times: bool = True,
    journal: Path | str | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    observer: str = "mean-squared-error",
    rounding: str = "output-error",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = silent_progress,
) -> Front:
    """Searches the Pareto front of loss and latency, size or operations, and writes it into a folder.

    The folder gets ``front.json`` (a list of :class:`~tvm_hquant.front.FrontPoint`), the plans, ``best.json``, the plan that
    keeps the budget best, and ``front.png``. It holds the best plans so far at any time. What was evaluated stays in
    ``journal.sqlite``: a search that was killed goes on where it was, another strategy starts with what this one has paid.

    Args:
        model, spec, calibration, evaluation, observer, rounding, input_shapes, progress: as in :func:`quantize`.
        folder: is made if there is none.
        strategy: one of :data:`~tvm_hquant.search.registry.STRATEGIES`.
        options: metric, budget, objective, precisions, levels, seed, suffix precision.
        measure_times: whether times of layers and plans are measured, where this machine is the target.
        journal: another file than ``journal.sqlite`` in the folder.
        executor: does the evaluations: anything like ``concurrent.futures.Executor`` with processes for workers, such as
            ``distributed.Client.get_executor()``. Without one, processes of this machine do the large ones.
        workers: how many the executor has, or how many processes there may be; by default one for each core.

    Raises:
        HQuantError: a subclass that says what is wrong with model, spec, data, options or files.
    """
    folder, options = Path(folder), options or Options()
    check_strategy(strategy, options.levels is not None, options.settings)
    check_folder(folder, "front")
    session = open_session(model, spec, input_shapes, observer, progress, rounding=rounding)
    roles = assign_roles(calibration, evaluation, session, options)
    _use_for_evaluations(session, journal or folder / "journal.sqlite", executor, workers)
    folder.mkdir(parents=True, exist_ok=True)
    quantizer = Quantizer(session, roles, options)
    measure = measure_times and session.spec.is_timed_here()
    if measure and options.objective == "latency":
        candidates = {layer.name: quantizer.rules.of(layer) for layer in session.graph.anchors}
        sample = next(iter(roles.calibration))
        times = remembered_layer_times(folder / "layer_times.json", session, candidates, sample)
        quantizer.layer_times = times.microseconds
        session.spec = session.spec.at_clocks(times.clocks_ghz)
    writer = FrontWriter(quantizer, folder, strategy, measure)
    quantizer.archive.on_change = writer.write_partial
    return writer.write(quantizer.search(strategy, front=True))


def _use_for_evaluations(
    session: QuantizationSession, journal: Path | str | None, executor: Executor | None, workers: int | None
) -> None:
    if journal is not None:
        session.use_journal(journal)
    if executor is not None:
        session.evaluator.use_executor(executor, workers or available_cores())
    elif workers is not None:
        session.evaluator.use_processes(workers)


def create_quantizer(quantizer: Quantizer, strategy: SearchResult) -> PlannedQuantizer:
    """A quantizer for one found strategy (the paper's Figure 1)."""
    return PlannedQuantizer(quantizer, quantizer.plan(strategy.decisions))


class PlannedQuantizer:
    """``simulate()`` measures a plan with the kernels of deployment, ``quantize()`` gives what is compiled."""

    def __init__(self, quantizer: Quantizer, plan: PrecisionPlan) -> None:
        self.quantizer = quantizer
        self.plan = plan

    def simulate(self) -> QuantizationReport:
        """The report of the plan on the held-out samples."""
        return self.quantizer.report(self.plan, "model")

    def quantize(self) -> QuantizationResult:
        """The quantized model, ready for :func:`compile`."""
        session = self.quantizer.session
        return QuantizationResult(session.mod, self.plan, self.simulate(), session.spec)


def lowered_module(result: QuantizationResult) -> IRModule:
    """The module after all passes, ready for ``tvm.compile`` with the spec's target."""
    return lower(
        result.module,
        result.plan,
        result.spec,
        families_for_target(result.spec.instruction_sets, result.spec.processor),
    )


def plan_without_search(
    session: QuantizationSession,
    calibration: Any = None,
    *,
    plan: PrecisionPlan | None = None,
    precision: str | None = None,
) -> QuantizationResult:
    """A given plan, or one precision for all layers where the target allows it; nothing is searched or measured.

    Args:
        calibration: gives the scales that the precision needs; with a plan, takes the place of its own.

    Raises:
        DataError: the precision needs calibration data, or there is neither plan nor precision.
        PlanError, PrecisionError: the plan is for another model, or the precision is unknown or impossible.
    """
    if plan is not None:
        plan.check_model(session.graph)
    wanted = None if plan is not None else _precision_without_search(precision, calibration is not None)
    if calibration is not None:
        session.calibrate(open_data(calibration, session.signature))
    if plan is None:
        assert wanted is not None
        plan = make_plan(session, uniform_decisions(session, wanted))
    else:
        plan = with_calibration(session, plan) if calibration is not None else plan
        plan = plan.completed(session.graph, session.rounding)
    return QuantizationResult(session.mod, plan, None, session.spec)


def _with_plan(
    session: QuantizationSession, plan: PrecisionPlan, calibration: Any, evaluation: Any, name: str, options: Options
) -> QuantizationResult:
    """A given plan, measured on evaluation data."""
    if calibration is None:
        raise DataError(
            "evaluation data without calibration data: the uniform quantizations that the plan is measured beside need "
            "both; give --calibration too, or leave --evaluation out"
        )
    roles = assign_roles(calibration, evaluation, session, options)
    result = plan_without_search(session, roles.calibration, plan=plan)
    report = Quantizer(session, roles, options).report(result.plan, name)
    return replace(result, report=report)


def _precision_without_search(precision: str | None, has_calibration: bool) -> Precision:
    if precision is None:
        raise DataError("no calibration data: give --calibration, or a precision that needs none (w8 … w2, float32)")
    wanted = parse_precision(precision)
    if wanted.needs_calibration and not has_calibration:
        raise DataError(
            f"{wanted.name} needs calibration data: give --calibration, or use w8 … w2 or a float precision"
        )
    return wanted
