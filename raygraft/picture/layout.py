"""The layout of a drawing: pure geometry, from stages and records to coordinates.

A level is a row of boxes that could run at the same time; the gap below it holds the horizontal
parts of the arrows, each on a track.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raygraft.picture.drawing import (
    BAND,
    CAPTION,
    CHARACTER,
    GAP,
    GUTTER,
    LABEL_CHARACTER,
    LINE,
    MARGIN,
    NOTE,
    PADDING,
    PORT,
    TRACK,
    Arrow,
    Box,
    Drawing,
    Fold,
    lane_width,
    lines_of,
)


@dataclass(frozen=True, slots=True)
class Part:
    """A box in the making: what is to stand in it, in which lane."""

    key: str
    lane: int
    names: tuple[str, ...]
    note: str


@dataclass(frozen=True, slots=True)
class Element:
    """What takes a level: one stage, or a fold with a box for every lane that it uses."""

    parts: tuple[Part, ...]
    needs: frozenset[int]
    """Numbers of the elements that it takes something of."""
    caption: str = ""
    """What a fold says; empty for a stage."""
    target: str = ""
    """Key of its first stage, in a drawing of everything."""


@dataclass(frozen=True, slots=True)
class Link:
    """An arrow in the making, from lane to lane. None stands for the engine, at either end."""

    source: int | None
    source_lane: int
    target: int | None
    target_lane: int
    label: str
    kind: str
    title: str


def levels_of(elements: Sequence[Element]) -> list[int]:
    """Each element's level: below what it needs, and below earlier ones in its lanes."""
    levels: list[int] = []
    lowest: dict[int, int] = {}  # lane -> its last level
    barrier = -1  # level of the last fold
    for element in elements:
        above = [levels[n] for n in element.needs]
        if element.caption:
            level = max([*levels, -1]) + 1
            barrier = level
        else:
            above += [lowest.get(part.lane, -1) for part in element.parts]
            level = max([*above, barrier]) + 1
        lowest.update((part.lane, level) for part in element.parts)
        levels.append(level)
    return levels


def tracks_of(spans: Iterable[tuple[float, float]]) -> list[int]:
    """A track for each span, so that no two on a track overlap."""
    taken: list[list[tuple[float, float]]] = []
    found = []
    for low, high in spans:
        track = 0
        while track < len(taken) and any(low < b and a < high for a, b in taken[track]):
            track += 1
        if track == len(taken):
            taken.append([])
        taken[track].append((low, high))
        found.append(track)
    return found


@dataclass(frozen=True, slots=True)
class _Turn:
    """A move to the side, in the gap below a level; -1 is the gap above the first."""

    gap: int
    start: float
    stop: float


def draw(elements: Sequence[Element], links: Sequence[Link], lanes: int) -> Drawing:
    """Lay everything out."""
    return _Layout(elements, links, lanes).drawing()


class _Layout:
    """Levels first, then the arrows' ways between them, then heights, then all coordinates."""

    def __init__(self, elements: Sequence[Element], links: Sequence[Link], lanes: int) -> None:
        self.elements, self.links, self.lanes = elements, links, lanes
        self.lane_width = lane_width(lanes)
        self.width = 2 * MARGIN + lanes * self.lane_width
        self.box_width = self.lane_width - 2 * GUTTER
        columns = int((self.box_width - 2 * PADDING) / CHARACTER)
        parts = [part for element in elements for part in element.parts]
        self.lines = {part.key: lines_of(part.names, columns) for part in parts}
        self.levels = levels_of(elements)
        self.count = max([*self.levels, -1]) + 1
        self.occupied = {
            (level, lane)
            for level, element in zip(self.levels, elements, strict=True)
            for lane in (range(lanes) if element.caption else [p.lane for p in element.parts])
        }
        self.turns = [self._turns(link, *x) for link, x in zip(links, self._ports(), strict=True)]
        self.tracks, counts = self._tracks()
        self.tops, self.gap_tops, self.end = self._heights(counts)

    def drawing(self) -> Drawing:
        """Everything with its coordinates."""
        boxes, folds = [], []
        for element, level in zip(self.elements, self.levels, strict=True):
            y = self.tops[level]
            if element.caption:
                height = self._height(element)
                folds.append(Fold(y, height, element.caption, element.target))
                y += CAPTION
            boxes += [self._box(part, y, stacked=bool(element.caption)) for part in element.parts]
        return Drawing(
            lane_width=self.lane_width,
            lanes=self.lanes,
            width=self.width,
            height=int(self.end + BAND + 1),
            end=self.end,
            boxes=tuple(boxes),
            folds=tuple(folds),
            arrows=tuple(self._arrow(number) for number in range(len(self.links))),
        )

    def _center(self, lane: int) -> float:
        return MARGIN + (lane + 0.5) * self.lane_width

    def _ports(self) -> list[tuple[float, float]]:
        """Where each link leaves and arrives: several of one box stand side by side."""
        links = self.links
        xs = [[self._center(link.source_lane), self._center(link.target_lane)] for link in links]
        for end in (0, 1):
            meeting: dict[tuple[int | None, int], list[int]] = {}
            for number, link in enumerate(links):
                key = (link.target, link.target_lane) if end else (link.source, link.source_lane)
                meeting.setdefault(key, []).append(number)
            for (_, lane), numbers in meeting.items():
                numbers.sort(key=lambda number: xs[number][1 - end])
                step = min(PORT, (self.box_width - 2 * PADDING) / len(numbers))
                for place, number in enumerate(numbers):
                    offset = step * (place - (len(numbers) - 1) / 2)
                    xs[number][end] = round(self._center(lane) + offset, 1)
        return [(leaves, arrives) for leaves, arrives in xs]

    def _turns(self, link: Link, leaves: float, arrives: float) -> list[_Turn]:
        """Its moves to the side: one where its own or the target's lane is free, else two."""
        above = -1 if link.source is None else self.levels[link.source]
        below = self.count if link.target is None else self.levels[link.target]
        passed = range(above + 1, below)
        if not any((level, link.source_lane) in self.occupied for level in passed):
            return [_Turn(below - 1, leaves, arrives)]
        if not any((level, link.target_lane) in self.occupied for level in passed):
            return [_Turn(above, leaves, arrives)]
        between = self._center(link.target_lane) - self.lane_width / 2 + GUTTER / 2
        return [_Turn(above, leaves, between), _Turn(below - 1, between, arrives)]

    def _tracks(self) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
        """(link, gap) -> its track there; and how many tracks each gap has."""
        wanted: dict[int, dict[int, tuple[float, float]]] = {}
        for number, turns in enumerate(self.turns):
            for turn in turns:
                span = self._span(number, turn)
                if span[1] > span[0]:
                    wanted.setdefault(turn.gap, {})[number] = span
        tracks, counts = {}, {}
        for gap, spans in wanted.items():
            found = tracks_of(spans.values())
            counts[gap] = max(found) + 1
            tracks.update({(number, gap): t for number, t in zip(spans, found, strict=True)})
        return tracks, counts

    def _span(self, number: int, turn: _Turn) -> tuple[float, float]:
        """What a turn takes of its track: the line, and the label if it is there."""
        low, high = sorted((turn.start, turn.stop))
        if turn != self._labelled(number):
            return low, high
        left, right, _ = self._label(number)
        return min(low, left), max(high, right)

    def _labelled(self, number: int) -> _Turn:
        """The turn that has room for the label."""
        return max(self.turns[number], key=lambda turn: abs(turn.stop - turn.start))

    def _label(self, number: int) -> tuple[float, float, str]:
        """Left and right of a label, and what it is anchored by: above its line, or beside it."""
        turn = self._labelled(number)
        low, high = sorted((turn.start, turn.stop))
        text = self.links[number].label
        size = len(text) * LABEL_CHARACTER
        if not text:
            return low, low, "middle"
        if high - low > size + 2 * PADDING:
            middle = self._clear_of_lanes(turn, size)
            return middle - size / 2, middle + size / 2, "middle"
        if high + PADDING + size < self.width:
            return high + PADDING, high + PADDING + size, "start"
        return low - PADDING - size, low - PADDING, "end"

    def _clear_of_lanes(self, turn: _Turn, size: float) -> float:
        """Between two lanes, where nothing runs down, and near the source; else half-way."""
        room = sorted((turn.start, turn.stop))
        edges = [MARGIN + lane * self.lane_width for lane in range(1, self.lanes)]
        free = [x for x in edges if room[0] <= x - size / 2 and x + size / 2 <= room[1]]
        return min(free, key=lambda x: abs(x - turn.start), default=sum(room) / 2)

    def _heights(self, tracks: dict[int, int]) -> tuple[list[float], dict[int, float], float]:
        """Tops of the levels, tops of the gaps, and where the engine's last band begins."""
        tallest = [0.0] * self.count
        for element, level in zip(self.elements, self.levels, strict=True):
            tallest[level] = max(tallest[level], self._height(element))
        y = float(BAND)
        tops, gaps = [], {}
        for level in range(-1, self.count):
            if level >= 0:
                tops.append(y)
                y += tallest[level]
            gaps[level] = y
            y += GAP + TRACK * (tracks.get(level, 0) - 1) + 10 if level in tracks else GAP
        return tops, gaps, y

    def _height(self, element: Element) -> float:
        tallest = max(self._box_height(part) for part in element.parts)
        return tallest + CAPTION + GUTTER if element.caption else tallest

    def _box_height(self, part: Part) -> float:
        return 2 * PADDING + LINE * len(self.lines[part.key]) + (NOTE if part.note else 0)

    def _box(self, part: Part, y: float, *, stacked: bool) -> Box:
        return Box(
            key=part.key,
            lane=part.lane,
            x=self._center(part.lane) - self.box_width / 2,
            y=y,
            width=self.box_width,
            height=self._box_height(part),
            lines=self.lines[part.key],
            note=part.note,
            stacked=stacked,
        )

    def _arrow(self, number: int) -> Arrow:
        link, turns = self.links[number], self.turns[number]
        points = [(turns[0].start, self._bottom(link))]
        for turn in turns:
            if turn.start != turn.stop:
                y = self._track_y(number, turn)
                points += [(turn.start, y), (turn.stop, y)]
        points.append((turns[-1].stop, self._top(link)))
        left, right, anchor = self._label(number)
        label_x = {"start": left, "end": right, "middle": (left + right) / 2}[anchor]
        label_y = self._track_y(number, self._labelled(number)) + (-5 if anchor == "middle" else 4)
        return Arrow(
            points=tuple(points),
            lane=link.source_lane,
            kind=link.kind,
            label=link.label,
            label_x=round(label_x, 1),
            label_y=label_y,
            anchor=anchor,
            title=link.title,
        )

    def _track_y(self, number: int, turn: _Turn) -> float:
        return self.gap_tops[turn.gap] + GAP - 8 + TRACK * self.tracks.get((number, turn.gap), 0)

    def _bottom(self, link: Link) -> float:
        if link.source is None:
            return BAND
        element = self.elements[link.source]
        return self.tops[self.levels[link.source]] + self._height(element)

    def _top(self, link: Link) -> float:
        return self.end if link.target is None else self.tops[self.levels[link.target]]
