"""How many half-batches go through the devices at once.

While one half-batch is on one device, another can be on the next. But two half-batches take more
time than a whole one with their rows, so how much is won is measured: rounds with and without
splitting are timed in turns, for each number of sequences, and the faster way is kept for a while:
for longer each time that it wins again, because what else runs on the machine can win a trial too.
A round may be several steps: what counts is how long each takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from raygraft.actors.scheduler import LEAST_CHUNK

TRIAL_STEPS = 12
"""Steps that are timed each way."""
KEPT_STEPS = 60
"""Steps after which both ways are timed again; twice as many when the same one has won again."""
MOST_KEPT_STEPS = 500
"""They are never more."""


class HalfBatches:
    """Chooses for one round after the other. `fixed` is always chosen, where it is given."""

    def __init__(
        self,
        most: int,
        fixed: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.most = most
        self._fixed = fixed
        self._clock = clock
        self._trials: dict[int, Trial] = {}
        self._seconds: dict[int, float] = {}
        self._last: tuple[int, int] | None = None
        self._steps = 1
        self._repeated = False
        self._began = 0.0

    def never_splits(self, decoding: int) -> bool:
        """Whether a round with so many sequences that decode, and no prompt, is always whole."""
        return self.most == 1 or self._fixed == 1 or decoding < 2

    def choose(self, decoding: int, prompt_rows: int) -> int:
        """For a round with so many sequences that decode and so many rows of prompts."""
        now = self._clock()
        self._note_last(now)
        trial = None
        if self._fixed is not None:
            chosen = min(self._fixed, self.most)
        elif prompt_rows or self.never_splits(decoding):
            chosen = max(1, min(self.most, decoding + prompt_rows // LEAST_CHUNK))
        else:
            trial = self._trials.setdefault(decoding, Trial(min(self.most, decoding)))
            chosen = trial.half_batches
        latest = None if prompt_rows else (decoding, chosen)
        self._repeated = latest == self._last and trial is not None
        self._last, self._began, self._steps = latest, now, 1
        return chosen

    def lasts(self, steps: int) -> None:
        """The round that was chosen for last is so many steps."""
        self._steps = steps

    def seconds(self, decoding: int) -> float:
        """What a step of about so many sequences takes, or of more; 0.0 while none is known."""
        known = [n for n in self._seconds if n >= decoding.bit_length()]
        return self._seconds[min(known)] if known else 0.0

    def pause(self) -> None:
        """There is nothing to do: the time until the next round is no round's."""
        self._last = None

    def _note_last(self, now: float) -> None:
        """The last round has ended, if nothing lay between."""
        if self._last is None:
            return
        decoding, chosen = self._last
        seconds = (now - self._began) / self._steps
        self._seconds[decoding.bit_length()] = seconds
        if self._repeated:
            self._trials[decoding].note(chosen, seconds, self._steps)


class Trial:
    """Both ways of one number of sequences, and which of them is in use."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.half_batches = most
        self._seconds: dict[int, list[float]] = {most: [], 1: []}
        self._winner: int | None = None
        self._to_keep = KEPT_STEPS
        self._kept = 0

    def note(self, half_batches: int, seconds: float, steps: int) -> None:
        """Steps of so many half-batches took so long each, and the round before was alike."""
        if self._kept > 0:
            self._kept -= steps
            if self._kept <= 0:
                self._seconds = {self._most: [], 1: []}
            return
        self._seconds[half_batches] += [seconds] * steps
        unfinished = [n for n, times in self._seconds.items() if len(times) < TRIAL_STEPS]
        if unfinished:
            self.half_batches = unfinished[0]
        else:
            winner = min(self._seconds, key=lambda n: median(self._seconds[n]))
            again = winner == self._winner
            self._to_keep = min(2 * self._to_keep, MOST_KEPT_STEPS) if again else KEPT_STEPS
            self._winner = self.half_batches = winner
            self._kept = self._to_keep
