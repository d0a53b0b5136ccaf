"""``hquant inspect``."""

from __future__ import annotations

import re

from tvm_hquant.cli.arguments import InputShapes, Model, Target, parse_input_shapes
from tvm_hquant.cli.progress import terminal_progress
from tvm_hquant.cli.tables import Footnotes, print_table, shortened_names

_PRECISION_AND_OPERATOR = re.compile(r"(forbids|computes) \S+ (?:for|in) [^\s:]+")


def inspect_command(model: Model, target: Target = "host", input_shapes: InputShapes = None) -> None:
    """Show what each layer may have on a target, and why not more."""
    from tvm_hquant import api
    from tvm_hquant.inspection import inspect_layers

    session = api.open_session(
        str(model),
        target,
        parse_input_shapes(input_shapes),
        progress=terminal_progress(),
    )
    notes = Footnotes()
    rows = []
    for layer in inspect_layers(session):
        refused: dict[str, list[str]] = {}
        for why, names in layer.refused.items():
            refused.setdefault(notes.mark(_shortened(why)), []).extend(names)
        rows.append(
            (
                layer.name,
                layer.operator,
                "×".join(map(str, layer.output_shape)),
                shortened_names(layer.allowed) or "none",
                "; ".join(f"{shortened_names(names)} {mark}" for mark, names in refused.items()),
            )
        )
    print_table(("layer", "operator", "output", "may have", "may not have"), rows, f"{model.name} on {target}")
    notes.print()


def _shortened(reason: str) -> str:
    """A spec's reason without the precision and the operator, which the row names."""
    return _PRECISION_AND_OPERATOR.sub(r"\1 it", reason)
