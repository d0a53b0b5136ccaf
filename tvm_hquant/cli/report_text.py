"""The report of a quantization as tables for a terminal."""

from __future__ import annotations

from collections import Counter

import typer

from tvm_hquant.cli.tables import print_table
from tvm_hquant.report.quantization_report import ModelRow, QuantizationReport

_FRACTIONS = ("top1", "agreement")


def print_report(report: QuantizationReport, verbose: bool) -> None:
    """Prints the whole models, and with ``verbose`` every layer."""
    counts = report.samples
    title = (
        f"{report.model} for {report.target}: {report.metric} on {counts.held_out} held-out samples "
        f"({counts.calibration} calibrated, {counts.search} searched with)"
    )
    if verbose:
        print_layers(report)
        typer.echo()
    rows = [_row(report, row) for row in report.rows]
    expected = ("expected",) if report.metric == "top1" else ()
    columns = (
        "",
        report.metric,
        "loss (95 % interval)",
        *expected,
        "agreement",
        "MACs ≤ 8 bits",
        "weights",
        "casts",
        "",
    )
    print_table(columns, rows, title)
    precisions = Counter(layer.precision for layer in report.layers if layer.macs)
    promoted = sum(1 for layer in report.layers if layer.reason == "sensitive")
    named = ", ".join(f"{count} {name}" for name, count in precisions.most_common()) or "none"
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.conversions.items()) or "none"
    because = f", {promoted} of them promoted as sensitive" if promoted else ""
    typer.echo(f"layers with weights: {named}{because}; casts: {kinds}")
    if report.remark:
        typer.echo(f"warning: {report.remark}", err=True)
    plan = report.rows[-1]
    if report.within_budget and report.max_drop is not None and plan.loss.estimate > report.max_drop:
        typer.echo(
            f"warning: the plan kept the budget of {_amount(report, report.max_drop)} on the samples of the search, but lost "
            f"{_amount(report, plan.loss.estimate)} on those held out{_expectation(report)}; more evaluation samples tell such "
            "losses apart",
            err=True,
        )
    if counts.shared:
        typer.echo(f"warning: {counts.shared} evaluation samples are in the calibration data too", err=True)
    for pattern in report.unused_rules:
        typer.echo(f"warning: the rule {pattern!r} matches no layer", err=True)


def _expectation(report: QuantizationReport) -> str:
    if report.metric != "top1":
        return ""
    return f", where {_amount(report, report.rows[-1].expected)} is to be expected by the margins of the classes"


def print_layers(report: QuantizationReport) -> None:
    """Prints a row per layer."""
    rows = [
        (layer.name, layer.operator, layer.precision, layer.reason, f"{layer.macs / 1e6:.2f}", layer.detail)
        for layer in report.layers
    ]
    print_table(("layer", "operator", "precision", "reason", "million MACs", ""), rows, "layers")


def _row(report: QuantizationReport, row: ModelRow) -> tuple[str, ...]:
    loss = f"{_amount(report, row.loss.estimate)} ({_amount(report, row.loss.low)} … {_amount(report, row.loss.high)})"
    return (
        row.name,
        _amount(report, row.value),
        "" if row.name == "float32" else loss,
        *([] if report.metric != "top1" else [""] if row.name == "float32" else [_amount(report, row.expected)]),
        f"{row.agreement:.2%}",
        f"{row.low_bit_macs:.0%}",
        f"{row.weight_bytes / 1e6:.2f} MB",
        str(row.conversions),
        row.remark,
    )


def _amount(report: QuantizationReport, value: float) -> str:
    return f"{value:.2%}" if report.metric in _FRACTIONS else f"{value:.4g}"
