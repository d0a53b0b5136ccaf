"""``hquant targets``: lists, shows, detects and checks target specs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tvm_hquant.cli.tables import print_table
from tvm_hquant.errors import HQuantError, TargetSpecError

if TYPE_CHECKING:
    from tvm_hquant.target_spec import TargetSpec

targets_app = typer.Typer(help="List, show, detect and check target specs.", no_args_is_help=True)

_DETECTED_HEADER = (
    "# Detected from this machine's CPU flags and a short measurement; docs/target-spec.md explains every field.\n"
    "# Rates per cycle come from the shipped spec that the description names: replace them where you have measured.\n\n"
)


@targets_app.command("list")
def list_command() -> None:
    """List the target specs that ship with hquant."""
    from tvm_hquant.target_spec import list_target_specs, load_target_spec

    rows = []
    for name in list_target_specs():
        spec = load_target_spec(name)
        problems = spec.host_problems()
        rows.append((name, spec.description, "no: " + "; ".join(problems) if problems else "yes"))
    print_table(("name", "description", "runs on this machine"), rows)


@targets_app.command("instruction-sets")
def instruction_sets_command() -> None:
    """List the instruction sets that a spec can name, the preferred first."""
    from tvm_hquant.cpu_features import cpu_features
    from tvm_hquant.kernels.instruction_set import load_instruction_sets

    features = cpu_features()
    rows = []
    for found in load_instruction_sets():
        lacking = sorted(found.cpu_features - features)
        has = "no" if lacking else "yes" if found.target_kind == "llvm" else ""
        needs = ", ".join(sorted(found.cpu_features)) or (
            f"sm_{found.first_gpu} or later" if found.first_gpu else "none"
        )
        rows.append((found.name, found.target_kind, needs, has))
    print_table(("name", "target kind", "needs", "this CPU has it"), rows)


@targets_app.command("show")
def show_command(name: Annotated[str, typer.Argument(help="Name of a shipped spec, a TOML file, or 'host'.")]) -> None:
    """Show what a target computes, what it costs and what it forbids."""
    from tvm_hquant.target_spec import load_target_spec

    spec = load_target_spec(name)
    _print_summary(spec)
    print_table(
        ("operator", "precisions, best choice first (MACs or elements per cycle and core)"), _rates(spec), "\nOffers"
    )
    units = [
        (u.name, str(u.count), f"{u.clock_ghz:g}", str(u.channel_alignment), ", ".join(u.operators)) for u in spec.units
    ]
    print_table(("unit", "count", "GHz", "channels in multiples of", "operators"), units, "\nUnits")
    conversions = [(c.source, c.destination, f"{c.elements_per_cycle:g}") for c in spec.conversions]
    print_table(("from", "to", "elements per cycle"), conversions, "\nConversions")
    if spec.rules.forbidden:
        forbidden = [
            (entry.precision, _operators_of(entry.operators, entry.except_operators), entry.reason)
            for entry in spec.rules.forbidden
        ]
        print_table(("precision", "operators", "reason"), forbidden, "\nForbidden")


@targets_app.command("detect")
def detect_command(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output without it.")
    ] = None,
) -> None:
    """Write a spec of this machine, from its CPU's flags and a short measurement."""
    from tvm_hquant.target_spec import detect_host

    text = _DETECTED_HEADER + detect_host().to_toml()
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TargetSpecError(f"{output}: cannot write the target spec: {error.strerror}") from error
    typer.echo(f"{output}: written; 'hquant targets show {output}' explains it")


@targets_app.command("check")
def check_command(file: Annotated[Path, typer.Argument(help="A TOML file.")]) -> None:
    """Check a spec: its fields, its TVM target, its compiler, and whether this machine can run it."""
    from tvm_hquant.target_spec import load_target_spec

    spec = load_target_spec(file)
    try:
        spec.tvm_target()
    except HQuantError as error:
        raise TargetSpecError(f"{file}: {error}") from error
    typer.echo(f"{file}: valid")
    _print_summary(spec)
    idle = [unit.name for unit in spec.units if not _is_used(spec, unit.name)]
    if idle:
        typer.echo(f"warning: the rules leave no work to the units {', '.join(idle)}")
    compiler = spec.target.cross_compiler
    if compiler is not None and shutil.which(compiler) is None:
        typer.echo(
            f"warning: the cross compiler {compiler} is not on this machine's PATH; artifacts cannot be linked here"
        )


def _print_summary(spec: TargetSpec) -> None:
    memory = spec.memory
    sizes = (
        ("L1 data", memory.l1_data_kib, "KiB"), ("L2", memory.l2_kib, "KiB"), ("L3", memory.l3_kib, "KiB"),
        ("RAM", memory.ram_mib, "MiB"), ("flash", memory.flash_mib, "MiB"),
    )  # fmt: skip
    known = [f"{name} {size:g} {unit}" for name, size, unit in sizes if size]
    rules = [f"{spec.rules.weight_scales} weight scales"]
    rules += ["symmetric activations only"] if spec.rules.symmetric_activations_only else []
    rules += ["power-of-two scales"] if spec.rules.power_of_two_scales else []
    rules += ["bit-exact only"] if spec.rules.bit_exact else []
    rules += [f"float kept for {', '.join(spec.rules.keep_float)}"] if spec.rules.keep_float else []
    problems = spec.host_problems()
    rows = (
        ("name", spec.name),
        ("description", spec.description),
        ("kernels", ", ".join(map(_instruction_set, spec.instruction_sets))),
        ("target", ", ".join(f"{key} {value}" for key, value in spec.target.options().items())),
        ("cross compiler", spec.target.cross_compiler or "none: this machine's own"),
        ("CPU features", ", ".join(sorted(spec.cpu_features_needed())) or "none needed"),
        ("memory", ", ".join([f"{memory.bandwidth_gb_per_s:g} GB/s", *known])),
        ("rules", ", ".join(rules)),
        ("runs here", "no: " + "; ".join(problems) if problems else "yes"),
        ("hash", spec.spec_hash()),
    )
    print_table(("field", "value"), rows)


def _instruction_set(name: str) -> str:
    from tvm_hquant.kernels.instruction_set import load_instruction_set

    return name if load_instruction_set(name).is_bit_exact else f"{name} (within a bound, not bit-exact)"


def _rates(spec: TargetSpec) -> list[tuple[str, str]]:
    """One row for each operator: its precisions with rates; the operators that share a row's text stand together."""
    from tvm_hquant.target_spec import OPERATOR_KINDS

    operators_of: dict[str, list[str]] = {}
    for kind in OPERATOR_KINDS:
        rates = (f"{name} {spec.macs_per_cycle(name, kind):g}" for name in spec.offered_precisions(kind))
        operators_of.setdefault(", ".join(rates) or "none", []).append(kind)
    return [(", ".join(kinds), rates) for rates, kinds in operators_of.items()]


def _is_used(spec: TargetSpec, unit_name: str) -> bool:
    from tvm_hquant.target_spec import OPERATOR_KINDS

    return any(
        spec.unit_for(precision, kind).name == unit_name
        for kind in OPERATOR_KINDS
        for precision in spec.offered_precisions(kind)
    )


def _operators_of(operators: tuple[str, ...], exceptions: tuple[str, ...]) -> str:
    return ", ".join(operators) + (f" except {', '.join(exceptions)}" if exceptions else "")
