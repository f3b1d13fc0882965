"""The pieces that are placed, what each takes, and what the devices say: whatever the rules are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from raygraft.graph.capability import NO_CLAIM, Limits, Verdict
from raygraft.graph.graph import Graph, Region
from raygraft.graph.operators import Signature
from raygraft.graph.tensors import WeightSlice
from raygraft.placement import costs
from raygraft.placement.devices import DeviceProfile
from raygraft.placement.memory import Footprint

Span = tuple[Region, int, int]
"""A region whose atoms are neighbours: the number of the first, and that after the last."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """The atoms of a graph, with all that is asked of them again and again found once."""

    graph: Graph
    devices: Mapping[str, DeviceProfile]
    limits: Limits
    _refusals: dict[tuple[str, Hashable], tuple[str, ...]] = field(default_factory=dict, init=False)
    _claims: dict[tuple[str, int], Verdict] = field(default_factory=dict, init=False)
    _seconds: dict[tuple[str, int], float] = field(default_factory=dict, init=False)

    @cached_property
    def atoms(self) -> tuple[Region, ...]:
        return self.graph.atoms

    @cached_property
    def position(self) -> dict[str, int]:
        """Number of each atom in the graph's order."""
        return {atom.name: number for number, atom in enumerate(self.atoms)}

    @cached_property
    def footprints(self) -> dict[str, Footprint]:
        """What each atom needs."""
        return {atom.name: Footprint.of(self.graph, atom, self.limits) for atom in self.atoms}

    @cached_property
    def sharing(self) -> tuple[frozenset[str], ...]:
        """Atoms that read the same weight, for each weight with several."""
        readers: dict[WeightSlice, set[str]] = {}
        for atom, footprint in self.footprints.items():
            for weight, _ in footprint.slices:
                readers.setdefault(weight, set()).add(atom)
        return tuple(frozenset(atoms) for atoms in readers.values() if len(atoms) > 1)

    @cached_property
    def input_bytes(self) -> tuple[int, ...]:
        """Bytes per row that flow into each atom."""
        values = self.graph.values
        return tuple(
            sum(values[name].row_bytes for name in self.graph.subgraph(atom.operators).inputs)
            for atom in self.atoms
        )

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The regions that could be claimed as one, larger ones first."""
        start_of = {atom.operators[0]: n for n, atom in enumerate(self.atoms)}
        stop_of = {atom.operators[-1]: n + 1 for n, atom in enumerate(self.atoms)}
        spans = []
        for region in self.graph.all_regions:
            start, stop = start_of[region.operators[0]], stop_of[region.operators[-1]]
            size = sum(len(atom.operators) for atom in self.atoms[start:stop])
            if size == len(region.operators):
                spans.append((region, start, stop))
        return tuple(sorted(spans, key=lambda span: span[1] - span[2]))

    def claimed(self, device: str) -> Iterator[Span]:
        """The spans that a device claims."""
        yield from (span for span in self.spans if self._claim(span[0], device))

    def _claim(self, region: Region, device: str) -> Verdict:
        key = (device, self._forms[region.name])
        if key not in self._claims:
            profile = self.devices[device]
            asked = bool(profile.claims)
            self._claims[key] = profile.claims_region(self.graph, region) if asked else NO_CLAIM
        return self._claims[key]

    def refusals(self, atom: Region, device: str) -> tuple[str, ...]:
        """Why a device cannot run an atom operator by operator; empty when it can.

        A device that supports no operator of it is quoted with what it says of the regions around
        instead, if it has anything to say; what it says of the fewest regions, last.
        """
        key = (device, self._atom_forms[atom.name])
        if key not in self._refusals:
            profile = self.devices[device]
            refused = profile.refusals(self.graph, atom)
            signatures = self.graph.region_signature(atom).operators
            if refused and not any(profile.verdicts.get(s) for s in signatures):
                said = [self._claim(region, device) for region in regions_around(self.graph, atom)]
                reasons = {v.reason: None for v in said if not v and v != NO_CLAIM}
                often = Counter(verdict.reason for verdict in profile.claims.values())
                refused = sorted(reasons, key=lambda reason: -often[reason]) or refused
            self._refusals[key] = tuple(refused)
        return self._refusals[key]

    def seconds(self, atom: str, device: str) -> float:
        """Nominal time of an atom's weights for one row."""
        key = (device, self._weights[atom])
        if key not in self._seconds:
            look_up = self.atoms[self.position[atom]].kind == "embed"  # reads one row
            sizes = self.devices[device].weight_bytes
            nbytes = sum(sizes[form] for _, form in self.footprints[atom].slices)
            self._seconds[key] = 0.0 if look_up else nbytes / costs.bandwidth(self.devices[device])
        return self._seconds[key]

    @cached_property
    def _weights(self) -> dict[str, int]:
        """A number for each atom, the same for those of one kind with weights of equal forms."""
        known: dict[Hashable, int] = {}
        numbers = {}
        for atom in self.atoms:
            forms = tuple(form for _, form in self.footprints[atom.name].slices)
            numbers[atom.name] = known.setdefault((atom.kind, forms), len(known))
        return numbers

    @cached_property
    def least_weight_bytes(self) -> int:
        """All weights, each once, where it takes the least."""
        forms = dict(pair for footprint in self.footprints.values() for pair in footprint.slices)
        sizes = [device.weight_bytes for device in self.devices.values()]
        return sum(min(size[form] for size in sizes) for form in forms.values())

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """A number for each operator, the same for those with equal signatures."""
        known: dict[Signature, int] = {}
        return {
            operator.name: known.setdefault(self.graph.signature(operator), len(known))
            for operator in self.graph.operators
        }

    def _form(self, region: Region) -> Hashable:
        return region.kind, tuple(self._numbers[name] for name in region.operators)

    @cached_property
    def _forms(self) -> dict[str, int]:
        """A number for each region, the same for those of which a device must say the same."""
        known: dict[Hashable, int] = {}
        return {
            region.name: known.setdefault(self._form(region), len(known))
            for region in self.graph.all_regions
        }

    @cached_property
    def _atom_forms(self) -> dict[str, Hashable]:
        """The same for atoms: with the regions around them."""
        return {
            atom.name: (
                self._form(atom),
                *(self._forms[region.name] for region in regions_around(self.graph, atom)),
            )
            for atom in self.atoms
        }


def regions_around(graph: Graph, atom: Region) -> list[Region]:
    """The regions that hold an atom: those of the tree, widest first, then those beside it."""
    found = [leaf := graph.regions[atom.name.partition("#")[0]]]
    while leaf.parent is not None:
        found.insert(0, leaf := graph.regions[leaf.parent])
    own = (region for region in graph.own_regions if atom.operators[0] in region.operators)
    return [region for region in (*found, *own) if set(atom.operators) <= set(region.operators)]
