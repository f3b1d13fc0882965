"""Devices for tests of the planner: they run everything, and hold weights as the file does."""

from collections.abc import Mapping
from math import prod

from raygraft.graph.capability import YES, Limits, Verdict
from raygraft.graph.graph import Graph
from raygraft.graph.operators import Signature
from raygraft.graph.tensors import row_bytes
from raygraft.placement.devices import DeviceProfile
from raygraft.placement.memory import Ledger

PLENTY = 1 << 40
LIMITS = Limits(max_rows=8, context=64)


def device(
    graph: Graph,
    name: str,
    memory: int = PLENTY,
    *,
    type: str = "cpu",  # noqa: A002  # as DeviceProfile calls it
    threads: int = 1,
    regions: tuple[str, ...] = (),
    node: str = "",
    actor: str = "",
    asked: bool = True,
    verdicts: Mapping[Signature, Verdict] | None = None,
) -> DeviceProfile:
    """A device's profile for one model. `verdicts` holds what it does not answer with yes."""
    return DeviceProfile(
        name=name,
        type=type,
        memory=memory,
        threads=threads,
        verdicts=dict.fromkeys(graph.signatures, YES) | dict(verdicts or {}),
        weight_bytes={
            (kind, shape): prod(shape[:-1]) * row_bytes(kind, shape[-1])
            for kind, shape in graph.weight_forms
        },
        regions=regions,
        node=node,
        actor=actor,
        asked=asked,
    )


def room_for(graph: Graph, regions: str, *, tokens: int = 64, limits: Limits = LIMITS) -> int:
    """Bytes that these regions take together, with a cache for so many tokens."""
    ledger = Ledger(graph, device(graph, "any"), limits)
    for name in regions.split():
        wanted = {leaf.name for leaf in graph.descendants(graph.regions[name])}
        ledger.add_all(leaf for leaf in graph.leaves if leaf.name in wanted)
    return ledger.used(tokens)


def assignment_of(graph: Graph, **regions: str) -> dict[str, str]:
    """Leaf -> device, from the regions that each device has; later ones win."""
    found = {}
    for name, wanted in regions.items():
        for region in wanted.split():
            for below in graph.descendants(graph.regions[region]):
                found[below.name] = name
    return {leaf.name: found[leaf.name] for leaf in graph.leaves}
