"""``hquant profile``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvm_hquant.cli.arguments import (
    Calibration,
    InputShapes,
    Observer,
    Rounding,
    Target,
    parse_input_shapes,
    read_inputs,
)
from tvm_hquant.cli.progress import terminal_progress
from tvm_hquant.cli.tables import Footnotes, print_table

if TYPE_CHECKING:
    from tvm_hquant.profiling import ProfiledLayer
    from tvm_hquant.roofline import NetworkProfile
    from tvm_hquant.runtime import Artifact

_LONG = 40
_PRECISIONS = "a8w8,int8,a16w8,a16w16,float16,bfloat16"


def profile_command(
    model: Annotated[
        Path, typer.Argument(help="An artifact's folder, or the float model: an ONNX file.", show_default=False)
    ],
    target: Target = "host",
    calibration: Calibration = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Profile the model as it is compiled with this plan.json.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Profile the model as it is compiled in this precision.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", "-i", help="Inputs to run what is compiled on, .npz or .npy; random by default."),
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs of what is compiled.")] = 20,
    precisions: Annotated[
        str, typer.Option("--precisions", help="Which to compare, with commas between.")
    ] = _PRECISIONS,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to measure losses with.")] = 32,
    observer: Observer = "mean-squared-error",
    rounding: Rounding = "output-error",
    input_shapes: InputShapes = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file too.")] = None,
) -> None:
    """Show where the time of a compiled network goes, or what each precision would cost a model.

    For what is compiled (an artifact, or a model with --plan or --precision), every kernel: its time, work and memory
    traffic, and how near it comes to the roofline of the target spec. For a model with calibration data alone: the loss,
    size and time of each layer in each precision.
    """
    from tvm_hquant.errors import DataError, PlanError

    _check_writable(output)
    if plan is not None and precision is not None:
        raise PlanError("--plan and --precision exclude each other: give one of them")
    if model.is_dir() or plan is not None or precision is not None:
        artifact = _artifact(model, target, calibration, plan, precision, observer, rounding, input_shapes)
        _profile_compiled(artifact, inputs, repeat, output)
        return
    if calibration is None:
        raise DataError(
            "profile measures losses on calibration data: give --calibration DATA.npz; or name an artifact, "
            "--plan or --precision to see where the time of a compiled network goes"
        )
    _profile_precisions(model, target, calibration, precisions, samples, observer, rounding, input_shapes, output)


def _artifact(
    model: Path,
    target: str,
    calibration: Path | None,
    plan: Path | None,
    precision: str | None,
    observer: str,
    rounding: str,
    input_shapes: str | None,
) -> Artifact:
    from tvm_hquant import api
    from tvm_hquant.errors import PlanError
    from tvm_hquant.plan import load_plan
    from tvm_hquant.runtime import load_artifact

    if model.is_dir():
        if plan is not None or precision is not None:
            raise PlanError(f"{model} is compiled already: leave out --plan and --precision, or name the float model")
        return load_artifact(model)
    loaded = None if plan is None else load_plan(plan)
    shapes = parse_input_shapes(input_shapes)
    session = api.open_session(str(model), target, shapes, observer, terminal_progress(), rounding=rounding)
    return api.compile(api.plan_without_search(session, calibration, plan=loaded, precision=precision), name=model.name)


def _profile_compiled(artifact: Artifact, inputs: Path | None, repeat: int, output: Path | None) -> None:
    from tvm_hquant.roofline import profile_artifact

    names = [str(entry["name"]) for entry in artifact.manifest["inputs"]]
    arrays = None
    if inputs is not None:
        batch = artifact.manifest["inputs"][0]["shape"][0]
        arrays = {name: array[:batch] for name, array in read_inputs(inputs, names).items()}
    profile = profile_artifact(artifact, int(os.environ["TVM_NUM_THREADS"]), arrays, repeat)
    _print_kernels(profile)
    _write(output, profile.to_jsonable())


def _print_kernels(profile: NetworkProfile) -> None:
    rows = [
        (
            k.layer,
            k.operator,
            k.precision,
            k.kernel,
            f"{k.microseconds:.1f}",
            f"{k.microseconds / profile.kernel_microseconds:.1%}",
            f"{k.operations / 1e6:.2f}" if k.operations else "",
            f"{k.bytes / 1e3:.1f}" if k.bytes else "",
            f"{k.giga_operations_per_second:.1f}" if k.operations else "",
            "" if k.fraction is None else f"{k.fraction:.0%}",
            k.bound or "",
        )
        for k in profile.kernels
    ]
    columns = ("layer", "operator", "precision", "kernel", "µs", "of all", "million operations", "kB", "GOP/s",
               "of the roofline", "bound by")  # fmt: skip
    threads = f"{profile.threads} thread{'s' if profile.threads > 1 else ''}"
    print_table(columns, rows, f"{profile.model} for {profile.target}, {threads}: every kernel in the running network")
    covered = sum(k.microseconds for k in profile.kernels if k.fraction is not None)
    allowed = (
        f"those that the spec has rates for {covered:.0f} µs; its roofline at {profile.clock_ghz:.2f} GHz allows "
        f"{profile.possible_microseconds:.0f} µs"
        if covered
        else "and what this machine could do the spec, which describes another one, does not say"
    )
    typer.echo(
        f"\none call takes {profile.whole_microseconds:.0f} µs; watched, its kernels take "
        f"{profile.kernel_microseconds:.0f} µs, {allowed}"
    )


def _profile_precisions(
    model: Path,
    target: str,
    calibration: Path,
    precisions: str,
    samples: int,
    observer: str,
    rounding: str,
    input_shapes: str | None,
    output: Path | None,
) -> None:
    from tvm_hquant import api
    from tvm_hquant.profiling import profile_layers

    session = api.open_session(
        str(model),
        target,
        parse_input_shapes(input_shapes),
        observer,
        terminal_progress(),
        rounding=rounding,
    )
    names = tuple(p.strip() for p in precisions.split(",") if p.strip())
    profiled = profile_layers(session, calibration, names, samples)
    _print_precisions(profiled, f"{model.name} on {target}: each layer alone in each precision")
    _write(
        output,
        {
            "model": model.name,
            "target": session.spec.name,
            "layers": [{**vars(layer), "entries": [vars(entry) for entry in layer.entries]} for layer in profiled],
        },
    )


def _print_precisions(profiled: tuple[ProfiledLayer, ...], title: str) -> None:
    notes = Footnotes()
    rows = [
        (
            layer.name,
            layer.operator,
            entry.precision,
            "" if entry.loss is None else f"{entry.loss:.3g}",
            f"{entry.weight_bytes / 1e3:.1f}",
            "" if entry.microseconds is None else f"{entry.microseconds:.1f}",
            notes.mark(entry.remark) if len(entry.remark) > _LONG else entry.remark,
        )
        for layer in profiled
        for entry in layer.entries
    ]
    columns = ("layer", "operator", "precision", "loss (kl)", "weights, kB", "time here, µs", "")
    print_table(columns, rows, title)
    notes.print()
    typer.echo("times are medians of this machine's kernels, conversions not included")


def _check_writable(output: Path | None) -> None:
    from tvm_hquant.errors import DataError

    if output is not None and not output.absolute().parent.is_dir():
        raise DataError(f"cannot write {output}: there is no folder {output.absolute().parent}")


def _write(output: Path | None, document: dict[str, Any]) -> None:
    from tvm_hquant.json_text import json_text

    if output is not None:
        output.write_text(json_text(document), encoding="utf-8")
