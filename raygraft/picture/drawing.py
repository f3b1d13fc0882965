"""The drawing of a plan: a lane per device, time running down, stages as boxes, records as arrows.

In pixels; `layout.py` finds where everything goes, and the page turns it into SVG.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER = 7.2
"""Width of a character of a region's name, in any usual monospaced font at its size."""
LABEL_CHARACTER = 6.2
"""The same for labels of arrows and for small print, on average."""
MARGIN = 8
GUTTER = 12
"""From the edge of a lane to its boxes."""
PADDING = 8
LINE = 15
NOTE = 14
CAPTION = 26
BAND = 26
GAP = 26
TRACK = 18
PORT = 18
STACK = 3
"""By how much the boxes of a stack show behind each other."""
MOST_LINES = 6
NARROWEST, WIDEST, USUAL = 152, 280, 1040


@dataclass(frozen=True, slots=True)
class Box:
    """A stage, or several of one lane in a stack."""

    key: str
    lane: int
    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]
    note: str
    stacked: bool


@dataclass(frozen=True, slots=True)
class Fold:
    """The frame around what is folded."""

    y: float
    height: float
    caption: str
    target: str
    """Key of the first stage in it, in a drawing of everything."""


@dataclass(frozen=True, slots=True)
class Arrow:
    """A record's way: the points of its path, and where its label stands."""

    points: tuple[tuple[float, float], ...]
    lane: int
    kind: str
    label: str
    label_x: float
    label_y: float
    anchor: str
    title: str

    @property
    def path(self) -> str:
        """As SVG path data, with round corners."""
        return rounded(self.points)


@dataclass(frozen=True, slots=True)
class Drawing:
    """All of it."""

    lane_width: int
    lanes: int
    width: int
    height: int
    end: float
    """Top of the engine's band at the end; the one at the beginning is at the top."""
    boxes: tuple[Box, ...]
    folds: tuple[Fold, ...]
    arrows: tuple[Arrow, ...]

    def lane_x(self, lane: int) -> float:
        """Middle of a lane."""
        return MARGIN + (lane + 0.5) * self.lane_width


def lane_width(lanes: int) -> int:
    """As wide as a page has room for, within reason."""
    return min(WIDEST, max(NARROWEST, USUAL // max(1, lanes)))


def wrap(text: str, columns: int) -> list[str]:
    """A region's name in lines: broken before a dot or after a comma, elsewhere if need be."""
    lines = [""]
    for piece in re.split(r"(?=\.)|(?<=,)", text):
        left = piece
        if len(lines[-1]) + len(left) > columns and lines[-1]:
            lines.append("")
        while len(left) > columns:
            lines[-1], left = left[:columns], left[columns:]
            lines.append("")
        lines[-1] += left
    return lines


def lines_of(names: Sequence[str], columns: int) -> tuple[str, ...]:
    """The lines of a box; what has no room is counted in the last."""
    lines: list[str] = []
    for number, name in enumerate(names):
        own = wrap(name, columns)
        last = number == len(names) - 1
        if len(lines) + len(own) > MOST_LINES - (not last):
            return (*lines, f"and {len(names) - number} more")
        lines += own
    return tuple(lines)


def rounded(points: Sequence[tuple[float, float]], radius: float = 6) -> str:
    """SVG path data through points, with round corners."""
    path = [f"M{points[0][0]:g} {points[0][1]:g}"]
    for before, here, after in zip(points, points[1:], points[2:], strict=False):
        near, far = _towards(here, before, radius), _towards(here, after, radius)
        path.append(f"L{near[0]:g} {near[1]:g}Q{here[0]:g} {here[1]:g} {far[0]:g} {far[1]:g}")
    return "".join([*path, f"L{points[-1][0]:g} {points[-1][1]:g}"])


def _towards(
    start: tuple[float, float], goal: tuple[float, float], most: float
) -> tuple[float, float]:
    """The point at most so far from `start` to `goal`, and not beyond the middle."""
    length = abs(goal[0] - start[0]) + abs(goal[1] - start[1])  # one of them is zero
    share = min(most, length / 2) / length if length else 0.0
    x, y = (a + (b - a) * share for a, b in zip(start, goal, strict=True))
    return round(x, 1), round(y, 1)
