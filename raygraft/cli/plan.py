"""`raygraft plan`: who would compute what, without loading a weight."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from raygraft.actors.fleet import Fleet
from raygraft.actors.in_process import InProcessFleet
from raygraft.cli import options as o
from raygraft.cli.report import err, memory_bar, out, print_plan, progress
from raygraft.configuration import Configuration
from raygraft.graph.capability import Limits
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.operators import DEFAULT_CACHE_TYPE
from raygraft.graph.selectors import Selector
from raygraft.llm import MAX_SEQUENCES
from raygraft.model import Model, Progress
from raygraft.picture import plan_page
from raygraft.picture.rows import Rows, duration
from raygraft.placement.costs import size
from raygraft.placement.plan import Plan
from raygraft.placement.planner import make_problem
from raygraft.placement.problem import Problem
from raygraft.planning import plan_on, with_named_regions, with_overrides

DECLARED = "The devices were not asked: their answers are declared ones."


def plan(
    model: o.ModelOption = None,
    ctx_size: o.ContextOption = None,
    cache_type: o.CacheTypeOption = DEFAULT_CACHE_TYPE,
    device: o.DeviceOption = None,
    devices: o.DevicesOption = None,
    place: o.PlaceOption = None,
    region: o.RegionOption = None,
    override_tensor: o.OverrideOption = None,
    threads: o.ThreadsOption = None,
    address: o.AddressOption = None,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="SELECTOR", help="Every device's answer about these regions: 'blk.3.attn'."
        ),
    ] = None,
    reasons: Annotated[
        bool, typer.Option("--reasons", help="List the regions with their reasons.")
    ] = False,
    unfolded: Annotated[
        bool,
        typer.Option("--all", help="With --reasons or --why: each region on a line of its own."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with a drawing of the plan."),
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Show which device would compute which region, and why. No weights are loaded.

    With --address the devices of that cluster are started and asked; without it, their backends
    are asked on this machine, and the plan says that the answers are declared ones.
    """
    settings = o.configuration(devices, device, place, threads, region, override_tensor)
    with progress(quiet=as_json) as say:
        loaded = Model(model, say)
        limits = loaded.limits(
            settings.devices,
            ctx_size=ctx_size,
            max_sequences=MAX_SEQUENCES,
            cache_type=cache_type,
        )
        made, problem = _make(loaded, settings, limits, ctx_size, address, say)
    rows = Rows(made, problem)
    asked_about = Selector.parse(why).operators(problem.graph) if why else frozenset()
    about = [atom.name for atom in problem.atoms if not asked_about.isdisjoint(atom.operators)]
    if html is not None:
        _write(html, plan_page(made, problem))
        if not as_json:
            err.print(f"the page is in {html}", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(_why_document(rows, about), indent=1) if why else made.to_json(indent=1))
        return
    if why:
        out.print(_why_table(rows, about, folded=not unfolded))
        if not made.asked:
            out.print(DECLARED)
        return
    print_plan(made, problem.graph)
    out.print()
    for use in made.devices:
        out.print(f"{use.device} ({made.where(use)}): {memory_bar(use)}", markup=False)
    if reasons:
        out.print()
        out.print(_reasons(rows, folded=not unfolded))


def _make(
    model: Model,
    settings: Configuration,
    limits: Limits,
    ctx_size: int | None,
    address: str | None,
    say: Progress,
) -> tuple[Plan, Problem]:
    """The plan, and what it answers."""
    graph = with_named_regions(model.graph, settings.regions)
    rules = with_overrides(graph, settings.rules, settings.override_tensor, settings.devices)
    fleet: Fleet
    if address is None:
        fleet = InProcessFleet(settings.devices, asked=False)
    else:
        from raygraft.actors.ray_fleet import RayFleet  # noqa: PLC0415  # only with a cluster

        fleet = RayFleet(settings.devices, address, say)
    try:
        plan, graph, profiles = plan_on(
            fleet,
            graph,
            rules,
            limits=limits,
            context=ctx_size,
            model=model.file.path.name,
        )
        return plan, make_problem(graph, profiles, rules, limits=limits)
    finally:
        fleet.shutdown()


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror}") from error


def _reasons(rows: Rows, *, folded: bool) -> Table:
    table = _table("region", "device", "bytes", "reason")
    for row in rows.reasons(folded=folded):
        table.add_row(*map(escape, (row.regions, row.device, size(row.nbytes), row.reason)))
    return table


def _why_table(rows: Rows, about: list[str], *, folded: bool) -> Table:
    table = _table("region", "device", "", "time", "answer")
    for row, answers in rows.answers(about, folded=folded):
        region = row.regions
        for answer in answers:
            text = f"{answer.answer}; chosen: {row.reason}" if answer.chosen else answer.answer
            time = "" if answer.seconds is None else duration(answer.seconds)
            mark = "→" if answer.chosen else ""
            table.add_row(*map(escape, (region, answer.device, mark, time, text)))
            region = ""
        table.add_section()
    return table


def _why_document(rows: Rows, about: list[str]) -> dict[str, object]:
    return {
        "model": rows.plan.model,
        "asked": rows.plan.asked,
        "regions": [
            {
                "region": row.regions,
                "device": row.device,
                "bytes": row.nbytes,
                "reason": row.reason,
                "claim": row.claim or None,
                "answers": [asdict(answer) for answer in answers],
            }
            for row, answers in rows.answers(about, folded=False)
        ],
    }


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        number = title in ("bytes", "time")
        table.add_column(title, justify="right" if number else "left", no_wrap=number)
    return table
