"""What the commands print: plans as tables, sizes for people, progress on standard error."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from raygraft.graph.graph import Graph, Region
from raygraft.llm import Progress
from raygraft.placement.costs import size
from raygraft.placement.plan import DeviceUse, Plan

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

_NUMBER = re.compile(r"^(?P<before>[^.]*\.)(?P<number>\d+)(?P<after>.*)$")


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


def summarise(graph: Graph, names: Sequence[str]) -> str:
    """Leaf regions in few words: whole regions by their names, equal ones as ranges."""
    chosen = set(names)
    tops: list[str] = []

    def visit(region: Region) -> None:
        leaves = [r.name for r in graph.descendants(region) if not r.children]
        if chosen.issuperset(leaves):
            tops.append(region.name)
        else:
            for child in region.children:
                visit(graph.regions[child])

    visit(graph.regions["model"])
    tops += [name for name in names if "#" in name]  # pieces that a region of one's own cuts out
    groups: dict[tuple[str, str], list[int]] = {}
    for name in tops:
        match = _NUMBER.match(name)
        key = (match["before"], match["after"]) if match else (name, "")
        groups.setdefault(key, []).extend([int(match["number"])] if match else [])
    texts = []
    for (before, after), numbers in groups.items():
        texts.append(f"{before}{_range(numbers)}{after}" if numbers else before)
    return ", ".join(texts)


def _range(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = [[numbers[0], numbers[0]]]
    for before, number in pairwise(numbers):
        if number == before + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(numbers) == 1:
        return str(numbers[0])
    return "[" + ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs) + "]"


def print_plan(plan: Plan, graph: Graph) -> None:
    """A plan in a few lines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("device", "regions"):
        table.add_column(title, overflow="fold")
    for title in ("weights", "cache", "stages"):
        table.add_column(title, justify="right", no_wrap=True)
    for use in plan.devices:
        own = [p.region for p in plan.placements if p.device == use.device]
        regions = summarise(graph, own) if own else "(nothing)"
        table.add_row(use.device, regions, size(use.weights), size(use.cache), str(use.stages))
    out.print(table)
    out.print(plan_line(plan), soft_wrap=True)
    if not plan.asked:
        out.print("The devices were not asked: their answers are declared ones.")


def plan_line(plan: Plan) -> str:
    """Hops, bytes and context in one line."""
    nbytes = sum(transfer.row_bytes for transfer in plan.transfers)
    links = sorted({transfer.link for transfer in plan.transfers})
    hops = "1 hop" if plan.hops == 1 else f"{plan.hops} hops"
    return (
        f"{hops} a token ({' and '.join(links)}), {size(nbytes)} in all; "
        f"context {plan.limits.context} tokens, {plan.cache_blocks} cache pages of "
        f"{plan.block_size}"
    )


def memory_bar(use: DeviceUse, width: int = 20) -> str:
    """Used and free memory as a bar."""
    used = use.weights + use.cache + use.workspace
    filled = min(width, round(width * used / max(1, use.memory)))
    return f"{'█' * filled}{'░' * (width - filled)} {size(used)} of {size(use.memory)}"
