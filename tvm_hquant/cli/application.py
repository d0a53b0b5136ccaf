"""All commands of ``hquant``."""

from __future__ import annotations

from importlib.metadata import version as package_version
from typing import Annotated

import typer

from tvm_hquant.cli.compile_command import compile_command, quickstart_command
from tvm_hquant.cli.inspect_command import inspect_command
from tvm_hquant.cli.profile_command import profile_command
from tvm_hquant.cli.run_command import run_command
from tvm_hquant.cli.search_command import search_command
from tvm_hquant.cli.targets import targets_app
from tvm_hquant.cli.tune_command import tune_command
from tvm_hquant.cli.verify_command import verify_command

application = typer.Typer(
    name="hquant",
    help="Turns a float model into the fastest mixed-precision module that a target runs within a loss budget.",
    epilog="Every command takes --debug: the Python traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
application.command("quickstart")(quickstart_command)
application.command("compile")(compile_command)
application.command("search")(search_command)
application.command("run")(run_command)
application.command("profile")(profile_command)
application.command("inspect")(inspect_command)
application.command("tune")(tune_command)
application.command("verify")(verify_command)
application.add_typer(targets_app, name="targets")


@application.command("version")
def version_command() -> None:
    """Show the versions of hquant and TVM."""
    typer.echo(f"hquant {package_version('tvm-hquant')}, apache-tvm {package_version('apache-tvm')}")


def _print_version(is_asked_for: bool) -> None:
    if is_asked_for:
        version_command()
        raise typer.Exit()


@application.callback()
def _before_every_command(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    from tvm_hquant.runtime import use_all_cores

    use_all_cores()
