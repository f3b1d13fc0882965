"""Devices, as a person describes them and as they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from raygraft.graph.capability import Verdict, no
from raygraft.graph.graph import Graph, Region
from raygraft.graph.operators import Signature
from raygraft.graph.selectors import Selector
from raygraft.graph.tensors import WeightForm, WeightSlice

ENGINE = "engine"
"""Name of the place where steps begin and token ids arrive; no device may take it."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device as its owner describes it. Memory is in bytes; None means what is there."""

    name: str
    backend: str = "reference"
    threads: int | None = None
    memory: int | None = None
    regions: tuple[str, ...] = ()
    """Selectors, kinds or names; when given, the device runs nothing else."""
    node: str | None = None
    """A label, host name or IP address of the cluster's node that it lives on."""

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
    regions: tuple[str, ...] = ()
    node: str = ""
    """Which machine it is on; devices of one node share memory."""
    asked: bool = True
    """False when the answers are declared ones, from a plan made without the device running."""
    _allowed: dict[str, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def bytes_of(self, graph: Graph, weight: WeightSlice) -> int:
        """Memory that a weight takes, once loaded there."""
        return self.weight_bytes[graph.weight_form(weight)]

    def can_run(self, graph: Graph, leaf: Region) -> Verdict:
        """Whether it can run a region without children, and why not."""
        if self.regions and not self._may_run(graph, leaf):
            return no(f"it only takes {', '.join(self.regions)}")
        for name in leaf.operators:
            signature = graph.signature(graph.operators[graph.index[name]])
            verdict = self.verdicts.get(signature, no(f"it was not asked about {signature}"))
            if not verdict:
                return no(f"{verdict.reason} ({signature})")
        return Verdict(True)

    def _may_run(self, graph: Graph, leaf: Region) -> bool:
        if leaf.name not in self._allowed:
            chain = [leaf]
            while (parent := chain[-1].parent) is not None:
                chain.append(graph.regions[parent])
            self._allowed[leaf.name] = any(
                names_region(item, region) for item in self.regions for region in chain
            )
        return self._allowed[leaf.name]


def names_region(item: str, region: Region) -> bool:
    """Whether one item of a device's `regions` names a region: a selector, or a bare kind."""
    return region.kind == item or Selector.parse(item).matches(region)
