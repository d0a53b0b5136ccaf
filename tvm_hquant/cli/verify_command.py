"""``hquant verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvm_hquant.cli.arguments import read_inputs
from tvm_hquant.cli.progress import terminal_progress
from tvm_hquant.cli.tables import print_table


def verify_command(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.", show_default=False)],
    inputs: Annotated[
        Path | None, typer.Option("--inputs", "-i", help="Samples to verify with; two random ones if not given.")
    ] = None,
    rpc: Annotated[
        str | None,
        typer.Option("--rpc", help="HOST:PORT of a TVM RPC server on the target; this machine if not given."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show equal tensors too.")] = False,
) -> None:
    """Check an artifact bit for bit, where it runs.

    Every layer's result is compared, tensor by tensor, with what docs/numerics.md says for the plan; where they differ, the
    table says whether the kernel is wrong or the constants in the library are not the plan's. Exits with 0 if everything is
    equal, else with 1.
    """
    from tvm_hquant.runtime import Artifact, load_artifact, read_manifest
    from tvm_hquant.verification import verify_artifact

    loaded = load_artifact(artifact) if rpc is None else Artifact(artifact, read_manifest(artifact))
    samples = None
    if inputs is not None:
        names = [str(e["name"]) for e in loaded.manifest["inputs"]]
        from tvm_hquant.calibration.data import open_data

        signature = {e["name"]: (tuple(e["shape"]), e["dtype"]) for e in loaded.manifest["inputs"]}
        samples = [s.inputs for s in open_data(read_inputs(inputs, names), signature, str(inputs))]
    report = verify_artifact(loaded, samples, rpc, terminal_progress())
    shown = [c for c in report.checks if verbose or c.different]
    rows = [
        (
            c.tensor,
            c.layer,
            c.kernel,
            str(c.elements),
            str(c.different),
            f"{c.largest:g}" if c.different else "",
            c.note,
        )
        for c in shown
    ]
    if rows:
        print_table(("tensor", "layer", "kernel", "elements", "different", "by at most", ""), rows)
    compared = [c for c in report.checks if c.elements]
    bad = sum(1 for c in compared if c.different)
    typer.echo(
        f"{len(compared) - bad} of {len(compared)} tensors equal bit for bit on {report.device} ({report.samples} samples); "
        f"whole module {'equal' if report.outputs_equal else 'DIFFERENT'}"
    )
    if not report.holds:
        raise SystemExit(1)
