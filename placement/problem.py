"""What is to be assigned: the ways in which devices could run the pieces of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from raygraft.graph.capability import Limits
from raygraft.graph.graph import Graph, Region
from raygraft.placement import costs
from raygraft.placement.devices import DeviceProfile
from raygraft.placement.memory import Ledger
from raygraft.placement.pieces import Pieces
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


PricedChoices = Sequence[Sequence[tuple[Choice, float]]]
"""For each atom the choices that begin with it, with their nominal times."""


def devices_of(assignment: Iterable[Choice]) -> dict[str, str]:
    """Atom -> device."""
    return {atom: choice.device for choice in assignment for atom in choice.atoms}


def block_of(atom: str) -> str:
    """The region below the model that an atom belongs to: `blk.3`, `embed`."""
    return ".".join(atom.split(".")[:2])


def merged(groups: Iterable[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """Groups without common members: those that had any have become one."""
    found: list[frozenset[str]] = []
    for group in groups:
        whole = group.union(*(other for other in found if other & group))
        found = [*(other for other in found if not other & group), whole]
    return tuple(found)


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

    pieces: Pieces
    constraints: Constraints
    tokens: int = 0
    """Tokens of context that the cache must hold at least."""
    ignored: frozenset[Member] = frozenset()
    """Answers and memory limits that do not count: to ask what would be possible without them."""

    def at(self, tokens: int) -> Problem:
        """The same with a cache for so many tokens, and with all that is found out already."""
        other = copy(self)
        object.__setattr__(other, "tokens", tokens)
        return other

    @property
    def graph(self) -> Graph:
        return self.pieces.graph

    @property
    def devices(self) -> Mapping[str, DeviceProfile]:
        return self.pieces.devices

    @property
    def limits(self) -> Limits:
        return self.pieces.limits

    @property
    def atoms(self) -> tuple[Region, ...]:
        return self.pieces.atoms

    @property
    def position(self) -> Mapping[str, int]:
        """Number of each atom in the graph's order."""
        return self.pieces.position

    @cached_property
    def choices(self) -> tuple[tuple[Choice, ...], ...]:
        """For each atom the choices that begin with it: devices in their order, claims first."""
        found: list[list[Choice]] = [[] for _ in self.atoms]
        for name in self.devices:
            open_to = [self._kept_away(atom, name) is None for atom in self.atoms]
            for region, start, stop in self.pieces.claimed(name):
                if all(open_to[start:stop]):
                    atoms = tuple(atom.name for atom in self.atoms[start:stop])
                    found[start].append(Choice(name, atoms, region.name))
            for number, atom in enumerate(self.atoms):
                if open_to[number] and not self.answers(atom, name):
                    found[number].append(Choice(name, (atom.name,)))
        return tuple(tuple(choices) for choices in found)

    @cached_property
    def priced_choices(self) -> PricedChoices:
        """The choices with their nominal times."""
        return tuple(
            tuple((choice, self.seconds(choice)) for choice in choices) for choices in self.choices
        )

    @cached_property
    def able(self) -> Mapping[str, tuple[str, ...]]:
        """Atom -> the devices with a choice that runs it, in their order."""
        able: dict[str, dict[str, None]] = {atom.name: {} for atom in self.atoms}
        for choices in self.choices:
            for choice in choices:
                for atom in choice.atoms:
                    able[atom][choice.device] = None
        return {
            atom: tuple(name for name in self.devices if name in found)
            for atom, found in able.items()
        }

    def able_together(self, group: Iterable[str]) -> tuple[str, ...]:
        """The devices that can run each of these atoms."""
        return tuple(n for n in self.devices if all(n in self.able[atom] for atom in group))

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
        answers = [Answer(device, reason) for reason in self.pieces.refusals(atom, device)]
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
        """Atoms that must lie on one device. No atom is in two of these."""
        atom_of = {name: atom.name for atom in self.atoms for name in atom.operators}
        return merged(
            frozenset(atom_of[name] for name in operators)
            for _, operators in self.constraints.together
        )

    def seconds(self, choice: Choice) -> float:
        """Nominal time of one row in a choice. A claimed region is one call."""
        reading = sum(self.pieces.seconds(atom, choice.device) for atom in choice.atoms)
        return costs.REGION_SECONDS + reading

    def hop(self, source: str, atom: str, target: str) -> float:
        """Nominal time of what flows into an atom, from one device to another."""
        if source == target:
            return 0.0
        link = costs.link_between(self.devices[source].place, self.devices[target].place)
        return costs.hop_seconds(link, self.pieces.input_bytes[self.position[atom]])

    def cost(self, assignment: Assignment) -> float:
        """Nominal time of one row, each piece handing on to the next, and the last to the first."""
        hops = (self.hop(a.device, b.atoms[0], b.device) for a, b in pairwise(assignment))
        first, last = (self.devices[assignment[end].device].place.actor for end in (0, -1))
        turn = costs.TURN_SECONDS if first != last else 0.0
        return sum(map(self.seconds, assignment)) + sum(hops) + turn

    @property
    def has_room(self) -> bool:
        """Whether all memory together would do, if regions could be cut anywhere."""
        memories = [self.memory(name) for name in self.devices]
        footprints = self.pieces.footprints.values()
        cache = self.tokens * sum(footprint.token_bytes for footprint in footprints)
        workspace = max(footprint.workspace for footprint in footprints)
        need = cache + self.pieces.least_weight_bytes + workspace
        return None in memories or need <= sum(memory or 0 for memory in memories)

    def filled(self, choices: Iterable[Choice]) -> dict[str, Ledger]:
        """The ledgers of an assignment, which need not be complete."""
        ledgers = {
            name: Ledger(self.graph, device, self.limits) for name, device in self.devices.items()
        }
        for choice in choices:
            for atom in choice.atoms:
                ledgers[choice.device].put(self.pieces.footprints[atom])
        return ledgers

    def fits(self, ledger: Ledger, atoms: Iterable[str] = ()) -> bool:
        """Whether a device holds what is in its ledger, and these atoms too."""
        memory = self.memory(ledger.device.name)
        more = (self.pieces.footprints[atom] for atom in atoms)
        return memory is None or ledger.with_more(more, self.tokens) <= memory

    def overfull(self, choices: Iterable[Choice]) -> list[Ledger]:
        """Ledgers of the devices that hold more than their memory."""
        return [ledger for ledger in self.filled(choices).values() if not self.fits(ledger)]

    def holds(self, assignment: Assignment) -> bool:
        """Whether no device is overfull and what belongs together is together."""
        device_of = devices_of(assignment)
        together = all(len({device_of[atom] for atom in group}) == 1 for group in self.groups)
        return together and not self.overfull(assignment)


def op_by_op(device_of: Mapping[str, str]) -> Assignment:
    """An assignment without claims, from atom -> device in the graph's order."""
    return tuple(Choice(device, (atom,)) for atom, device in device_of.items())
