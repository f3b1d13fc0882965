"""Cutting an assignment into stages, and the transfers between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raygraft.graph.graph import Graph, Region
from raygraft.placement import costs
from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Stage, Transfer


@dataclass
class _Group:
    """A stage in the making. `before` holds all groups it depends on, directly or not."""

    device: str
    leaves: list[Region] = field(default_factory=list)
    sources: set[int] = field(default_factory=set)


def cut_stages(graph: Graph, device_of: Mapping[str, str]) -> tuple[Stage, ...]:
    """Maximal convex runs of regions on one device, in topological order.

    A region joins the last stage of its device unless what it needs went through another device
    since: then the union would not be convex, and a new stage begins.
    """
    groups: list[_Group] = []
    group_of: dict[str, int] = {}  # operator -> number of its group
    last: dict[str, int] = {}  # device -> its newest group
    for leaf in graph.leaves:
        device = device_of[leaf.name]
        inputs = graph.subgraph(leaf.operators).inputs
        sources = {group_of[graph.producer[value].name] for value in inputs}
        number = last.get(device)
        if number is None or any(_depends(groups, s, number) for s in sources - {number}):
            number = last[device] = len(groups)
            groups.append(_Group(device))
        groups[number].leaves.append(leaf)
        groups[number].sources |= sources - {number}
        group_of.update(dict.fromkeys(leaf.operators, number))
    return tuple(
        _stage(graph, position, groups[number])
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
    order: list[int] = []
    left = dict(enumerate(groups))
    while left:
        number = next(n for n, group in left.items() if group.sources <= set(order))
        order.append(number)
        del left[number]
    return order


def _stage(graph: Graph, number: int, group: _Group) -> Stage:
    names = [name for leaf in group.leaves for name in leaf.operators]
    subgraph = graph.subgraph(names)
    return Stage(
        number,
        group.device,
        tuple(leaf.name for leaf in group.leaves),
        tuple(op.name for op in subgraph.operators),
        subgraph.inputs,
        subgraph.outputs,
    )


def list_transfers(
    graph: Graph, stages: Sequence[Stage], node_of: Mapping[str, str]
) -> tuple[Transfer, ...]:
    """What travels: one record from a stage to each other device that needs any of its outputs.

    `node_of` holds the node of every device, and of the engine. A value goes to a device once,
    and stays there until its last use.
    """
    transfers: list[Transfer] = []
    for stage in stages:
        wanted: dict[str, list[str]] = {}
        for value in stage.outputs:
            readers = [s.device for s in stages if value in s.inputs and s.device != stage.device]
            if value in graph.results:
                readers.append(ENGINE)
            for device in dict.fromkeys(readers):
                wanted.setdefault(device, []).append(value)
        for target, values in wanted.items():
            transfers.append(
                Transfer(
                    number=len(transfers),
                    source_stage=stage.number,
                    source=stage.device,
                    target=target,
                    values=tuple(values),
                    row_bytes=sum(graph.values[value].row_bytes for value in values),
                    link=costs.link_between(node_of[stage.device], node_of[target]),
                )
            )
    return tuple(transfers)
