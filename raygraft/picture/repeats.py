"""Finding what a plan does again and again: the same stages, some blocks further on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from raygraft.picture.folding import Numbered, without_number
from raygraft.placement.plan import Stage

LEAST_COUNT = 3
"""Fewer repetitions are drawn."""
LEAST_HIDDEN = 6
"""Folding that would hide fewer stages is not worth a reader's while."""
MOST_PERIOD = 64
"""Longer cycles of stages are not looked for."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """`count` times the same `period` stages from stage `start` on, each time in later blocks.

    The first time is drawn, the others are folded.
    """

    start: int
    period: int
    count: int

    @property
    def folded(self) -> range:
        """Numbers of the stages that are not drawn."""
        return range(self.start + self.period, self.start + self.period * self.count)


@dataclass(frozen=True, slots=True)
class _Known:
    """What matters of a stage here."""

    shape: Hashable
    """Equal for stages that are the same but for the numbers of their blocks."""
    blocks: tuple[int, ...]
    foldable: bool
    """Whether all its regions lie in blocks."""


def find_repeats(stages: Sequence[Stage]) -> tuple[Repeat, ...]:
    """The repetitions worth folding, in order; they do not overlap.

    A stage that also holds regions outside of all blocks, such as `embed` or `head`, may begin a
    first time, but is never folded.
    """
    return tuple(_search([_known(stage) for stage in stages], 0, len(stages)))


def _search(stages: Sequence[_Known], start: int, stop: int) -> list[Repeat]:
    """The repetition that hides most, then those before and after it."""
    found = []
    for period in range(1, min(MOST_PERIOD, (stop - start) // LEAST_COUNT) + 1):
        shifts = [_shift(stages[n], stages[n + period]) for n in range(start, stop - period)]
        for first, length in _runs(shifts):
            repeat = _aligned(stages, start + first, period, length)
            if repeat.count >= LEAST_COUNT and len(repeat.folded) >= LEAST_HIDDEN:
                found.append(repeat)
    if not found:
        return []
    best = min(found, key=lambda repeat: (-len(repeat.folded), repeat.period, repeat.start))
    before, after = (start, best.start), (best.folded.stop, stop)
    return [*_search(stages, *before), best, *_search(stages, *after)]


def _aligned(stages: Sequence[_Known], first: int, period: int, length: int) -> Repeat:
    """Of the ways to cut a run into repetitions, the one whose first time has fewest blocks.

    `length` stages from `first` on come again a period later.
    """
    starts = range(first, first + min(period, length))
    ways = [Repeat(start, period, (first + length - start) // period + 1) for start in starts]

    def rank(way: Repeat) -> tuple[int, int, int]:
        own = stages[way.start : way.start + period]
        return len({block for stage in own for block in stage.blocks}), -way.count, way.start

    return min(ways, key=rank)


def _known(stage: Stage) -> _Known:
    parts = [Numbered.parse(name) for name in stage.regions]
    numbered = [part for part in parts if part is not None]
    first = numbered[0].number if numbered else 0
    shape = tuple((part.before, part.number - first, part.after) for part in numbered)
    claims = tuple(
        without_number(unit.claim, f"{part.before}{part.number}") if unit.claim else ""
        for unit in stage.units
        for part in numbered[:1]
    )
    return _Known(
        shape=(stage.device, shape, claims),
        blocks=tuple(dict.fromkeys(part.number for part in numbered)),
        foldable=len(numbered) == len(parts),
    )


def _shift(stage: _Known, later: _Known) -> int:
    """Blocks from a stage to the same one later; 0 when that is another one."""
    same = stage.blocks and later.foldable and stage.shape == later.shape
    return later.blocks[0] - stage.blocks[0] if same else 0


def _runs(shifts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and length of every run of equal shifts forward."""
    start = 0
    for shift, group in groupby(shifts):
        length = len(list(group))
        if shift > 0:
            yield start, length
        start += length
