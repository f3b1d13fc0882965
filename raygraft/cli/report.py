"""What the commands print: plans as tables, sizes for people, progress on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from raygraft.graph.graph import Graph
from raygraft.model import Progress
from raygraft.picture.folding import fold
from raygraft.placement.costs import size
from raygraft.placement.plan import DeviceUse, Plan

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """A line on standard error that says what is going on; plain lines when it is no terminal."""
    if quiet:
        yield lambda _: None
    elif err.is_terminal:
        with err.status("starting") as status:
            yield lambda text: status.update(f"{text} ...")
    else:
        began = time.monotonic()
        yield lambda text: err.print(f"[{time.monotonic() - began:5.1f} s] {text}", markup=False)


def print_plan(plan: Plan, graph: Graph) -> None:
    """A plan in a few lines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("device", "regions"):
        table.add_column(title, overflow="fold")
    for title in ("weights", "cache", "stages"):
        table.add_column(title, justify="right", no_wrap=True)
    for use in plan.devices:
        own = [p.region for p in plan.placements if p.device == use.device]
        regions = ", ".join(item.text for item in fold(graph, own)) or "(nothing)"
        table.add_row(use.device, regions, size(use.weights), size(use.cache), str(use.stages))
    out.print(table)
    out.print(plan_line(plan), soft_wrap=True)
    if not plan.asked:
        out.print("The devices were not asked: their answers are declared ones.")


def plan_line(plan: Plan) -> str:
    """Hops, bytes and context in one line."""
    nbytes = sum(transfer.row_bytes for transfer in plan.records)
    links = sorted({transfer.link for transfer in plan.records})
    hops = "1 hop" if plan.hops == 1 else f"{plan.hops} hops"
    shared = len(plan.transfers) - plan.hops
    beside = f", {shared} handed on inside of actors" if shared else ""
    return (
        f"{hops} a token ({' and '.join(links)}), {size(nbytes)} in all{beside}; "
        f"context {plan.limits.context} tokens, {plan.cache_blocks} cache pages of "
        f"{plan.block_size}"
    )


def memory_bar(use: DeviceUse, width: int = 20) -> str:
    """Used and free memory as a bar."""
    used = use.weights + use.cache + use.workspace
    filled = min(width, round(width * used / max(1, use.memory)))
    return f"{'█' * filled}{'░' * (width - filled)} {size(used)} of {size(use.memory)}"
