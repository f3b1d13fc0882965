"""The commands, and what they have in common."""

from __future__ import annotations

from typing import Annotated

import typer

import raygraft
from raygraft.cli import chat, devices, plan, regions, run

app = typer.Typer(
    name="raygraft",
    help="Run a language model with each functional region of its graph on the device that "
    "suits it.",
    epilog="Start with: raygraft run -p 'The capital of France is' --show-plan",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"raygraft {raygraft.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("plan")(plan.plan)
app.command("regions")(regions.regions)
app.command("devices")(devices.devices)
