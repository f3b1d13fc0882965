"""Devices, as a person describes them and as they answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from raygraft.graph.capability import RegionSignature, Verdict, no
from raygraft.graph.graph import Graph, Region
from raygraft.graph.operators import Signature
from raygraft.graph.selectors import Selector
from raygraft.graph.tensors import WeightForm, WeightSlice

ENGINE = "engine"
"""Name of the place where steps begin and token ids arrive; no device may take it."""


class Place(NamedTuple):
    """Where a device, or the engine, is: values reach it by the link that leads there."""

    node: str
    """Which machine."""
    actor: str
    """Which actor there; its devices hand values on by reference."""
    gpu: int | None = None
    """Which GPU there, when the actor is on one."""
    link: str = ""
    """The link by which another GPU of this node may write to its memory; empty for none."""
    far_link: str = ""
    """The same of a GPU of another node."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device as its owner describes it. Memory is in bytes; None means what is there."""

    name: str
    backend: str = "cpu"
    threads: int | None = None
    memory: int | None = None
    regions: tuple[str, ...] = ()
    """Selectors, kinds or names; when given, the device runs nothing else."""
    node: str | None = None
    """A label, host name or IP address of the cluster's node that it lives on."""
    gpu: int | None = None
    """Which of the machine's GPUs; devices that name the same one share an actor."""
    actor: str | None = None
    """Devices that name the same one share an actor."""

    def with_threads(self, threads: int) -> DeviceSpec:
        """The same device, with so many threads unless it names its own number."""
        return self if self.threads is not None else replace(self, threads=threads)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """A device as the planner sees it: its answers, its memory and its place."""

    name: str
    type: str
    memory: int
    threads: int
    verdicts: Mapping[Signature, Verdict]
    weight_bytes: Mapping[WeightForm, int]
    """Memory that a weight of each type and shape takes, once loaded there."""
    claims: Mapping[RegionSignature, Verdict] = field(default_factory=dict)
    """Its answers about whole regions."""
    found: tuple[Region, ...] = ()
    """Regions that its backend's patterns found."""
    regions: tuple[str, ...] = ()
    node: str = ""
    """Which machine it is on; devices of one node share memory."""
    actor: str = ""
    """The actor that it shares with others; empty when it has one of its own."""
    gpu: int | None = None
    """The GPU that its actor is on, and on no other."""
    link: str = ""
    """See `Place.link`."""
    far_link: str = ""
    """See `Place.far_link`."""
    asked: bool = True
    """False when the answers are declared ones, from a plan made without the device running."""
    _allowed: dict[str, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def place(self) -> Place:
        """Its node and its actor, which has the device's name unless it is shared."""
        return Place(self.node, self.actor or self.name, self.gpu, self.link, self.far_link)

    def bytes_of(self, graph: Graph, weight: WeightSlice) -> int:
        """Memory that a weight takes, once loaded there."""
        return self.weight_bytes[graph.weight_form(weight)]

    def refusals(self, graph: Graph, region: Region) -> list[str]:
        """Why it cannot run a region operator by operator; empty when it can."""
        kinds: dict[str, dict[str, None]] = {}
        for name in region.operators:
            signature = graph.signature(graph.operators[graph.index[name]])
            verdict = self.verdicts.get(signature, no("it was not asked"))
            if not verdict:
                kinds.setdefault(verdict.reason, {})[signature.kind] = None
        return [f"{reason} ({', '.join(found)})" for reason, found in kinds.items()]

    def claims_region(self, graph: Graph, region: Region) -> Verdict:
        """Whether it claims a region as one unit."""
        signature = graph.region_signature(region)
        return self.claims.get(signature, no("it was not asked about such a region"))

    def restriction(self, graph: Graph, atom: Region) -> str:
        """Why its owner keeps a region away from it; empty when he does not."""
        if not self.regions:
            return ""
        if not self._allowed:
            self._allowed.update(dict.fromkeys(self._named(graph), True))
        if self._allowed.get(atom.operators[0], False):
            return ""
        return f"it only takes {', '.join(self.regions)}"

    def _named(self, graph: Graph) -> Iterator[str]:
        for region in graph.all_regions:
            if any(names_region(item, region) for item in self.regions):
                yield from region.operators


def names_region(item: str, region: Region) -> bool:
    """Whether one item of a device's `regions` names a region: a selector, or a bare kind."""
    return region.kind == item or Selector.parse(item).matches(region)
