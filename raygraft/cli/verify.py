"""`raygraft verify`: whether devices compute what they claim to."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from raygraft.actors.verification import DEADLINE, Results
from raygraft.cli import options as o
from raygraft.cli.report import out, progress
from raygraft.graph.operators import DEFAULT_CACHE_TYPE
from raygraft.kernels.verification.checks import CheckResult, Outcome
from raygraft.llm import MAX_SEQUENCES
from raygraft.model import Model
from raygraft.verification import WithdrawnWarning, name_of, verdict_of, verify_on

WORDS = {Outcome.OK: "ok", Outcome.FAILED: "withdrawn", Outcome.UNCHECKED: "not checked"}
STYLES = {Outcome.OK: "green", Outcome.FAILED: "red", Outcome.UNCHECKED: "yellow"}


def verify(
    model: o.ModelOption = None,
    ctx_size: o.ContextOption = None,
    cache_type: o.CacheTypeOption = DEFAULT_CACHE_TYPE,
    device: o.DeviceOption = None,
    devices: o.DevicesOption = None,
    threads: o.ThreadsOption = None,
    address: o.AddressOption = None,
    deadline: Annotated[
        float, typer.Option("--deadline", min=0.1, help="Seconds for one check on a device.")
    ] = DEADLINE,
    as_json: o.JsonOption = False,
) -> None:
    """Hold devices to their word: run all that they claim against the NumPy reference.

    Each device is started, asked, and then runs every distinct region that it claims and every
    operator that it supports, with the model's weights and random inputs: prompts, single rows,
    several sequences, a filled cache. A wrong result, an exception, a crash and a hang each fail a
    check, and end none of the others.

    Exit code 0: all of it holds. 1: something failed.
    """
    from raygraft.actors.ray_fleet import RayFleet  # noqa: PLC0415  # Ray takes a second to import

    settings = o.configuration(devices, device, None, threads)
    with progress(quiet=as_json) as say, warnings.catch_warnings():
        warnings.simplefilter("ignore", WithdrawnWarning)  # the tables say it
        loaded = Model(model, say)
        limits = loaded.limits(
            settings.devices,
            ctx_size=ctx_size,
            max_sequences=MAX_SEQUENCES,
            cache_type=cache_type,
        )
        fleet = RayFleet(settings.devices, address, say)
        try:
            nodes = {name: node for name, (node, _) in fleet.describe().items()}
            results = verify_on(
                fleet,
                loaded.graph,
                limits=limits,
                model=loaded.file,
                deadline=deadline,
                progress=say,
            )
        finally:
            fleet.shutdown()
    ok = all(check.ok for checks in results.values() for check in checks)
    if as_json:
        print(json.dumps(_document(loaded.file.path.name, ok, nodes, results), indent=1))
    else:
        for name, checks in results.items():
            _print_device(name, nodes[name], checks)
    if not ok:
        raise typer.Exit(1)


def _document(
    model: str, ok: bool, nodes: Mapping[str, str], results: Results
) -> dict[str, object]:
    devices = [
        {"name": name, "node": nodes[name], "checks": [asdict(check) for check in checks]}
        for name, checks in results.items()
    ]
    return {"model": model, "ok": ok, "devices": devices}


def _print_device(name: str, node: str, checks: tuple[CheckResult, ...]) -> None:
    out.print(f"device {name} on {node}", style="bold", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("region or operator", overflow="fold")
    table.add_column("what", overflow="fold")
    for title in ("alike", "error", "bound"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for check in checks:
        what = check.what if check.claim else check.what.partition("(")[0]
        error = "-" if check.error is None else f"{check.error:.1e}"
        verdict = Text(WORDS[check.outcome], style=STYLES[check.outcome])
        numbers = (str(check.count), error, f"{check.bound:g}")
        table.add_row(Text(check.where), Text(what), *numbers, verdict)
    if checks:
        out.print(table)
    for check in checks:
        if check.detail:
            text = f"{name_of(check)} {verdict_of(check)}"
            out.print(text, style=STYLES[check.outcome], markup=False, soft_wrap=True)
    out.print(_summary(checks), end="\n\n")


def _summary(checks: tuple[CheckResult, ...]) -> str:
    if not checks:
        return "It claims no region and supports no operator of this model."
    counts = Counter(check.outcome for check in checks)
    return ", ".join(
        f"{counts[outcome]} {WORDS[outcome]}" for outcome in Outcome if counts[outcome]
    )
