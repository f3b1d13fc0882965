"""Half-batches in flight: headers out, results in, and how long to wait for them.

Headers go out in rounds of one or more half-batches, in turn; a half-batch's next header goes out
as soon as its last result is back, while the others are still being computed. It may go out earlier
still where nothing is split, or a round may be several steps: see `ahead.py`. Results come back in
the order of the headers.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from raygraft.actors.ahead import BURST_SECONDS, MOST_IN_FLIGHT
from raygraft.actors.batch import Chunk
from raygraft.actors.deadlines import Deadlines
from raygraft.actors.fleet import Fleet, Wires
from raygraft.actors.half_batches import HalfBatches
from raygraft.actors.header import header_of
from raygraft.actors.records import Record, RecordKind, describe
from raygraft.actors.request import GeneratedSequence
from raygraft.actors.scheduler import Scheduler
from raygraft.actors.trace import EventKind, Trace
from raygraft.graph.errors import LinkError, LinkFullError, RaygraftError, RunError
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import BURST_STEPS, most_half_batches

SLICE_SECONDS = 0.1
"""How long one wait lasts before the engine looks whether all devices are alive."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A half-batch that was sent and has not come back."""

    step: int
    half_batch: int
    half_batches: int
    chunks: Sequence[Chunk]
    prefill: bool
    sent: float
    """On the monotonic clock."""
    burst: int
    """Steps of its header, whose results come together; 0 after the first of them."""

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)


class Rounds:
    """The rounds of one epoch, from the loading of a plan to the next."""

    def __init__(
        self,
        plan: Plan,
        fleet: Fleet,
        wires: Wires,
        trace: Trace,
        *,
        epoch: int,
        first_step: int,
        deadlines: Deadlines,
        half_batches: int | None,
        ahead: bool = False,
        bursts: bool = False,
    ) -> None:
        """`half_batches` are as many as pay, or as many as are given.

        Steps are sent `ahead` of the tokens they need, where nothing is split, or in `bursts`.
        """
        self.wires = wires
        self.in_flight: deque[InFlight] = deque()
        self.step = first_step
        """The last one that a header was sent for."""
        self.stopping: Callable[[], bool] = lambda: False
        self.sizes = HalfBatches(most_half_batches(plan), half_batches)
        self.deadlines = deadlines
        self._fleet = fleet
        self._trace = trace
        self._epoch = epoch
        self._ahead = ahead
        self._bursts = bursts
        self._size = self._steps = 1
        """Half-batches of the round, and steps."""
        self._next = 0
        self._back = 0.0
        """When the last result came."""
        self.took = 0.0
        """Seconds that its half-batch took."""

    def send(self, scheduler: Scheduler) -> Iterator[InFlight]:
        """Send the headers of all half-batches that are not in flight; yields each with rows."""
        while (drawn := self._drawn(scheduler)) is not None:
            begins = self._next == 0
            if begins:
                scheduler.admit()
                self._size = self.sizes.choose(scheduler.decoding, scheduler.prompt_rows)
                self._steps = self._burst(scheduler)
                self.sizes.lasts(self._steps)
            chunks = scheduler.choose(self._size, self._size - self._next, drawn)
            if begins and not chunks:
                self.sizes.pause()
                return  # no round begins before there is something to do
            yield from self._send_header(chunks, scheduler.continued(chunks, self._steps - 1))

    def _drawn(self, scheduler: Scheduler) -> Mapping[GeneratedSequence, int] | None:
        """Tokens that are not known when the next half-batch is sent; None when it must wait."""
        if not any(sent.half_batch == self._next for sent in self.in_flight):
            return {}
        latest = self.in_flight[-1]
        if not self._ahead or len(self.in_flight) == MOST_IN_FLIGHT or latest.half_batches > 1:
            return None
        scheduler.admit()
        if latest.prefill or scheduler.prompt_rows:  # who comes next waits for one chunk, not two
            return None
        whole = self.sizes.never_splits(scheduler.decoding)
        return scheduler.next_of(latest.chunks) if whole else None

    def _burst(self, scheduler: Scheduler) -> int:
        """Steps of the round that begins."""
        seconds = self.sizes.seconds(scheduler.decoding) if self._bursts else 0.0
        if not seconds:
            return 1
        return scheduler.certain_steps(min(BURST_STEPS, math.ceil(BURST_SECONDS / seconds)))

    def began(self, sent: InFlight) -> float:
        """When the devices could begin with the oldest half-batch in flight."""
        return max(sent.sent, self._back)

    def receive(self) -> tuple[InFlight, Record]:
        """Wait for what the oldest half-batch in flight yields."""
        sent = self.in_flight[0]
        began = time.perf_counter()
        while True:
            record = self.wires.results.receive(SLICE_SECONDS)
            if record is None:
                self._look_after(f"the result of step {sent.step}", sent)
            elif (record.epoch, record.step) == (self._epoch, sent.step):
                break
            elif record.epoch >= self._epoch:  # what is older was on its way when a plan ended
                raise LinkError(f"waited for step {sent.step}, found {describe(record)}")
        if self._trace.on:
            self._trace.received(record, began)
        self.in_flight.popleft()
        now = time.monotonic()
        came_with_another = sent.burst > 1 and sent.half_batch > 0
        if sent.burst and not came_with_another:
            self.took = (now - self.began(sent)) / sent.burst
        self.deadlines.note(sent.rows, self.took)
        self._back = now
        return sent, record

    def complete(self) -> None:
        """Devices wait for all headers of a round: send those that are missing, empty."""
        while self._next:
            self._send_header(())

    def shut_down(self) -> None:
        """Tell all loops to end, as far as they can be told."""
        with suppress(RaygraftError):  # the fleet stops what cannot be told to end
            self.complete()
        record = Record(RecordKind.SHUTDOWN, self._epoch, self.step + 1, 0)
        for sender in self.wires.control.values():
            with suppress(RaygraftError):
                sender.send(record, SLICE_SECONDS)

    def close(self) -> None:
        """Let go of the engine's links."""
        for sender in self.wires.control.values():
            sender.close()
        self.wires.results.close()

    def _send_header(
        self, chunks: Sequence[Chunk], following: Sequence[Sequence[Chunk]] = ()
    ) -> list[InFlight]:
        """Send the header of the next half-batch, and of those that follow it, to every device."""
        began = time.perf_counter()
        number, size = self._next, self._size
        first, steps = self.step + 1, self._steps
        self.step += steps
        header = header_of(
            chunks, epoch=self._epoch, step=first, half_batch=number, half_batches=size, steps=steps
        )
        prefill = any(chunk.rows > 1 for chunk in chunks)
        now = time.monotonic()
        flying = [
            InFlight(step, number, size, own, prefill, now, steps if step == first else 0)
            for step, own in enumerate((chunks, *following), first)
        ]
        sent = flying[0]
        if chunks:
            self.in_flight += flying
        self._next = (number + 1) % size
        for name, sender in self.wires.control.items():
            while True:
                try:
                    sender.send(header, SLICE_SECONDS)
                    break
                except LinkFullError:
                    self._look_after(f"device {name} to take a step's header", sent)
        if self._trace.on:
            self._trace.add(EventKind.HEADER, -1, first, number, began)
        return flying if chunks else []

    def _look_after(self, what: str, sent: InFlight) -> None:
        """Between two waits: are all devices alive, and is there time left?"""
        if self.stopping():
            raise RunError("this engine was shut down")
        self._fleet.check()
        seconds = self.deadlines.seconds(sent.rows) * max(1, sent.burst)
        if time.monotonic() > self.began(sent) + seconds:
            raise LinkError(f"waited {seconds:.0f} s for {what}: a device hangs")
