"""``hquant inspect``."""

from __future__ import annotations

from rich.console import Console

from tvm_hquant.cli.arguments import InputShapes, Model, Target, Verbose, parse_input_shapes
from tvm_hquant.cli.progress import terminal_progress
from tvm_hquant.cli.tables import print_table


def inspect_command(
    model: Model, target: Target = "host", input_shapes: InputShapes = None, verbose: Verbose = False
) -> None:
    """Show every operator: its layer, the precisions that it may have on a target, and why not others."""
    from tvm_hquant import api
    from tvm_hquant.inspection import inspect_layers

    session = api.open_session(
        str(model),
        target,
        parse_input_shapes(input_shapes),
        progress=terminal_progress(Console(stderr=True)),
    )
    inspected = inspect_layers(session)
    rows = [
        (
            entry.name,
            entry.operator,
            "×".join(map(str, entry.output_shape)),
            " ".join(entry.allowed) or "none",
            "; ".join(f"{' '.join(names)}: {why}" for why, names in entry.refused.items()),
        )
        for entry in inspected
    ]
    print_table(("layer", "operator", "output", "may have", "may not have, and why"), rows, f"{model.name} on {target}")
