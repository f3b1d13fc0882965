"""The commands, and what they have in common."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import raygraft
from raygraft.cli import INTERRUPTED, bench, chat, ctl, devices, plan, regions, run, verify
from raygraft.graph.errors import RaygraftError


class Commands(TyperGroup):
    """All commands end in the same way, whatever they raise on purpose."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an error becomes one line, and an exit code."""
        try:
            return super().invoke(ctx)
        except RaygraftError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="raygraft",
    cls=Commands,
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
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.add_typer(ctl.ctl, name="ctl")
