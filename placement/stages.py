"""Cutting an assignment into stages, and the transfers between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raygraft.graph.graph import Graph
from raygraft.placement import costs
from raygraft.placement.devices import ENGINE, Place
from raygraft.placement.plan import Stage, Transfer, Unit
from raygraft.placement.problem import Choice


@dataclass
class _Group:
    """A stage in the making. `sources` are the groups that it needs something of."""

    device: str
    choices: list[Choice] = field(default_factory=list)
    sources: set[int] = field(default_factory=set)


def cut_stages(graph: Graph, assignment: Sequence[Choice]) -> tuple[Stage, ...]:
    """Maximal convex runs of choices on one device, in topological order.

    A choice joins the last stage of its device unless what it needs went through another device
    since: then the union would not be convex, and a new stage begins.
    """
    groups: list[_Group] = []
    group_of: dict[str, int] = {}  # operator -> number of its group
    last: dict[str, int] = {}  # device -> its newest group
    operators = {atom.name: atom.operators for atom in graph.atoms}
    for choice in assignment:
        own = [name for atom in choice.atoms for name in operators[atom]]
        sources = {group_of[graph.producer[value].name] for value in graph.subgraph(own).inputs}
        number = last.get(choice.device)
        if number is None or any(_depends(groups, s, number) for s in sources - {number}):
            number = last[choice.device] = len(groups)
            groups.append(_Group(choice.device))
        groups[number].choices.append(choice)
        groups[number].sources |= sources - {number}
        group_of.update(dict.fromkeys(own, number))
    return tuple(
        _stage(graph, position, groups[number], operators)
        for position, number in enumerate(_topological(groups))
    )


def _depends(groups: Sequence[_Group], later: int, earlier: int) -> bool:
    """Whether group `later` needs something of `earlier`, directly or through others."""
    seen, waiting = set(), [later]
    while waiting:
        number = waiting.pop()
        if number == earlier:
            return True
        if number not in seen:
            seen.add(number)
            waiting.extend(groups[number].sources)
    return False


def _topological(groups: Sequence[_Group]) -> list[int]:
    """Group numbers, sources first; among those that are ready, the earliest begun."""
    order: dict[int, None] = {}
    left = dict(enumerate(groups))
    while left:
        number = next(n for n, group in left.items() if group.sources <= order.keys())
        order[number] = None
        del left[number]
    return list(order)


def _stage(
    graph: Graph, number: int, group: _Group, operators: Mapping[str, tuple[str, ...]]
) -> Stage:
    units: list[Unit] = []
    for choice in group.choices:
        own = tuple(name for atom in choice.atoms for name in operators[atom])
        if choice.claim is None and units and units[-1].claim is None:
            units[-1] = Unit(None, units[-1].operators + own)
        else:
            units.append(Unit(choice.claim, own))
    whole = graph.subgraph([name for unit in units for name in unit.operators])
    return Stage(
        number,
        group.device,
        tuple(atom for choice in group.choices for atom in choice.atoms),
        tuple(units),
        whole.inputs,
        whole.outputs,
    )


def list_transfers(
    graph: Graph, stages: Sequence[Stage], place_of: Mapping[str, Place]
) -> tuple[Transfer, ...]:
    """What goes from a stage to each other device that needs any of its outputs.

    `place_of` holds the place of every device, and of the engine. A value goes to a device once,
    and stays there until its last use; it goes to an actor once, whose devices share it.
    """
    transfers: list[Transfer] = []
    for stage in stages:
        there: dict[str, set[str]] = {place_of[stage.device].actor: {*stage.outputs}}
        for target, values in _wanted_of(graph, stages, stage).items():
            link = costs.link_between(place_of[stage.device], place_of[target])
            known = there.setdefault(place_of[target].actor, set())
            new = [value for value in values if value not in known]
            old = [value for value in values if value in known]
            known.update(new)
            for own, kind in ((new, link), (old, costs.SHARED)):
                if own:
                    transfers.append(
                        Transfer(
                            number=len(transfers),
                            source_stage=stage.number,
                            source=stage.device,
                            target=target,
                            values=tuple(own),
                            row_bytes=sum(graph.values[value].row_bytes for value in own),
                            link=kind,
                        )
                    )
    return tuple(transfers)


def _wanted_of(graph: Graph, stages: Sequence[Stage], stage: Stage) -> dict[str, list[str]]:
    """Other devices, and the engine, with those of a stage's outputs that they read."""
    wanted: dict[str, list[str]] = {}
    for value in stage.outputs:
        readers = [s.device for s in stages if value in s.inputs and s.device != stage.device]
        if value in graph.results:
            readers.append(ENGINE)
        for device in dict.fromkeys(readers):
            wanted.setdefault(device, []).append(value)
    return wanted
