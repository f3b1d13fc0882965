"""`raygraft devices`: what the devices say about themselves."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.table import Table

from raygraft.cli import options as o
from raygraft.cli.report import out, progress
from raygraft.placement.costs import size


def devices(
    device: o.DeviceOption = None,
    devices: o.DevicesOption = None,
    threads: o.ThreadsOption = None,
    address: o.AddressOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Start the devices, and list what each says of itself from its own machine."""
    from raygraft.actors.ray_fleet import RayFleet  # noqa: PLC0415  # Ray takes a second to import

    settings = o.configuration(devices, device, None, threads)
    with progress(quiet=as_json) as say:
        fleet = RayFleet(settings.devices, address, say)
        try:
            said = fleet.describe()
        finally:
            fleet.shutdown()
    if as_json:
        document = [
            {"name": name, "node": node, **asdict(what), "versions": dict(what.versions)}
            for name, (node, what) in said.items()
        ]
        print(json.dumps({"devices": document}, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("device", "node", "backend", "type", "hardware", "threads", "free", "with")
    for title in titles:
        table.add_column(title, no_wrap=title not in ("hardware", "with"), overflow="fold")
    for name, (node, what) in said.items():
        versions = ", ".join(f"{library} {number}" for library, number in what.versions)
        own = (what.backend, what.type, what.hardware, str(what.threads), size(what.memory_free))
        table.add_row(name, node, *own, versions)
    out.print(table)
