"""``hquant profile``."""

from __future__ import annotations

from typing import Annotated

import typer

from tvm_hquant.cli.arguments import (
    Calibration,
    InputShapes,
    Model,
    Observer,
    Target,
    parse_input_shapes,
)
from tvm_hquant.cli.progress import terminal_progress
from tvm_hquant.cli.tables import Footnotes, print_table

_LONG = 40


def profile_command(
    model: Model,
    target: Target = "host",
    calibration: Calibration = None,
    precisions: Annotated[
        str, typer.Option("--precisions", help="Which to profile, with commas between.")
    ] = "a8w8,int8,a16w8,a16w16,float16,bfloat16",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to measure losses with.")] = 32,
    observer: Observer = "mean-squared-error",
    input_shapes: InputShapes = None,
) -> None:
    """Show the loss, size and time of each layer in each precision."""
    from tvm_hquant import api
    from tvm_hquant.errors import DataError
    from tvm_hquant.profiling import profile_layers

    if calibration is None:
        raise DataError("profile measures losses on calibration data: give --calibration DATA.npz")
    session = api.open_session(
        str(model),
        target,
        parse_input_shapes(input_shapes),
        observer,
        terminal_progress(),
    )
    names = tuple(p.strip() for p in precisions.split(",") if p.strip())
    profiled = profile_layers(session, calibration, names, samples)
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
    print_table(columns, rows, f"{model.name} on {target}: each layer alone in each precision")
    notes.print()
    typer.echo("times are medians of this machine's kernels, conversions not included")
