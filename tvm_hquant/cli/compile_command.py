"""``hquant compile`` and ``hquant quickstart``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from tvm_hquant.cli.arguments import (
    Calibration,
    Evaluation,
    InputShapes,
    MaxDrop,
    MetricName,
    Model,
    Objective,
    Observer,
    Rounding,
    Seed,
    Strategy,
    SuffixPrecision,
    Target,
    Verbose,
    Workers,
    parse_input_shapes,
)
from tvm_hquant.cli.progress import terminal_progress

_BUDGET_MISSED = 3


def compile_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the artifact.", show_default=False)],
    target: Target = "host",
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    metric: MetricName = None,
    max_drop: MaxDrop = 0.01,
    plan: Annotated[Path | None, typer.Option("--plan", help="Use exactly this plan.json; no search.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="One precision for all layers where the target allows it, such as a8w8; no search."
        ),
    ] = None,
    strategy: Strategy = None,
    objective: Objective = "latency",
    journal: Annotated[
        Path | None, typer.Option("--journal", help="Keep evaluations in this file, and use those in it.")
    ] = None,
    suffix_precision: SuffixPrecision = None,
    workers: Workers = None,
    tuning_records: Annotated[
        Path | None, typer.Option("--tuning-records", help="Use what 'hquant tune' wrote to this file.")
    ] = None,
    observer: Observer = "mean-squared-error",
    rounding: Rounding = "output-error",
    input_shapes: InputShapes = None,
    seed: Seed = 0,
    verbose: Verbose = False,
    dump_ir: Annotated[
        Path | None, typer.Option("--dump-ir", help="Write the module after every stage to this folder.")
    ] = None,
) -> None:
    """Quantize a float model and compile it for a target."""
    from tvm_hquant import api
    from tvm_hquant.artifact import check_linker
    from tvm_hquant.cli.report_text import print_report
    from tvm_hquant.runtime import check_destination
    from tvm_hquant.target_spec import load_target_spec
    from tvm_hquant.tuning.records import read_records

    # What would fail at the very end is checked before the work.
    _check_options(plan, precision)
    shapes = parse_input_shapes(input_shapes)
    check_destination(output)
    spec = load_target_spec(target)
    check_linker(spec)
    if tuning_records is not None:
        read_records(tuning_records)
    observe = _ir_writer(dump_ir)
    result = api.quantize(
        str(model),
        spec,
        calibration,
        evaluation,
        metric=metric,
        max_drop=max_drop,
        precision=precision,
        plan=plan,
        strategy=strategy,
        objective=objective,
        suffix_precision=suffix_precision,
        journal=journal,
        workers=workers,
        observer=observer,
        rounding=rounding,
        input_shapes=shapes,
        seed=seed,
        progress=terminal_progress(),
        observe=observe,
    )
    artifact = api.compile(result, name=model.name, observe=observe, tuning_records=tuning_records)
    artifact.save(output)
    if result.report is not None:
        print_report(result.report, verbose)
    if by_bound := [str(layer["name"]) for layer in artifact.manifest["layers"] if not layer["bit_exact"]]:
        typer.echo(
            f"within a bound of what was simulated, not bit for bit: {', '.join(by_bound)} (tensor cores add floats in an "
            "order of their own; bit_exact = true in the spec's rules keeps them off)"
        )
    elsewhere = "" if spec.is_host_compatible() else " --rpc HOST:PORT"
    typer.echo(
        f"wrote {output} for {result.spec.name}: 'hquant verify {output}{elsewhere}' checks it, "
        f"'hquant run {output} --inputs FILE.npz' runs it{' there' if elsewhere else ''}"
    )
    if result.report is not None and result.report.within_budget is False:
        sys.stdout.flush()
        typer.echo("hquant: no plan kept the loss budget: this is the best one that was found", err=True)
        raise SystemExit(_BUDGET_MISSED)


def quickstart_command() -> None:
    """Try everything on a small network that is included."""
    from tvm_hquant import api
    from tvm_hquant.cli.arguments import read_inputs
    from tvm_hquant.cli.report_text import print_report
    from tvm_hquant.quickstart import calibration_path, evaluation_path, model_path

    typer.echo("quantizing a small residual network for handwritten digits, for this machine")
    result = api.quantize(
        str(model_path()),
        "host",
        calibration_path(),
        evaluation_path(),
        progress=terminal_progress(),
    )
    assert result.report is not None
    print_report(result.report, verbose=True)
    folder = Path(tempfile.mkdtemp(prefix="hquant_quickstart_")) / "digits"
    artifact = api.compile(result).save(folder)
    digits = read_inputs(evaluation_path(), ["input", "labels"])
    logits = artifact.run({"input": digits["input"]})["logits"]
    right = float((logits.argmax(axis=1) == digits["labels"]).mean())
    typer.echo(f"\nthe compiled module has {right:.2%} of all {len(logits)} evaluation digits right")
    typer.echo(f"its artifact is {folder}")
    typer.echo(f"next: 'hquant verify {folder}', or read and edit {folder / 'plan.json'}")


def _check_options(plan: Path | None, precision: str | None) -> None:
    from tvm_hquant.errors import PlanError

    if plan is not None and precision is not None:
        raise PlanError("--plan and --precision exclude each other: give one of them")


def _ir_writer(folder: Path | None) -> Any:
    if folder is None:
        return None
    from tvm_hquant.errors import ArtifactError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot write to --dump-ir {folder}: {error.strerror or error}") from None
    numbers = iter(range(100))

    def write(stage: str, module: Any) -> None:
        path = folder / f"{next(numbers):02}_{stage}.py"
        try:
            path.write_text(module.script(), encoding="utf-8")
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None

    return write
