"""``hquant tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvm_hquant.cli.progress import terminal_progress
from tvm_hquant.cli.tables import print_table


def tune_command(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.", show_default=False)],
    records: Annotated[
        Path, typer.Option("--records", help="File of tuning records to add to, one JSON object a line.")
    ],
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="Tiles to try for each kernel at most.")] = 8,
    schedules: Annotated[
        int,
        typer.Option("--schedules", min=0, help="Schedules to try for each operator that TVM computes; 0 leaves them."),
    ] = 64,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Timed calls in each of ten turns.")] = 10,
    rpc: Annotated[
        str | None,
        typer.Option("--rpc", help="HOST:PORT of a TVM RPC server on the target; this machine if not given."),
    ] = None,
) -> None:
    """Measure which tiles make the kernels of an artifact fastest, and which schedules the operators that TVM computes.

    The fastest are added to a file, and 'hquant compile --tuning-records' uses them: the module computes the same bits, sooner.
    """
    from tvm_hquant.runtime import Artifact, load_artifact, read_manifest
    from tvm_hquant.tuning.bench import open_bench
    from tvm_hquant.tuning.records import append_records, check_appendable
    from tvm_hquant.tuning.schedules import tune_schedules
    from tvm_hquant.tuning.tiles import tune_tiles

    check_appendable(records)  # what would fail at the very end is checked before the work
    loaded = load_artifact(artifact) if rpc is None else Artifact(artifact, read_manifest(artifact))
    bench = open_bench(loaded, rpc)
    tiles = tune_tiles(loaded, bench, candidates, repeat, terminal_progress())
    append_records(records, tiles)
    scheduled, left = tune_schedules(loaded, bench, schedules, repeat, terminal_progress()) if schedules else ((), ())
    append_records(records, scheduled)
    rows = [
        (
            type(r.request.operator).__name__,
            "×".join(map(str, r.request.operator.output_shape)),
            r.family,
            f"{r.expected} {r.expected_microseconds:.1f}",
            f"{r.tile} {r.microseconds:.1f}",
            f"{r.microseconds / r.expected_microseconds - 1:+.1%}",
        )
        for r in tiles
    ] + [
        (
            r.name,
            "",
            "tvm",
            f"{r.expected_microseconds:.1f}",
            f"{'a schedule' if r.trace else ''} {r.microseconds:.1f}".strip(),
            f"{r.microseconds / r.expected_microseconds - 1:+.1%}",
        )
        for r in scheduled
    ]
    if rows:
        print_table(("operator", "output", "family", "expected, µs", "fastest, µs", "difference"), rows)
    for function in left:
        typer.echo(f"{', '.join(function.function.layers)} ({function.function.name}) left as it is: {function.reason}")
    if not rows:
        typer.echo(f"no kernel had anything to choose: there is nothing to add to {records}")
        return
    typer.echo(
        f"{len(tiles) + len(scheduled)} kernels measured, {sum(1 for r in tiles if r.tile != r.expected)} faster with another "
        f"tile, {sum(1 for r in scheduled if r.trace)} with a schedule; use them "
        f"with 'hquant compile MODEL --plan {artifact / 'plan.json'} --tuning-records {records} -o OTHER'"
    )
