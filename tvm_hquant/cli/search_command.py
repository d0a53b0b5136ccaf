"""``hquant search``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Workers,
    parse_input_shapes,
)
from tvm_hquant.cli.progress import terminal_progress
from tvm_hquant.cli.tables import print_table

if TYPE_CHECKING:
    from tvm_hquant.front import Front

_BUDGET_MISSED = 3


def search_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the front.", show_default=False)],
    target: Target = "host",
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    strategy: Strategy = None,
    objective: Objective = "latency",
    metric: MetricName = None,
    max_drop: MaxDrop = 0.01,
    precisions: Annotated[
        str | None,
        typer.Option("--precisions", help="Which to choose from, with commas between: a8w8,a8w4,bfloat16."),
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option("--levels", help="How many layers get each precision: float32:4,bfloat16:8."),
    ] = None,
    times: Annotated[
        str,
        typer.Option(
            "--times", help="Where times come from: measured, where this machine is the target, or predicted."
        ),
    ] = "measured",
    journal: Annotated[
        Path | None, typer.Option("--journal", help="Where evaluations are kept; journal.sqlite in the folder.")
    ] = None,
    suffix_precision: SuffixPrecision = None,
    ranking: Annotated[
        str,
        typer.Option(
            "--ranking",
            help="What the strategy hierarchical ranks layers by: measured (each layer's loss) or gradient (predicted by its "
            "gradient).",
        ),
    ] = "measured",
    beta: Annotated[
        str,
        typer.Option(
            "--beta",
            help="Weight of the number of quantized parameters in the objective of greedy and lazy-greedy: a number, or tuned.",
        ),
    ] = "0",
    stored_bits: Annotated[
        int, typer.Option("--stored-bits", help="Of all weights in the file, 2 to 8, for the strategy after-storage.")
    ] = 8,
    storage_apart: Annotated[
        bool,
        typer.Option(
            "--storage-apart",
            help="Inputs and weights of a layer get levels of their own in the strategy after-storage.",
        ),
    ] = False,
    complexity: Annotated[
        float | None,
        typer.Option(
            "--complexity",
            help="The largest cost, in the unit of the objective, for which the strategy multipoint looks for the least loss.",
        ),
    ] = None,
    workers: Workers = None,
    observer: Observer = "mean-squared-error",
    rounding: Rounding = "output-error",
    input_shapes: InputShapes = None,
    seed: Seed = 0,
) -> None:
    """Search the Pareto front of loss and latency, size or operations.

    The folder gets front.json, the plans (for compile --plan), best.json for the budget, and a plot. A search that was
    interrupted goes on where it was.
    """
    from tvm_hquant import api
    from tvm_hquant.errors import DataError, SearchError
    from tvm_hquant.quantizer import Options
    from tvm_hquant.search.registry import DEFAULT_STRATEGY, StrategySettings

    if calibration is None:
        raise DataError("a search measures losses: give --calibration DATA.npz")
    if times not in ("measured", "predicted"):
        raise SearchError(f"unknown --times {times!r}: use measured or predicted")
    names = None if precisions is None else tuple(p.strip() for p in precisions.split(",") if p.strip())
    if names == ():
        raise SearchError(f"--precisions {precisions!r} names none: write a8w8,a8w4,bfloat16, or leave it out")
    settings = StrategySettings(ranking, parse_beta(beta), stored_bits, storage_apart, complexity)
    options = Options(
        metric, max_drop, names, None, seed, False, objective, parse_levels(levels), suffix_precision, settings
    )
    front = api.search_front(
        str(model),
        target,
        calibration,
        evaluation,
        output,
        strategy=strategy or DEFAULT_STRATEGY,
        options=options,
        measure_times=times == "measured",
        journal=journal,
        workers=workers,
        observer=observer,
        rounding=rounding,
        input_shapes=parse_input_shapes(input_shapes),
        progress=terminal_progress(),
    )
    _print_front(front)
    typer.echo(
        f"wrote {output}: 'hquant compile {model} --plan {output / 'best.json'} -o FOLDER' compiles the best plan"
    )
    if front.remark:
        typer.echo(f"warning: {front.remark}", err=True)
    if not front.within_budget:
        sys.stdout.flush()
        typer.echo("hquant: no plan kept the loss budget: best.json is the best one that was found", err=True)
        raise SystemExit(_BUDGET_MISSED)


def parse_beta(text: str) -> float | None:
    """A number, or None for ``tuned``.

    Raises:
        SearchError: the text is neither.
    """
    from tvm_hquant.errors import SearchError

    if text == "tuned":
        return None
    try:
        return float(text)
    except ValueError:
        raise SearchError(f"--beta {text!r} is no number: give one, such as 0.025, or tuned") from None


def parse_levels(text: str | None) -> dict[str, int] | None:
    """``"float32:4,bfloat16:8"`` as a dict.

    Raises:
        SearchError: the text has another form, or a precision stands in it twice.
        PrecisionError: there is no such precision.
    """
    from tvm_hquant.errors import SearchError
    from tvm_hquant.precision import parse_precision

    if text is None:
        return None
    levels: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = part.strip().partition(":")
        if not re.fullmatch("[0-9]+", count):
            raise SearchError(f"--levels {text!r} has the wrong form: write float32:4,bfloat16:8")
        precision = parse_precision(name).name
        if precision in levels:
            raise SearchError(f"--levels {text!r} names {precision} twice: give each precision one count")
        levels[precision] = int(count)
    return levels


def _print_front(front: Front) -> None:
    from tvm_hquant.search.joint_losses import smooth_metric
    from tvm_hquant.simulator.metrics import METRICS

    smooth = smooth_metric(METRICS[front.metric]).name
    source = front.points[0].latency_source
    columns: dict[str, list[str]] = {"plan": [point.plan for point in front.points]}
    if front.metric == "top1":
        columns["expected (held-out)"] = [
            f"{point.expected_loss:.3g} ({point.holdout_expected_loss:.3g})" for point in front.points
        ]
    columns[f"{front.metric} loss (95 %)"] = [_amount(point.loss, point.loss_interval) for point in front.points]
    columns["on held-out samples"] = [_amount(point.holdout_loss, point.holdout_interval) for point in front.points]
    if front.metric != smooth:
        columns[f"{smooth} (held-out)"] = [
            f"{point.divergence:.3g} ({point.holdout_divergence:.3g})" for point in front.points
        ]
    columns[f"ms ({source})"] = [f"{point.latency_ms:.4g}" for point in front.points]
    columns["MB"] = [f"{point.bytes / 1e6:.4g}" for point in front.points]
    columns["MACs ≤ 8 bits"] = [f"{point.int8_mac_share:.0%}" for point in front.points]
    columns[""] = ["best" if point == front.best else "" for point in front.points]
    title = f"{front.strategy}, {front.objective}: {front.points[0].evaluations} evaluations"
    print_table(tuple(columns), list(zip(*columns.values(), strict=True)), title)


def _amount(loss: float | None, interval: tuple[float, float] | None) -> str:
    return "" if loss is None or interval is None else f"{loss:.4g} ({interval[0]:.4g} … {interval[1]:.4g})"
