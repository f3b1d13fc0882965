"""Selectors: how a person names regions.

| selector            | names                                             |
|---------------------|---------------------------------------------------|
| `blk.3.attn`        | one region                                        |
| `blk.[0-11].attn`   | a range, both ends included; `[0-3,7]` lists      |
| `blk.*.ffn`         | any segment; `*` and `?` also work inside of one  |
| `kind:attention`    | every region of a kind                            |
| `model` or `*`      | the whole model                                   |
| `blk.*.attn+head`   | several of these together                         |
| `kind:ffn+!blk.0.ffn` | those that are not named after a `!`            |
| `!head`             | the whole model but for these                     |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from raygraft.graph.errors import SelectorError
from raygraft.graph.graph import Graph, Region

_RANGE = re.compile(r"\[\d+(-\d+)?(,\d+(-\d+)?)*\]")
_SEGMENT = re.compile(r"[\w*?]+")
_KIND = "kind:"


_NOT = "!"


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a selector: a path or a kind, meant or, after a `!`, not meant."""

    text: str
    negated: bool
    kind: str | None
    segments: tuple[str, ...]

    @classmethod
    def parse(cls, part: str, text: str) -> Term:
        """Read a part of the selector `text`. Raises SelectorError when it is malformed."""
        bare = part.strip()
        negated = bare.startswith(_NOT)
        bare = bare.removeprefix(_NOT).strip()
        if bare.startswith(_KIND):
            kind = bare.removeprefix(_KIND)
            if not _SEGMENT.fullmatch(kind):
                raise SelectorError(f"selector {text!r}: {kind!r} is no kind of region")
            return cls(bare, negated, kind, ())
        segments = tuple(bare.split("."))
        for segment in segments:
            _check_segment(text, segment)
        return cls(bare, negated, None, segments)

    def matches(self, region: Region) -> bool:
        """Whether the term names this region itself (not only one above or below it)."""
        if self.kind is not None:
            return fnmatchcase(region.kind, self.kind)
        if self.segments == ("*",):
            return region.name == "model"
        names = region.name.split(".")
        return len(names) == len(self.segments) and all(
            _segment_matches(pattern, name)
            for pattern, name in zip(self.segments, names, strict=True)
        )

    def select(self, graph: Graph) -> tuple[Region, ...]:
        """The regions it names, in the graph's order; none when there is none."""
        return tuple(region for region in graph.all_regions if self.matches(region))

    def hint(self, graph: Graph) -> str:
        """What would be accepted in its place."""
        kinds = sorted({region.kind for region in graph.regions.values()})
        if self.kind is not None:
            return f"the kinds of this model are {', '.join(kinds)}"
        last = graph.dimensions.blocks - 1
        close = get_close_matches(self.text, graph.regions, n=3, cutoff=0.5)
        example = f"; did you mean {' or '.join(close)}?" if close else ""
        return f"this model has the regions embed, blk.0 to blk.{last}, head and sample{example}"


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector. Make one with `Selector.parse`."""

    text: str
    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read a selector. Raises SelectorError when it is malformed."""
        text = text.strip()
        return cls(text, tuple(Term.parse(part, text) for part in text.split("+")))

    def matches(self, region: Region) -> bool:
        """Whether one of its terms names this region itself, and none excludes it."""
        meant = [term for term in self.terms if not term.negated]
        return (not meant or any(term.matches(region) for term in meant)) and not any(
            term.matches(region) for term in self.terms if term.negated
        )

    def operators(self, graph: Graph) -> frozenset[str]:
        """All operators of the regions it names, without those of the ones it excludes.

        Raises SelectorError when a term names nothing, or nothing is left.
        """
        chosen: set[str] = set() if any(not t.negated for t in self.terms) else set(graph.index)
        excluded: set[str] = set()
        for term in self.terms:
            found = term.select(graph)
            if not found:
                raise SelectorError(f"selector {self.text!r} names no region: {term.hint(graph)}")
            for region in found:
                (excluded if term.negated else chosen).update(region.operators)
        if chosen <= excluded:
            raise SelectorError(f"selector {self.text!r} excludes all that it names")
        return frozenset(chosen - excluded)

    def select(self, graph: Graph) -> tuple[Region, ...]:
        """The regions it names, in the graph's order; of one partly excluded, what is left.

        Raises SelectorError as `operators` does.
        """
        left = self.operators(graph)
        if not any(term.negated for term in self.terms):
            return tuple(region for region in graph.all_regions if self.matches(region))
        found: list[Region] = []
        for region in graph.regions.values():
            within = any(region.name.startswith(f"{other.name}.") for other in found)
            if left.issuperset(region.operators) and not within:
                found.append(region)
        return tuple(found)


def _check_segment(text: str, segment: str) -> None:
    match = _RANGE.fullmatch(segment)
    if match is None:
        if not _SEGMENT.fullmatch(segment):
            raise SelectorError(
                f"selector {text!r}: cannot read {segment!r}; "
                "a segment is a name, a pattern with * or ?, or a range such as [0-11]"
            )
        return
    for start, stop in _ranges(segment):
        if start > stop:
            raise SelectorError(f"selector {text!r}: the range {start}-{stop} is empty")


def _ranges(segment: str) -> list[tuple[int, int]]:
    pairs = []
    for item in segment[1:-1].split(","):
        start, _, stop = item.partition("-")
        pairs.append((int(start), int(stop or start)))
    return pairs


def _segment_matches(pattern: str, name: str) -> bool:
    if pattern.startswith("["):
        return name.isdecimal() and any(a <= int(name) <= b for a, b in _ranges(pattern))
    return fnmatchcase(name, pattern)
