"""What a drawing of a plan shows: its stages, folded or not, and the records between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raygraft.graph.graph import Graph
from raygraft.picture.drawing import Drawing
from raygraft.picture.folding import Numbered, fold
from raygraft.picture.layout import Element, Link, Part, draw
from raygraft.picture.repeats import Repeat, find_repeats
from raygraft.placement.costs import size
from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Plan, Transfer


@dataclass(frozen=True, slots=True)
class Group:
    """The stages behind one box: one, or those of one device in a fold."""

    key: str
    """Unique in a page; the same stage has the same key in every drawing."""
    device: str
    stages: tuple[int, ...]
    regions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawing, and what its boxes stand for."""

    drawing: Drawing
    groups: tuple[Group, ...]


def draw_scene(
    plan: Plan, graph: Graph, notes: dict[tuple[int, ...], str], *, repeats: Sequence[Repeat] = ()
) -> Scene:
    """Draw a plan with these repeats folded. `notes` has the small print of a group's stages."""
    lane_of = {use.device: lane for lane, use in enumerate(plan.devices)}
    sheets = _sheets(plan, repeats)
    element_of = {n: number for number, sheet in enumerate(sheets) for n in sheet.stages}
    producer = {value: stage.number for stage in plan.stages for value in stage.outputs}
    elements, groups = [], []
    for number, sheet in enumerate(sheets):
        own = _groups(plan, sheet)
        needs = {element_of[producer[v]] for n in sheet.stages for v in plan.stages[n].inputs}
        groups += own
        elements.append(
            Element(
                parts=tuple(
                    Part(
                        key=group.key,
                        lane=lane_of[group.device],
                        names=tuple(item.text for item in fold(graph, group.regions)),
                        note=notes.get(group.stages, ""),
                    )
                    for group in own
                ),
                needs=frozenset(needs - {number}),
                caption=_caption(plan, graph, sheet),
                target=_key(sheet.stages[:1]),
            )
        )
    links = _links(plan, element_of, lane_of)
    return Scene(draw(elements, links, len(lane_of)), tuple(groups))


def groups_of(plan: Plan, repeats: Sequence[Repeat] = ()) -> list[Group]:
    """The groups that a drawing with these repeats folded has."""
    return [group for sheet in _sheets(plan, repeats) for group in _groups(plan, sheet)]


@dataclass(frozen=True, slots=True)
class _Sheet:
    """Stages that share an element."""

    stages: tuple[int, ...]
    repeat: Repeat | None = None


def _sheets(plan: Plan, repeats: Sequence[Repeat]) -> list[_Sheet]:
    starts = {repeat.folded.start: repeat for repeat in repeats}
    hidden = {number for repeat in repeats for number in repeat.folded}
    sheets = []
    for stage in plan.stages:
        repeat = starts.get(stage.number)
        if repeat is not None:
            sheets.append(_Sheet(tuple(repeat.folded), repeat))
        elif stage.number not in hidden:
            sheets.append(_Sheet((stage.number,)))
    return sheets


def _groups(plan: Plan, sheet: _Sheet) -> list[Group]:
    by_device: dict[str, list[int]] = {}
    for number in sheet.stages:
        by_device.setdefault(plan.stages[number].device, []).append(number)
    return [
        Group(
            key=_key(own),
            device=device,
            stages=tuple(own),
            regions=tuple(name for number in own for name in plan.stages[number].regions),
        )
        for device, own in by_device.items()
    ]


def _key(stages: Sequence[int]) -> str:
    return "-".join(["stage", *map(str, dict.fromkeys((stages[0], stages[-1])))])


def _caption(plan: Plan, graph: Graph, sheet: _Sheet) -> str:
    """How often more, and what; empty for a single stage."""
    if sheet.repeat is None:
        return ""
    regions = [name for number in sheet.stages for name in plan.stages[number].regions]
    return f"× {sheet.repeat.count - 1} more: {_from_to(graph, regions)}"


def _from_to(graph: Graph, regions: Sequence[str]) -> str:
    """`blk.1 to blk.28` where these are whole blocks, else the first and the last region."""
    first, last = regions[0], regions[-1]
    if all(item.text.count(".") == 1 for item in fold(graph, regions)):
        ends = [Numbered.parse(name) for name in (first, last)]
        first, last = (f"{end.before}{end.number}" for end in ends if end is not None)
    return f"{first} to {last}"


def _links(plan: Plan, element_of: dict[int, int], lane_of: dict[str, int]) -> list[Link]:
    """One for every record, but for those inside of a fold; equal ones of a fold become one."""
    found: dict[tuple[int | None, int, int | None, int], list[Transfer]] = {}
    for transfer in plan.transfers:
        source, lane = element_of[transfer.source_stage], lane_of[transfer.source]
        if transfer.target == ENGINE:
            found.setdefault((source, lane, None, lane), []).append(transfer)
            continue
        reader = first_reader(plan, transfer)
        target = element_of[reader]
        if target != source:
            key = (source, lane, target, lane_of[transfer.target])
            found.setdefault(key, []).append(transfer)
    begins = [
        Link(None, lane_of[stage.device], element_of[stage.number], lane_of[stage.device],
             "", "control", "The step: token ids, positions, pages of the cache")
        for stage in plan.stages
        if not stage.inputs
    ]  # fmt: skip
    return begins + [
        Link(*ends, _label(transfers), transfers[0].link, _title(transfers))
        for ends, transfers in found.items()
    ]


def first_reader(plan: Plan, transfer: Transfer) -> int:
    """The stage that a record is for: the first on its device that reads any of it."""
    wanted = frozenset(transfer.values)
    return next(
        stage.number
        for stage in plan.stages
        if stage.device == transfer.target and not wanted.isdisjoint(stage.inputs)
    )


def _label(transfers: Sequence[Transfer]) -> str:
    sizes = {transfer.row_bytes for transfer in transfers}
    times = f"{len(transfers)} × " if len(transfers) > 1 else ""
    nbytes = sizes.pop() if len(sizes) == 1 else sum(t.row_bytes for t in transfers)
    return f"{times if not sizes else ''}{size(nbytes)} {transfers[0].link}"


def _title(transfers: Sequence[Transfer]) -> str:
    first = transfers[0]
    values = ", ".join(first.values)
    return f"{first.source} to {first.target}: {_label(transfers)}, each token: {values}"


def repeats_of(plan: Plan) -> tuple[Repeat, ...]:
    """What is folded unless the reader asks for everything."""
    return find_repeats(plan.stages)
