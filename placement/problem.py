"""What is to be assigned: the ways in which devices could run the pieces of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from raygraft.graph.capability import Limits
from raygraft.graph.graph import Graph, Region
from raygraft.placement import costs
from raygraft.placement.devices import DeviceProfile
from raygraft.placement.memory import Ledger
from raygraft.placement.rules import Applied, Constraints


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run some neighbouring atoms: on a device, as a claimed region or op by op."""

    device: str
    atoms: tuple[str, ...]
    claim: str | None = None
    """The region that the device claims, and runs as one unit."""


Assignment = tuple[Choice, ...]
"""Choices that cover every atom once, in the graph's order."""


def devices_of(assignment: Iterable[Choice]) -> dict[str, str]:
    """Atom -> device."""
    return {atom: choice.device for choice in assignment for atom in choice.atoms}


@dataclass(frozen=True, slots=True)
class Answer:
    """A device's no, as a member of a conflict."""

    device: str
    reason: str

    def __str__(self) -> str:
        return f"{self.device}: {self.reason}"


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A device's memory, as a member of a conflict."""

    device: str
    memory: int

    def __str__(self) -> str:
        return f"{self.device} has {costs.size(self.memory)}"


Member = Applied | Answer | MemoryLimit
"""What can make a plan impossible."""


@dataclass(frozen=True)
class Problem:
    """Every atom is to be run by one of its choices, within the memory of the devices."""

    graph: Graph
    devices: Mapping[str, DeviceProfile]
    constraints: Constraints
    limits: Limits
    tokens: int
    """Tokens of context that the cache must hold at least."""
    ignored: frozenset[Member] = frozenset()
    """Answers and memory limits that do not count: to ask what would be possible without them."""

    @cached_property
    def atoms(self) -> tuple[Region, ...]:
        return self.graph.atoms

    @cached_property
    def position(self) -> dict[str, int]:
        """Number of each atom in the graph's order."""
        return {atom.name: number for number, atom in enumerate(self.atoms)}

    @cached_property
    def choices(self) -> tuple[tuple[Choice, ...], ...]:
        """For each atom the choices that begin with it: devices in their order, claims first."""
        found: list[list[Choice]] = [[] for _ in self.atoms]
        spans = self._spans()
        for name, device in self.devices.items():
            for region, start, stop in spans:
                whole = self.atoms[start:stop]
                if device.claims_region(self.graph, region) and all(
                    not self._kept_away(atom, name) for atom in whole
                ):
                    atoms = tuple(atom.name for atom in whole)
                    found[start].append(Choice(name, atoms, region.name))
            for number, atom in enumerate(self.atoms):
                if not self._kept_away(atom, name) and not self.answers(atom, name):
                    found[number].append(Choice(name, (atom.name,)))
        return tuple(tuple(choices) for choices in found)

    def _spans(self) -> list[tuple[Region, int, int]]:
        """The regions whose atoms are neighbours, larger ones first."""
        spans = []
        start_of = {atom.operators[0]: n for n, atom in enumerate(self.atoms)}
        stop_of = {atom.operators[-1]: n + 1 for n, atom in enumerate(self.atoms)}
        if not any(device.claims for device in self.devices.values()):
            return []
        for region in self.graph.all_regions:
            start, stop = start_of[region.operators[0]], stop_of[region.operators[-1]]
            size = sum(len(atom.operators) for atom in self.atoms[start:stop])
            if size == len(region.operators):
                spans.append((region, start, stop))
        return sorted(spans, key=lambda span: span[1] - span[2])

    def _kept_away(self, atom: Region, device: str) -> Applied | Answer | None:
        """The rule, or the device's own restriction, that keeps an atom away from a device."""
        rule = self.constraints.obstacle(atom.operators[0], device)
        if rule is not None:
            return rule
        restriction = self.devices[device].restriction(self.graph, atom)
        answer = Answer(device, restriction) if restriction else None
        return None if answer in self.ignored else answer

    def answers(self, atom: Region, device: str) -> list[Answer]:
        """Why a device cannot run an atom op by op; empty when it can."""
        reasons = self.devices[device].refusals(self.graph, atom)
        answers = [Answer(device, reason) for reason in reasons]
        return [answer for answer in answers if answer not in self.ignored]

    def obstacles(self, atom: Region, device: str) -> list[Member]:
        """All that keeps an atom away from a device, claims apart."""
        kept = self._kept_away(atom, device)
        return [*([kept] if kept is not None else []), *self.answers(atom, device)]

    def memory(self, device: str) -> int | None:
        """Bytes that a device has; None when its limit does not count."""
        limit = MemoryLimit(device, self.devices[device].memory)
        return None if limit in self.ignored else limit.memory

    @cached_property
    def groups(self) -> tuple[frozenset[str], ...]:
        """Atoms that must lie on one device."""
        atom_of = {name: atom.name for atom in self.atoms for name in atom.operators}
        return tuple(
            frozenset(atom_of[name] for name in operators)
            for _, operators in self.constraints.together
        )

    @cached_property
    def _seconds(self) -> dict[tuple[str, str], float]:
        return {}

    def seconds(self, choice: Choice) -> float:
        """Nominal time of one row in a choice. A claimed region is one call."""
        total = costs.REGION_SECONDS
        for atom in choice.atoms:
            key = (atom, choice.device)
            if key not in self._seconds:
                region = self.atoms[self.position[atom]]
                device = self.devices[choice.device]
                self._seconds[key] = costs.read_seconds(self.graph, region, device)
            total += self._seconds[key]
        return total

    @cached_property
    def input_bytes(self) -> tuple[int, ...]:
        """Bytes per row that flow into each atom."""
        values = self.graph.values
        return tuple(
            sum(values[name].row_bytes for name in self.graph.subgraph(atom.operators).inputs)
            for atom in self.atoms
        )

    def filled(self, choices: Iterable[Choice]) -> dict[str, Ledger]:
        """The ledgers of an assignment, which need not be complete."""
        ledgers = {
            name: Ledger(self.graph, device, self.limits) for name, device in self.devices.items()
        }
        for choice in choices:
            for atom in choice.atoms:
                ledgers[choice.device].add(self.atoms[self.position[atom]])
        return ledgers

    def overfull(self, choices: Iterable[Choice]) -> list[Ledger]:
        """Ledgers of the devices that hold more than their memory."""
        found = []
        for name, ledger in self.filled(choices).items():
            memory = self.memory(name)
            if memory is not None and ledger.used(self.tokens) > memory:
                found.append(ledger)
        return found

    def holds(self, assignment: Assignment) -> bool:
        """Whether no device is overfull and what belongs together is together."""
        device_of = devices_of(assignment)
        together = all(len({device_of[atom] for atom in group}) == 1 for group in self.groups)
        return together and not self.overfull(assignment)


def op_by_op(device_of: Mapping[str, str]) -> Assignment:
    """An assignment without claims, from atom -> device in the graph's order."""
    return tuple(Choice(device, (atom,)) for atom, device in device_of.items())
