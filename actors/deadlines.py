"""How long a step may take before a device is taken for hanging: many times what it took before."""

from __future__ import annotations

from collections import deque

TIMES = 20
"""A step may take so many times the slowest of the recent steps with as many rows."""
LEAST_SECONDS = 5.0
MOST_SECONDS = 600.0
"""For steps that nothing is known of: code may be compiled in them."""
KNOWN_STEPS = 3
"""Steps after which as many rows are known."""
RECENT_STEPS = 32


class Deadlines:
    """The times of recent steps by their rows, in powers of two. All times are in seconds."""

    def __init__(self, most: float = MOST_SECONDS) -> None:
        self._most = most
        self._recent: dict[int, deque[float]] = {}

    def seconds(self, rows: int) -> float:
        """How long a step of so many rows may take."""
        recent = self._recent.get(rows.bit_length(), ())
        if len(recent) < KNOWN_STEPS:
            return self._most
        return min(self._most, max(LEAST_SECONDS, TIMES * max(recent)))

    def note(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        recent = self._recent.setdefault(rows.bit_length(), deque(maxlen=RECENT_STEPS))
        recent.append(seconds)

    @property
    def slowest(self) -> float | None:
        """The slowest of the recent steps, None when there were none."""
        return max((max(recent) for recent in self._recent.values()), default=None)
