"""`raygraft plan`: who would compute what, without loading a weight."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from raygraft.actors.fleet import Fleet
from raygraft.actors.in_process import InProcessFleet
from raygraft.cli import options as o
from raygraft.cli.report import memory_bar, out, print_plan, progress
from raygraft.configuration import Configuration
from raygraft.graph.graph import Graph
from raygraft.llm import MAX_ROWS, MAX_SEQUENCES, Model, Progress
from raygraft.placement.costs import size
from raygraft.placement.plan import Plan
from raygraft.planning import plan_on


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
        made, graph = _make(loaded, settings, ctx_size, address, say)
    if as_json:
        print(made.to_json(indent=1))
        return
    print_plan(made, graph)
    out.print()
    for use in made.devices:
        where = f"{use.type} on {use.node}" if use.node else use.type
        out.print(f"{use.device} ({where}): {memory_bar(use)}", markup=False)
    if reasons:
        out.print()
        out.print(_reasons(made, graph))


def _make(
    model: Model, settings: Configuration, ctx_size: int | None, address: str | None, say: Progress
) -> tuple[Plan, Graph]:
    limits = model.limits(
        ctx_size=ctx_size, max_sequences=MAX_SEQUENCES, max_rows=MAX_ROWS, cache_type="f32"
    )
    fleet: Fleet
    if address is None:
        fleet = InProcessFleet(settings.devices, asked=False)
    else:
        from raygraft.actors.ray_fleet import RayFleet  # noqa: PLC0415  # only with a cluster

        fleet = RayFleet(settings.devices, address, say)
    try:
        plan, graph, _ = plan_on(
            fleet,
            model.graph,
            settings.rules,
            limits=limits,
            context=ctx_size,
            model=model.file.path.name,
        )
        return plan, graph
    finally:
        fleet.shutdown()


def _reasons(plan: Plan, graph: Graph) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("region", "device", "bytes", "reason"):
        table.add_column(title, justify="right" if title == "bytes" else "left")
    operators = {atom.name: atom.operators for atom in graph.atoms}
    for placement in plan.placements:
        weights = graph.subgraph(operators[placement.region]).weights
        nbytes = sum(weight.nbytes(graph.tensors[weight.tensor]) for weight in weights)
        table.add_row(placement.region, placement.device, size(nbytes), placement.reason)
    return table
