"""Saying many regions in few words: whole regions by their names, equal ones as ranges."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from raygraft.graph.graph import Graph, Region

_NUMBERED = re.compile(r"^(?P<before>[^.]*\.)(?P<number>\d+)(?P<after>(\..*|#.*)?)$")


@dataclass(frozen=True, slots=True)
class Numbered:
    """A region's name around the number of its block: `blk.`, 3, `.attn`."""

    before: str
    number: int
    after: str

    @classmethod
    def parse(cls, name: str) -> Numbered | None:
        """The parts of a name; None when it names no block."""
        match = _NUMBERED.match(name)
        return cls(match["before"], int(match["number"]), match["after"]) if match else None


@dataclass(frozen=True, slots=True)
class Folded:
    """Atoms under one name, such as `blk.[0-11].attn`."""

    text: str
    atoms: tuple[str, ...]


def fold(graph: Graph, atoms: Iterable[str]) -> list[Folded]:
    """Atoms in few words, in the order of their first."""
    operators = {atom.name: atom.operators for atom in graph.atoms}
    atom_of = {operator: atom for atom in atoms for operator in operators[atom]}
    tops: list[tuple[str, tuple[str, ...]]] = []

    def visit(region: Region) -> None:
        found = tuple(dict.fromkeys(atom_of[o] for o in region.operators if o in atom_of))
        if found and all(operator in atom_of for operator in region.operators):
            tops.append((region.name, found))
        elif found and region.children:
            for child in region.children:
                visit(graph.regions[child])
        else:
            tops.extend((atom, (atom,)) for atom in found)  # pieces of a leaf

    visit(graph.regions["model"])
    groups: dict[tuple[str, str], list[tuple[int | None, tuple[str, ...]]]] = {}
    for name, own in tops:
        parts = Numbered.parse(name)
        key = (parts.before, parts.after) if parts else (name, "")
        groups.setdefault(key, []).append((parts.number if parts else None, own))
    folded = []
    for (before, after), members in groups.items():
        numbers = [number for number, _ in members if number is not None]
        text = f"{before}{in_ranges(numbers)}{after}" if numbers else before
        folded.append(Folded(text, tuple(atom for _, own in members for atom in own)))
    return folded


def in_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as a selector writes them: `3`, `[0-11]`, `[0,2,4-6]`."""
    runs = [[numbers[0], numbers[0]]]
    for before, number in pairwise(numbers):
        if number == before + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(numbers) == 1:
        return str(numbers[0])
    return "[" + ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs) + "]"


def fold_alike(
    graph: Graph, atoms: Iterable[str], likeness: Callable[[str], Hashable]
) -> list[Folded]:
    """Atoms in few words, where only those of one likeness share a name."""
    groups: dict[Hashable, list[str]] = {}
    for atom in atoms:
        groups.setdefault(likeness(atom), []).append(atom)
    folded = [item for group in groups.values() for item in fold(graph, group)]
    position = {atom.name: number for number, atom in enumerate(graph.atoms)}
    return sorted(folded, key=lambda item: position[item.atoms[0]])


def without_number(text: str, name: str) -> str:
    """A text about a region, with `*` for the number of its block: the same for all blocks."""
    parts = Numbered.parse(name)
    if parts is None:
        return text
    block = re.escape(f"{parts.before}{parts.number}")
    return re.sub(rf"\b{block}(?!\d)", f"{parts.before}*", text)


def common_text(texts: Sequence[str], names: Sequence[str]) -> str:
    """What texts about several regions say, where they differ by block numbers at most."""
    return texts[0] if len(set(texts)) == 1 else without_number(texts[0], names[0])
