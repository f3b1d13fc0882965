"""What a device, or the engine, did when: events in a table that is made beforehand.

Recording costs no allocation and writes no log. The table is bounded: when it is full, the oldest
events give way, and are counted. `timeline.py` makes something of it that a person can look at.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raygraft.actors.records import Record, RecordKind

MAX_EVENTS = 1 << 18
"""Events of one track that are kept. A token of a 30-block model that is cut at every block takes
some 90 on each of two devices."""

EVENT = np.dtype(
    [
        ("kind", "u1"),
        ("half_batch", "u1"),
        ("number", "i4"),
        ("step", "i8"),
        ("begin", "f8"),
        ("end", "f8"),
        ("nbytes", "i8"),
    ]
)
Events = npt.NDArray[Any]


class EventKind(IntEnum):
    """What happened; `number` is that of a stage or a transfer of the plan, else -1."""

    STAGE = 1
    WAIT = 2  # for a record of a transfer, or the engine's header; receiving it included
    SEND = 3
    HEADER = 4  # the engine builds a step's header, and sends it
    TOKENS = 5  # the engine hands a step's tokens to their sequences
    TEXT = 6  # tokens become text, and stop strings are looked for


@dataclass(frozen=True, slots=True)
class Recorded:
    """The events of one track, oldest first, in seconds of its own clock."""

    events: Events
    dropped: int
    """Older events that there was no room for."""
    ahead: float = 0.0
    """Seconds that this clock is ahead of the engine's."""


class Trace:
    """The events of one track. One thread adds to it, and looks at `on` before."""

    def __init__(self) -> None:
        self.on = False
        self.step = 0
        """That of the latest event."""
        self._events = np.zeros(0, EVENT)
        self._count = 0
        self._began = 0.0

    def start(self, room: int = MAX_EVENTS) -> None:
        """Record from now on, at most the latest `room` events."""
        self._events = np.zeros(room, EVENT)
        self._count = 0
        self._began = time.perf_counter()
        self.on = True

    def add(
        self,
        kind: EventKind,
        number: int,
        step: int,
        half_batch: int,
        begin: float,
        nbytes: int = 0,
    ) -> None:
        """Something that began at `begin` (of `time.perf_counter`) and ends now."""
        end = time.perf_counter()
        event = (kind, half_batch, number, step, max(begin, self._began), end, nbytes)
        self._events[self._count % len(self._events)] = event
        self._count += 1
        self.step = step

    def received(self, record: Record, begin: float) -> None:
        """A record that was waited for since `begin`."""
        number = record.transfer if record.kind is RecordKind.DATA else -1
        self.add(EventKind.WAIT, number, record.step, record.half_batch, begin)

    def recorded(self) -> Recorded:
        """All that is still there."""
        count, room = self._count, len(self._events)
        if count <= room:
            return Recorded(self._events[:count].copy(), 0)
        return Recorded(np.roll(self._events, -(count % room)), count - room)


def clock() -> tuple[str, float]:
    """The machine's current boot, and the time that events are recorded in.

    On Linux this clock is the same in all processes of a machine until it boots again.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return boot, time.perf_counter()
