"""Selectors: how a person names regions.

| selector            | names                                             |
|---------------------|---------------------------------------------------|
| `blk.3.attn`        | one region                                        |
| `blk.[0-11].attn`   | a range, both ends included; `[0-3,7]` lists      |
| `blk.*.ffn`         | any segment; `*` and `?` also work inside of one  |
| `kind:attention`    | every region of a kind                            |
| `model` or `*`      | the whole model                                   |
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


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector. Make one with `Selector.parse`."""

    text: str
    kind: str | None
    segments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read a selector. Raises SelectorError when it is malformed."""
        text = text.strip()
        if text.startswith(_KIND):
            kind = text.removeprefix(_KIND)
            if not _SEGMENT.fullmatch(kind):
                raise SelectorError(f"selector {text!r}: {kind!r} is no kind of region")
            return cls(text, kind, ())
        segments = tuple(text.split("."))
        for segment in segments:
            _check_segment(text, segment)
        return cls(text, None, segments)

    def matches(self, region: Region) -> bool:
        """Whether the selector names this region itself (not only one above or below it)."""
        if self.kind is not None:
            return fnmatchcase(region.kind, self.kind)
        if self.segments == ("*",):
            return region.parent is None
        names = region.name.split(".")
        return len(names) == len(self.segments) and all(
            _segment_matches(pattern, name)
            for pattern, name in zip(self.segments, names, strict=True)
        )

    def select(self, graph: Graph) -> tuple[Region, ...]:
        """The regions it names, in the graph's order.

        Raises SelectorError when there is none; the message says what would be accepted.
        """
        found = tuple(region for region in graph.regions.values() if self.matches(region))
        if not found:
            raise SelectorError(f"selector {self.text!r} names no region: {self._hint(graph)}")
        return found

    def _hint(self, graph: Graph) -> str:
        kinds = sorted({region.kind for region in graph.regions.values()})
        if self.kind is not None:
            return f"the kinds of this model are {', '.join(kinds)}"
        last = graph.dimensions.blocks - 1
        close = get_close_matches(self.text, graph.regions, n=3, cutoff=0.5)
        example = f"; did you mean {' or '.join(close)}?" if close else ""
        return f"this model has the regions embed, blk.0 to blk.{last}, head and sample{example}"


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
