"""``hquant run``."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated

import typer


def run_command(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.", show_default=False)],
    inputs: Annotated[
        Path, typer.Option("--inputs", "-i", help=".npz with one array per input, samples first; .npy for one input.")
    ],
    outputs: Annotated[
        Path | None, typer.Option("--outputs", "-o", help=".npz to write, one array per output.")
    ] = None,
    print_time: Annotated[bool, typer.Option("--print-time", help="Print the time of one warm call.")] = False,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Calls for --print-time.")] = 20,
) -> None:
    """Run an artifact on inputs from a file."""
    import numpy as np

    from tvm_hquant.cli.arguments import read_inputs
    from tvm_hquant.errors import DataError
    from tvm_hquant.runtime import load_artifact

    loaded = load_artifact(artifact)
    arrays = read_inputs(inputs, [str(e["name"]) for e in loaded.manifest["inputs"]])
    results = loaded.run(arrays)
    if outputs is not None:
        try:
            with outputs.open("wb") as file:
                np.savez(file, **results)  # type: ignore[arg-type]
        except OSError as error:
            raise DataError(f"cannot write {outputs}: {error.strerror or error}") from None
    for name, array in results.items():
        typer.echo(f"{name}: {array.dtype} {'×'.join(map(str, array.shape))}")
    if print_time:
        times = loaded.time(arrays, repeat)
        typer.echo(f"{1e3 * median(times):.3f} ms a call (median of {repeat}, fastest {1e3 * min(times):.3f})")
