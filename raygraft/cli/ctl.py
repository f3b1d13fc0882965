"""`raygraft ctl`: regions and devices of an engine that runs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from raygraft.cli import options as o
from raygraft.cli.report import out
from raygraft.configuration import parse_rules
from raygraft.graph.errors import ConfigurationError

EngineOption = Annotated[
    str, typer.Option("--engine", help="The name that it was started with (`--name`).")
]
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE")]

ctl = typer.Typer(
    help="Look at an engine that runs on a Ray cluster, and move its regions. Requests go on, with "
    "the same tokens.",
    no_args_is_help=True,
)


@ctl.command()
def status(
    engine: EngineOption = "engine", address: o.AddressOption = None, as_json: o.JsonOption = False
) -> None:
    """What it is doing, and on which devices."""
    _print(_ask(engine, address, "status"), as_json)


@ctl.command()
def move(
    place: Annotated[str, typer.Argument(metavar="SELECTOR=DEVICE")],
    engine: EngineOption = "engine",
    address: o.AddressOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Let a device compute these regions: `raygraft ctl move 'blk.[0-3].attn=b'`."""
    parse_rules([place])
    selector, separator, device = place.rpartition("=")
    if not separator:
        raise ConfigurationError(f"{place}: expected SELECTOR=DEVICE")
    _print(_ask(engine, address, "move", selector.strip(), device.strip()), as_json)


@ctl.command()
def drain(
    device: DeviceArgument,
    engine: EngineOption = "engine",
    address: o.AddressOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Let others compute what a device did, and let go of it."""
    _print(_ask(engine, address, "drain", device), as_json)


@ctl.command()
def add(
    device: Annotated[str, typer.Argument(metavar="NAME[:KEY=VALUE,...]")],
    engine: EngineOption = "engine",
    address: o.AddressOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Take a device in, a new one or one that has returned. It is written as for `--device`."""
    _print(_ask(engine, address, "add", device), as_json)


def _ask(engine: str, address: str | None, *command: str) -> dict[str, Any]:
    from raygraft.actors import cluster  # noqa: PLC0415  # Ray takes a second to import
    from raygraft.control import ask_engine  # noqa: PLC0415

    cluster.connect(address or "auto")
    return ask_engine(engine, command)


def _print(said: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(said, indent=1))
        return
    for key, value in said.items():
        if isinstance(value, dict):
            out.print(f"{key.replace('_', ' ')}:")
            for name, what in value.items():
                out.print(f"  {name}: {what}", markup=False, highlight=False)
        else:
            out.print(f"{key.replace('_', ' ')}: {value}", markup=False, highlight=False)
