"""The resident loop of an actor: rounds of half-batches through its devices' parts of a plan.

A round begins with a step header for each of its half-batches; the first says how many there are.
They take turns: each stage runs for the first half-batch, then for the second, and so on, before
the next stage does. All actors keep to this order, so that none waits for a record which waits
for it. The next round may begin here while the last half-batch is still on other actors.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from raygraft.actors.ahead import drawn_value, is_ahead, step_after, with_drawn
from raygraft.actors.exchange import SLICE_SECONDS, Exchange, HalfBatch, Stopped
from raygraft.actors.header import step_of, steps_of
from raygraft.actors.native_turns import LATE, UNEXPECTED, Half, NativeTurns
from raygraft.actors.part import ActorPart, Links
from raygraft.actors.records import Record, RecordKind
from raygraft.actors.sharing import named
from raygraft.actors.trace import EventKind
from raygraft.actors.turns import Turn, Turns
from raygraft.actors.worker import DeviceWorker, span_of
from raygraft.graph.errors import DeviceFailedError, LinkError
from raygraft.graph.step import Step
from raygraft.kernels.base import Array, Started

LOOK_SECONDS = 0.0002
"""How long it looks for the next header before it looks whether the step in progress is done."""


@dataclass(frozen=True, slots=True)
class StartedHalf:
    """A half-batch that is being computed in one run."""

    turn: Turn
    half: HalfBatch
    run: Started
    began: float


class ResidentLoop:
    """Goes through an actor's schedule, half-batch by half-batch, until told to stop."""

    def __init__(self, part: ActorPart, devices: Mapping[str, DeviceWorker], links: Links) -> None:
        self._part = part
        self._links = links
        self._devices = {name: devices[name] for name in part.parts}
        turns = part.schedule.turns
        units = {n: own for worker in self._devices.values() for n, own in worker.runners.items()}
        self._turns = Turns(turns, units, links, part.values)
        self._first = self._devices[turns[0].stage.device]
        only = {number: [unit.runner for unit in own] for number, own in units.items()}
        self._native = NativeTurns(part, turns, only, links)
        self._draws = drawn_value(part)
        self._drawn: Array | None = None
        """The tokens that the last step drew, where it did so here."""
        self._under_way: deque[StartedHalf] = deque()
        """Started and not finished: the next one may be computed while the last one is sent."""
        self._early: Record | None = None
        """A header that was looked for too soon."""
        self._ended = 0.0
        """When the last run ended that was started and waited for."""

    def run(self, stopping: threading.Event) -> None:
        """Rounds, until a SHUTDOWN record comes or `stopping` is set.

        Raises LinkError when a record is not the expected one, DeviceFailedError when the
        backend fails.
        """
        self._stopping = stopping
        self._records = Exchange(self._part, self._links, stopping)
        try:
            while self._round():
                pass
        except Stopped:
            pass
        finally:  # what comes next finds nothing that is still computed
            for started in self._under_way:
                with suppress(Exception):
                    started.run.finish()

    def _round(self) -> bool:
        """One round; False when told to shut down."""
        if self._under_way:
            self._finish()
            return True
        header, self._early = self._early or self._records.header(self._first), None
        if header.kind is RecordKind.SHUTDOWN:
            return False
        halves, count, steps = [self._begin(header)], header.transfer, steps_of(header)
        if steps > 1:
            self._take_several(halves, count, steps)
        elif count == 1 and self._start(halves[0], self._whole_turn):
            self._finish()
        else:
            self._take_turns(halves, count)
            self._forget(halves)
        return True

    def _forget(self, halves: Sequence[HalfBatch]) -> None:
        """A step of these is done here."""
        for half in halves:
            del self._records.values[half.header.step]

    def _take_turns(self, halves: list[HalfBatch], count: int) -> None:
        """All turns of a round of `count` half-batches, of which the first one is here."""
        number = 0
        if count > 1:
            turn, number = self._turns.at(0, apart=self._tracing)
            for place in range(count):
                if place == len(halves):
                    halves.append(self._begin(self._records.header(self._first)))
                self._take_turn(turn, halves[place], count)
        while number < len(self._turns):
            done = self._run_native(number, halves)
            if done == number:
                turn, done = self._turns.at(number, apart=self._tracing)
                for half in halves:
                    self._take_turn(turn, half, count)
            number = done

    def _take_several(self, halves: list[HalfBatch], count: int, steps: int) -> None:
        """A burst: a round of several steps. What it yields goes out when all of them are done."""
        while len(halves) < count:
            halves.append(self._begin(self._records.header(self._first)))
        if (count == 1 and self._run_several(halves[0], steps)) or self._run_burst(halves, steps):
            return
        self._records.hold()
        for left in range(steps, 0, -1):
            self._take_turns(halves, count)
            self._forget(halves)
            if left > 1:
                halves = [self._following(half) for half in halves]
        self._records.release()

    def _run_several(self, half: HalfBatch, steps: int) -> bool:
        """A burst that this actor computes in one run; whether it can."""
        turn = self._whole_turn
        if half.step is None or turn is None or self._tracing:
            return False
        ((_, runner),) = turn.runs
        began = time.perf_counter()
        with self._blaming(turn):
            found = runner.run_several(half.step, steps)
        if found is None:
            return False
        self._account(turn, began)
        for left, outputs in zip(range(steps, 0, -1), found, strict=True):
            self._give(turn, half, {name: outputs[name] for name in turn.outputs})
            self._forget([half])
            if left > 1:
                half = self._following(half)
        return True

    def _run_burst(self, halves: Sequence[HalfBatch], steps: int) -> bool:
        """A burst of which this actor takes all turns without Python; whether it can."""
        if not self._native.can_go_on(len(halves)) or self._run_native(0, halves, steps) == 0:
            return False
        for half in halves:
            self._count(half.step, steps - 1)
        self._forget(halves)
        return True

    def _following(self, half: HalfBatch) -> HalfBatch:
        """The next one of a burst."""
        header = replace(half.header, step=half.header.step + 1)
        step = None if half.step is None else step_after(half.step, half.drawn)
        return self._enter(header, step, ahead=False)

    @property
    def _whole_turn(self) -> Turn | None:
        """The only turn of this actor, if it needs nothing but a step."""
        turn, number = self._turns.at(0, apart=self._tracing)
        return turn if turn.alone and number == len(self._turns) else None

    def _start(self, half: HalfBatch, turn: Turn | None) -> bool:
        """Start a half-batch of which this actor computes its part in one run; whether it can."""
        if half.step is None or turn is None:
            return False
        ((_, runner),) = turn.runs
        began = time.perf_counter()
        with self._blaming(turn):
            run = runner.start(half.step, {})
        if run is not None:
            self._under_way.append(StartedHalf(turn, half, run, began))
        return run is not None

    def _finish(self) -> None:
        """Wait for a half-batch and send what it yields; start the next one before, if it is here.

        It may be where this one was sent ahead, too.
        """
        started = self._under_way[0]
        turn, half, run = started.turn, started.half, started.run
        if run.draws and half.ahead and not self._tracing:
            while not (self._early or run.done() or self._stopping.is_set()):
                self._early = self._records.glance(LOOK_SECONDS)
            if self._early is not None and self._follows(self._early):
                following, self._early = self._begin(self._early, drawn=False), None
                self._start(following, turn)
        with self._blaming(turn):
            outputs = run.finish()
        if turn.direct and self._stopping.is_set():  # it may have been cut short
            raise Stopped
        self._under_way.popleft()
        self._account(turn, max(started.began, self._ended))
        self._ended = time.perf_counter()
        self._give(turn, half, {name: outputs[name] for name in turn.outputs})
        self._forget([half])

    def _follows(self, header: Record) -> bool:
        """Whether it is the header of a step that can be started while another one is computed."""
        same = header.kind is RecordKind.STEP and header.epoch == self._part.epoch
        return same and header.transfer == 1 and bool(header.tensors)

    @property
    def _tracing(self) -> bool:
        """Whether a timeline wants to show stage by stage."""
        return any(worker.trace.on for worker in self._devices.values())

    def _begin(self, header: Record, *, drawn: bool = True) -> HalfBatch:
        """The half-batch of a header. The step before has `drawn` its tokens, or is about to."""
        self._records.check(header)
        step = step_of(header)
        ahead = step is not None and is_ahead(step)
        if step is not None and ahead and drawn and self._drawn is not None:
            step = with_drawn(step, self._drawn)
        return self._enter(header, step, ahead=ahead)

    def _enter(self, header: Record, step: Step | None, *, ahead: bool) -> HalfBatch:
        self._count(step, 1)
        return HalfBatch(header, step, self._records.values.setdefault(header.step, {}), ahead)

    def _count(self, step: Step | None, steps: int) -> None:
        """So many steps like this one are computed."""
        if step is not None:
            for worker in self._devices.values():
                worker.counters.steps += steps
                worker.counters.rows += steps * step.rows

    def _run_native(self, first: int, halves: Sequence[HalfBatch], steps: int = 1) -> int:
        """Take turns from `first` on without Python, if they can be; the first that is left."""
        last = self._native.end_of(first, early=len(halves) > 1 and steps == 1)
        if last == first or self._tracing:
            return first
        prepared = [
            Half(h.step, h.header.epoch, h.header.step, h.header.half_batch, h.values)
            for h in halves
        ]
        if not self._native.begin(first, last, prepared, steps):
            return first
        while (ended := self._native.run(SLICE_SECONDS)) == LATE:
            if self._stopping.is_set():
                raise Stopped
        for device, (waited, ran, records, nbytes) in self._native.totals.items():
            counters = self._devices[device].counters
            counters.wait_seconds += waited
            counters.run_seconds += ran
            counters.records_sent += records
            counters.bytes_sent += nbytes
        number, place = self._native.finish()
        if ended == UNEXPECTED:  # an early record of another half-batch, or one that is wrong
            if steps > 1:
                raise LinkError(f"{named(tuple(self._devices))} found a wrong record in a burst")
            for half in halves[place:]:
                self._take_turn(self._turns.single(number), half, len(halves))
            number += 1
        elif len(halves) == 1 or steps > 1:
            for half in halves:
                self._send_samples(self._turns.single(last - 1), half, steps)
        return number

    def _send_samples(self, turn: Turn, half: HalfBatch, steps: int) -> None:
        """Send what native turns have sampled, step by step; `turn` was the last of them."""
        for number, samples in enumerate(self._native.sampled(half.step, steps)):
            header = replace(half.header, step=half.header.step + number)
            own = HalfBatch(header, half.step, samples, half.ahead)
            for transfer in turn.send:
                if samples.keys() >= {*transfer.values}:
                    self._records.send(transfer, own, self._devices[turn.stages[-1].device])
            if self._draws in samples:
                self._drawn = samples[self._draws]

    def _take_turn(self, turn: Turn, half: HalfBatch, count: int) -> None:
        """Receive, run and send for one of `count` half-batches."""
        if half.step is None:
            return
        device = self._devices[turn.stages[0].device]
        self._records.fetch(turn.receive, half, device)
        began = time.perf_counter()
        outputs = self._run(turn, half.step, half.values)
        if device.trace.on:
            place = (turn.stages[0].number, half.header.step, half.header.half_batch)
            device.trace.add(EventKind.STAGE, *place, began)
        if count > 1:  # a runner may write its results where it wrote those of its last run
            for name in outputs.keys() - turn.forget | outputs.keys() & {self._draws}:
                outputs[name] = outputs[name].copy()
        self._give(turn, half, outputs)

    def _give(self, turn: Turn, half: HalfBatch, outputs: dict[str, Array]) -> None:
        """What a turn has made goes to those who want it."""
        assert half.step is not None
        half.values.update(outputs)
        if self._draws in outputs:
            self._drawn = half.drawn = outputs[self._draws]
        for name, transfer in turn.written:
            counters = self._devices[name].counters
            counters.records_sent += 1
            counters.bytes_sent += half.step.rows * transfer.row_bytes
        for transfer in turn.send:
            self._records.send(transfer, half, self._devices[turn.stages[-1].device])
        for name in turn.forget:
            del half.values[name]

    def _run(self, turn: Turn, step: Step, values: dict[str, Array]) -> dict[str, Array]:
        began = time.perf_counter()
        local = {name: values[name] for name in turn.inputs}
        with self._blaming(turn):
            for names, runner in turn.runs:
                local.update(runner.run(step, {name: local[name] for name in names}))
            outputs = {name: local[name] for name in turn.outputs}
        if turn.direct and self._stopping.is_set():  # it may have been cut short
            raise Stopped
        self._account(turn, began)
        return outputs

    @contextmanager
    def _blaming(self, turn: Turn) -> Iterator[None]:
        """Errors are those of the turn's devices."""
        try:
            yield
        except Exception as error:
            if self._stopping.is_set():
                raise Stopped from error
            raise DeviceFailedError(
                f"{named(turn.devices)} failed in {span_of(turn.regions)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _account(self, turn: Turn, began: float) -> None:
        """It has been computed from then on."""
        seconds = (time.perf_counter() - began) / len(turn.stages)
        for stage in turn.stages:
            self._devices[stage.device].counters.run_seconds += seconds
