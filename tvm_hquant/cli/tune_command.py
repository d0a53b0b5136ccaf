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
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Timed calls in each of ten turns.")] = 10,
    rpc: Annotated[
        str | None,
        typer.Option("--rpc", help="HOST:PORT of a TVM RPC server on the target; this machine if not given."),
    ] = None,
) -> None:
    """Measure which tiles make the kernels of an artifact fastest.

    The fastest are added to a file, and 'hquant compile --tuning-records' uses them: the module computes the same bits, sooner.
    """
    from tvm_hquant.runtime import Artifact, load_artifact, read_manifest
    from tvm_hquant.tuning.measure import tune_artifact
    from tvm_hquant.tuning.records import append_records, read_records

    read_records(records)  # what would fail at the very end is checked before the work
    append_records(records, [])
    loaded = load_artifact(artifact) if rpc is None else Artifact(artifact, read_manifest(artifact))
    found = tune_artifact(loaded, candidates, repeat, rpc, terminal_progress())
    append_records(records, found)
    rows = [
        (
            type(r.request.operator).__name__,
            "×".join(map(str, r.request.operator.output_shape)),
            r.family,
            f"{r.expected} {r.expected_microseconds:.1f}",
            f"{r.tile} {r.microseconds:.1f}",
            f"{r.microseconds / r.expected_microseconds - 1:+.1%}",
        )
        for r in found
    ]
    print_table(("operator", "output", "family", "expected, µs", "fastest, µs", "difference"), rows)
    typer.echo(
        f"{len(found)} kernels measured, {sum(1 for r in found if r.tile != r.expected)} faster with another tile; use them "
        f"with 'hquant compile MODEL --plan {artifact / 'plan.json'} --tuning-records {records} -o OTHER'"
    )
