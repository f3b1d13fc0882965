"""`raygraft plan`: who would compute what, without loading a weight."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from raygraft.actors.fleet import Fleet
from raygraft.actors.in_process import InProcessFleet
from raygraft.actors.part import Questions
from raygraft.cli import options as o
from raygraft.cli.report import memory_bar, out, print_plan, progress
from raygraft.configuration import Configuration
from raygraft.graph.graph import Graph
from raygraft.llm import MAX_ROWS, MAX_SEQUENCES, Model, Progress
from raygraft.placement.plan import Plan
from raygraft.placement.planner import make_plan, size


def plan(
    model: o.ModelOption = None,
    ctx_size: o.ContextOption = None,
    device: o.DeviceOption = None,
    devices: o.DevicesOption = None,
    place: o.PlaceOption = None,
    threads: o.ThreadsOption = None,
    address: o.AddressOption = None,
    reasons: Annotated[
        bool, typer.Option("--reasons", help="List every region with its reason.")
    ] = False,
    as_json: o.JsonOption = False,
) -> None:
    """Show which device would compute which region, and why. No weights are loaded.

    With --address the devices of that cluster are started and asked; without it, their backends
    are asked on this machine, and the plan says that the answers are declared ones.
    """
    settings = o.configuration(devices, device, place, threads)
    with progress(quiet=as_json) as say:
        loaded = Model(model, say)
        made = _make(loaded, settings, ctx_size, address, say)
    if as_json:
        print(made.to_json(indent=1))
        return
    print_plan(made, loaded.graph)
    out.print()
    for use in made.devices:
        where = f"{use.type} on {use.node}" if use.node else use.type
        out.print(f"{use.device} ({where}): {memory_bar(use)}", markup=False)
    if reasons:
        out.print()
        out.print(_reasons(made, loaded.graph))


def _make(
    model: Model, settings: Configuration, ctx_size: int | None, address: str | None, say: Progress
) -> Plan:
    limits = model.limits(
        ctx_size=ctx_size, max_sequences=MAX_SEQUENCES, max_rows=MAX_ROWS, cache_type="f32"
    )
    questions = Questions(model.graph.signatures, model.graph.weight_forms, limits)
    fleet: Fleet
    if address is None:
        fleet = InProcessFleet(settings.devices, asked=False)
    else:
        from raygraft.actors.ray_fleet import RayFleet  # noqa: PLC0415  # only with a cluster

        fleet = RayFleet(settings.devices, address, say)
    try:
        return make_plan(
            model.graph,
            fleet.profiles(questions),
            settings.rules,
            limits=limits,
            context=ctx_size,
            model=model.file.path.name,
            engine_node=fleet.node,
        )
    finally:
        fleet.shutdown()


def _reasons(plan: Plan, graph: Graph) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("region", "device", "bytes", "reason"):
        table.add_column(title, justify="right" if title == "bytes" else "left")
    for placement in plan.placements:
        weights = graph.subgraph(graph.regions[placement.region].operators).weights
        nbytes = sum(weight.nbytes(graph.tensors[weight.tensor]) for weight in weights)
        table.add_row(placement.region, placement.device, size(nbytes), placement.reason)
    return table
