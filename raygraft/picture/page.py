"""The page: what stands in it, and the template that it is made with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import raygraft
from raygraft.picture.drawing import BAND, CAPTION, LINE, MARGIN, PADDING, STACK, Box, Drawing
from raygraft.picture.rows import AnswerRow, ReasonRow, Rows, duration
from raygraft.picture.scene import Group, Scene, draw_scene, first_reader, groups_of, repeats_of
from raygraft.placement.costs import size
from raygraft.placement.plan import DeviceUse, Plan, Transfer
from raygraft.placement.problem import Problem

HUES = (250, 55, 155, 345, 200, 95, 300, 25)
"""Angles of OKLCH for the first devices: neighbours are far apart."""
GOLDEN_ANGLE = 137.5
PAPER_WIDTH, PAPER_HEIGHT = 700, 940
"""What a page of A4 or Letter has room for, in pixels."""
HEAD, LANE_HEADS = 260, 220
"""Heights of the page's head, and of what stands above a drawing."""
LEAST_ZOOM = 0.5
"""Smaller print cannot be read."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One figure of the page's head."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One part of a device's memory bar."""

    name: str
    amount: str
    percent: float


@dataclass(frozen=True, slots=True)
class Lane:
    """A device's card."""

    name: str
    hue: float
    where: str
    asked: bool
    stages: str
    memory: str
    parts: tuple[MemoryPart, ...]
    seconds: str


@dataclass(frozen=True, slots=True)
class Answers:
    """What several devices say alike."""

    devices: str
    can: bool
    answer: str


@dataclass(frozen=True, slots=True)
class Entry:
    """Regions of a box, and all that is to be said about them."""

    row: ReasonRow
    nbytes: str
    operators: str
    answers: tuple[Answers, ...]


@dataclass(frozen=True, slots=True)
class Detail:
    """What is shown when a box is pointed at."""

    key: str
    device: str
    hue: float
    title: str
    entries: tuple[Entry, ...]
    receives: tuple[str, ...]
    sends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShownBox:
    """A box with its colour, and what it is called aloud."""

    box: Box
    hue: float
    title: str


@dataclass(frozen=True, slots=True)
class Shown:
    """A drawing, ready for the template."""

    drawing: Drawing
    boxes: tuple[ShownBox, ...]


def plan_page(plan: Plan, problem: Problem) -> str:
    """A plan as one HTML document, which loads nothing.

    `problem` is what the plan answers: its graph, its devices, its rules.
    """
    rows = Rows(plan, problem)
    repeats = repeats_of(plan)
    groups = {group.key: group for group in (*groups_of(plan), *groups_of(plan, repeats))}
    notes = {group.stages: _note(rows, group) for group in groups.values()}
    full = draw_scene(plan, problem.graph, notes)
    scenes = [draw_scene(plan, problem.graph, notes, repeats=repeats), full] if repeats else [full]
    hues = {use.device: hue_of(number) for number, use in enumerate(plan.devices)}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        plan=plan,
        version=raygraft.__version__,
        declared=[use.device for use in plan.devices if not problem.devices[use.device].asked],
        facts=_facts(plan),
        lanes=[_lane(use, plan.where(use), hues[use.device], problem) for use in plan.devices],
        scenes=[_shown(scene, rows, hues) for scene in scenes],
        details=[_detail(rows, group, hues[group.device]) for group in groups.values()],
        folded_rows=[_entry(row, [], rows) for row in rows.reasons()],
        all_rows=[_entry(row, [], rows) for row in rows.reasons(folded=False)],
        hues=hues,
        links={transfer.link for transfer in plan.transfers},
        print_zoom=print_zoom(scenes[0].drawing),
        sizes={
            "band": BAND,
            "caption": CAPTION,
            "line": LINE,
            "margin": MARGIN,
            "padding": PADDING,
            "stack": STACK,
        },
    )


def print_zoom(drawing: Drawing) -> tuple[float, bool]:
    """By how much a drawing must shrink to stand on paper, and whether on a page of its own."""
    across, down = PAPER_WIDTH / drawing.width, PAPER_HEIGHT / (drawing.height + LANE_HEADS)
    below_the_head = (PAPER_HEIGHT - HEAD) / (drawing.height + LANE_HEADS)
    own_page = below_the_head < min(0.75, across)
    fitting = min(1.0, across, down if own_page else below_the_head)
    return round(max(LEAST_ZOOM, fitting), 3), own_page


def hue_of(number: int) -> float:
    """The hue of a device, by its place in the plan."""
    return HUES[number] if number < len(HUES) else round(number * GOLDEN_ANGLE % 360, 1)


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 hop, 2 hops."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _facts(plan: Plan) -> list[Fact]:
    links = [transfer.link for transfer in plan.transfers]
    kinds = " and ".join(f"{links.count(kind)} {kind}" for kind in sorted(set(links)))
    nbytes = [transfer.row_bytes for transfer in plan.records]
    computing = sum(use.seconds_per_token for use in plan.devices)
    return [
        Fact("hop a token" if plan.hops == 1 else "hops a token", str(plan.hops), kinds),
        Fact("sent a token", size(sum(nbytes)), f"{size(max(nbytes, default=0))} a hop at most"),
        Fact(
            "a token, predicted",
            duration(plan.seconds_per_token),
            f"{duration(computing)} computing, {duration(plan.seconds_per_token - computing)} hops",
        ),
        Fact(
            "tokens of context",
            f"{plan.limits.context:,}",
            f"{plan.cache_blocks:,} cache pages of {plan.block_size}",
        ),
        Fact("stages", str(len(plan.stages)), f"on {counted(len(_used(plan)), 'device')}"),
    ]


def _used(plan: Plan) -> set[str]:
    return {stage.device for stage in plan.stages}


def _lane(use: DeviceUse, where: str, hue: float, problem: Problem) -> Lane:
    used = {"weights": use.weights, "cache": use.cache, "workspace": use.workspace}
    amounts = used | {"free": use.memory - sum(used.values())}
    whole = max(1, use.memory)
    return Lane(
        name=use.device,
        hue=hue,
        where=where,
        asked=problem.devices[use.device].asked,
        stages=counted(use.stages, "stage") if use.stages else "unused",
        memory=size(use.memory),
        parts=tuple(
            MemoryPart(name, size(nbytes), round(100 * nbytes / whole, 2))
            for name, nbytes in amounts.items()
        ),
        seconds=duration(use.seconds_per_token) if use.stages else "",
    )


def _note(rows: Rows, group: Group) -> str:
    """The small print of a box."""
    nbytes = rows.nbytes(group.device, group.regions)
    parts = [size(nbytes)] if nbytes else []
    if rows.owns_cache(group.regions):
        parts.append("cache")
    if any(rows.placements[name].claim for name in group.regions):
        parts.append("claimed")
    return " · ".join(parts)


def _shown(scene: Scene, rows: Rows, hues: Mapping[str, float]) -> Shown:
    groups = {group.key: group for group in scene.groups}
    boxes = []
    for box in scene.drawing.boxes:
        group = groups[box.key]
        reasons = [f"{row.regions}: {row.reason}" for row in rows.reasons(group.regions)]
        title = "\n".join([f"{_numbers(group)} on {group.device}", *reasons])
        boxes.append(ShownBox(box, hues[group.device], title))
    return Shown(scene.drawing, tuple(boxes))


def _numbers(group: Group) -> str:
    if len(group.stages) == 1:
        return f"Stage {group.stages[0] + 1}"
    return f"{len(group.stages)} stages from {group.stages[0] + 1} to {group.stages[-1] + 1}"


def _detail(rows: Rows, group: Group, hue: float) -> Detail:
    single = len(group.stages) == 1
    plan = rows.plan
    return Detail(
        key=group.key,
        device=group.device,
        hue=hue,
        title=f"{_numbers(group)} of {len(plan.stages)}" if single else _numbers(group),
        entries=tuple(_entry(row, ask, rows) for row, ask in rows.answers(group.regions)),
        receives=tuple(_received(plan, group.stages[0])) if single else (),
        sends=tuple(_sent(plan, group.stages[0])) if single else (),
    )


def _entry(row: ReasonRow, answers: Iterable[AnswerRow], rows: Rows) -> Entry:
    alike: dict[tuple[bool, str], list[str]] = {}
    for answer in answers:
        alike.setdefault((answer.can, answer.answer), []).append(answer.device)
    return Entry(
        row=row,
        nbytes=size(row.nbytes) if row.nbytes else "no weights",
        operators=rows.operators(row.atoms),
        answers=tuple(
            Answers(", ".join(devices), can, answer) for (can, answer), devices in alike.items()
        ),
    )


def _received(plan: Plan, number: int) -> Iterator[str]:
    for transfer in plan.transfers:
        if transfer.target == plan.stages[number].device and first_reader(plan, transfer) == number:
            yield f"from {transfer.source}: {_record(transfer)}"


def _sent(plan: Plan, number: int) -> Iterator[str]:
    for transfer in plan.transfers:
        if transfer.source_stage == number:
            yield f"to {transfer.target}: {_record(transfer)}"


def _record(transfer: Transfer) -> str:
    values = ", ".join(transfer.values)
    return f"{values} ({size(transfer.row_bytes)} a token, {transfer.link})"
