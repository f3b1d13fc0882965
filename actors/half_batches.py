"""How many half-batches go through the devices at once.

While one half-batch is on one device, another can be on the next. But two half-batches take more
time than a whole one with their rows, so how much is won is measured: rounds with and without
splitting are timed in turns, for each number of sequences, and the faster way is kept for a while:
for longer each time that it wins again, because what else runs on the machine can win a trial too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from raygraft.actors.scheduler import LEAST_CHUNK

TRIAL_ROUNDS = 6
"""Rounds that are timed each way."""
KEPT_ROUNDS = 60
"""Rounds after which both ways are timed again; twice as many when the same one has won again."""
MOST_KEPT_ROUNDS = 500
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
        self._last: tuple[int, int] | None = None
        self._repeated = False
        self._began = 0.0

    def never_splits(self, decoding: int) -> bool:
        """Whether a round with so many sequences that decode, and no prompt, is always whole."""
        return self.most == 1 or self._fixed == 1 or decoding < 2

    def choose(self, decoding: int, prompt_rows: int) -> int:
        """For a round with so many sequences that decode and so many rows of prompts."""
        if self._fixed is not None:
            return min(self._fixed, self.most)
        now = self._clock()
        if self._last is not None and self._repeated:
            sequences, chosen = self._last
            self._trials[sequences].note(chosen, now - self._began)
        self._began = now
        if prompt_rows or self.most == 1 or decoding < 2:
            self._last = None
            work = decoding + prompt_rows // LEAST_CHUNK
            return max(1, min(self.most, work))
        trial = self._trials.setdefault(decoding, Trial(min(self.most, decoding)))
        latest = (decoding, trial.half_batches)
        self._repeated, self._last = latest == self._last, latest
        return trial.half_batches

    def pause(self) -> None:
        """There is nothing to do: the time until the next round is no round's."""
        self._last = None


class Trial:
    """Both ways of one number of sequences, and which of them is in use."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.half_batches = most
        self._seconds: dict[int, list[float]] = {most: [], 1: []}
        self._winner: int | None = None
        self._to_keep = KEPT_ROUNDS
        self._kept = 0

    def note(self, half_batches: int, seconds: float) -> None:
        """A round of so many half-batches took so long, and the one before was alike."""
        if self._kept:
            self._kept -= 1
            if not self._kept:
                self._seconds = {self._most: [], 1: []}
            return
        self._seconds[half_batches].append(seconds)
        unfinished = [n for n, times in self._seconds.items() if len(times) < TRIAL_ROUNDS]
        if unfinished:
            self.half_batches = unfinished[0]
        else:
            winner = min(self._seconds, key=lambda n: median(self._seconds[n]))
            again = winner == self._winner
            self._to_keep = min(2 * self._to_keep, MOST_KEPT_ROUNDS) if again else KEPT_ROUNDS
            self._winner = self.half_batches = winner
            self._kept = self._to_keep
