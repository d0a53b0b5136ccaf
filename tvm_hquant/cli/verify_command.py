"""``hquant verify``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tvm_hquant.cli.arguments import read_inputs
from tvm_hquant.cli.progress import terminal_progress
from tvm_hquant.cli.tables import print_table

if TYPE_CHECKING:
    from tvm_hquant.verification import TensorCheck


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
    table says whether the kernel is wrong or the constants in the library are not the plan's. Layers on tensor cores that add
    floats in an order of their own are compared with the bound that is stated there, and named. Exits with 0 if everything is
    equal or within its bound, else with 1.
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
    exact = [c for c in report.checks if c.elements and not c.by_bound]
    bounded = [c for c in report.checks if c.elements and c.by_bound]
    if bounded:
        typer.echo(f"compared by bound, not bit for bit: {', '.join(c.layer for c in bounded)}")
    if outside := report.outside_contract:
        typer.echo(
            f"not compared: {len(outside)} of {len(outside) + len(exact) + len(bounded)} tensors, which TVM's own operators "
            f"make outside of the contract: {', '.join(c.layer for c in outside)}"
        )
    within = f", {_right(bounded)} of {len(bounded)} within their bound" if bounded else ""
    typer.echo(
        f"{_right(exact)} of {len(exact)} tensors equal bit for bit{within} on {report.device} ({report.samples} samples); "
        f"whole module {'equal' if report.outputs_equal else 'DIFFERENT'}"
    )
    if not report.holds:
        raise SystemExit(1)


def _right(checks: Sequence[TensorCheck]) -> int:
    """How many tensors are as they must be."""
    return sum(1 for check in checks if check.different == 0)
