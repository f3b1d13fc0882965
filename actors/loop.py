"""The resident loop of a device: rounds of half-batches through its part of a plan.

A round begins with a step header for each of its half-batches; the first says how many there are.
They take turns: each stage runs for the first half-batch, then for the second, and so on, before
the next stage does. All devices keep to this order, so that none waits for a record which waits
for it. The next round may begin here while the last half-batch is still on other devices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from raygraft.actors.header import step_of
from raygraft.actors.links import Receiver
from raygraft.actors.native_turns import LATE, UNEXPECTED, Half, NativeTurns
from raygraft.actors.part import Links, Part
from raygraft.actors.records import Record, RecordKind, describe
from raygraft.actors.trace import EventKind, Trace
from raygraft.graph.errors import DeviceFailedError, LinkError, LinkFullError
from raygraft.graph.graph import Subgraph
from raygraft.graph.step import Step
from raygraft.kernels.base import Array, Runner
from raygraft.placement.plan import Transfer
from raygraft.placement.schedule import StageTurn

SLICE_SECONDS = 0.2
"""How long one wait lasts before the loop looks whether it should stop."""


@dataclass(slots=True)
class Counters:
    """What a device has done so far. Times are in seconds."""

    questions: int = 0
    """How often it was asked what it can run."""
    steps: int = 0
    rows: int = 0
    run_seconds: float = 0.0
    wait_seconds: float = 0.0
    records_sent: int = 0
    bytes_sent: int = 0


@dataclass(frozen=True, slots=True)
class LoadedUnit:
    """A unit of a stage, ready to run."""

    subgraph: Subgraph
    runner: Runner


@dataclass(slots=True)
class HalfBatch:
    """A step in progress on this device."""

    header: Record
    step: Step | None
    """None when it has no rows: its turns do nothing."""
    values: dict[str, Array]


class ResidentLoop:
    """Goes through a device's schedule, half-batch by half-batch, until told to stop."""

    def __init__(
        self,
        name: str,
        part: Part,
        runners: Mapping[int, Sequence[LoadedUnit]],
        links: Links,
        counters: Counters,
        trace: Trace,
    ) -> None:
        """`runners` are those of each stage, by its number."""
        self.name = name
        self.counters = counters
        self._trace = trace
        self._part = part
        self._turns = part.schedule.turns
        self._runners = runners
        self._links = links
        only = {number: [unit.runner for unit in units] for number, units in runners.items()}
        self._native = NativeTurns(part, self._turns, only, links)
        self._values: dict[int, dict[str, Array]] = {}
        """By step: values of half-batches in progress, and of some that have yet to begin here."""
        self._transfers = {t.number: t for turn in self._turns for t in turn.receive}
        self._kept = {
            turn.stage.number: [name for name in turn.stage.outputs if name not in turn.forget]
            for turn in self._turns
        }

    def run(self, stopping: threading.Event) -> None:
        """Rounds, until a SHUTDOWN record comes or `stopping` is set.

        Raises LinkError when a record is not the expected one, DeviceFailedError when the
        backend fails.
        """
        self._stopping = stopping
        with suppress(_Stopped):
            while self._round():
                pass

    def _round(self) -> bool:
        """One round; False when told to shut down."""
        header = self._receive(self._links.control)
        while header.epoch < self._part.epoch:  # it was on its way when a plan ended
            header = self._receive(self._links.control)
        if header.kind is RecordKind.SHUTDOWN:
            return False
        halves = [self._begin(header)]
        count = header.transfer
        number = 0
        if count > 1:
            self._take_turn(self._turns[0], halves[0], count)
            while len(halves) < count:
                halves.append(self._begin(self._receive(self._links.control)))
                self._take_turn(self._turns[0], halves[-1], count)
            number = 1
        while number < len(self._turns):
            done = self._run_native(number, halves)
            for half in halves if done == number else ():
                self._take_turn(self._turns[number], half, count)
            number = max(done, number + 1)
        for half in halves:
            del self._values[half.header.step]
        return True

    def _begin(self, header: Record) -> HalfBatch:
        if header.kind is not RecordKind.STEP or header.epoch != self._part.epoch:
            raise LinkError(f"device {self.name} expected a header, found a {describe(header)}")
        step = step_of(header)
        if step is not None:
            self.counters.steps += 1
            self.counters.rows += step.rows
        return HalfBatch(header, step, self._values.setdefault(header.step, {}))

    def _run_native(self, first: int, halves: Sequence[HalfBatch]) -> int:
        """Take turns from `first` on without Python, if they can be; the first that is left."""
        last = self._native.end_of(first)
        if last == first or self._trace.on:
            return first
        prepared = [
            Half(h.step, h.header.epoch, h.header.step, h.header.half_batch, h.values)
            for h in halves
        ]
        if not self._native.begin(first, last, prepared):
            return first
        while (ended := self._native.run(SLICE_SECONDS)) == LATE:
            if self._stopping.is_set():
                raise _Stopped
        waited, ran, records, nbytes = self._native.totals
        self.counters.wait_seconds += waited
        self.counters.run_seconds += ran
        self.counters.records_sent += records
        self.counters.bytes_sent += nbytes
        number, place = self._native.finish()
        if ended == UNEXPECTED:  # an early record of another half-batch, or one that is wrong
            for half in halves[place:]:
                self._take_turn(self._turns[number], half, len(halves))
            number += 1
        return number

    def _take_turn(self, turn: StageTurn, half: HalfBatch, count: int) -> None:
        """Receive, run and send for one of `count` half-batches."""
        if half.step is None:
            return
        values = half.values
        for transfer in turn.receive:
            while transfer.values[0] not in values:
                self._take_in(self._receive(self._links.receivers[transfer.source]), transfer, half)
        began = time.perf_counter()
        outputs = self._run(turn, half.step, values)
        if self._trace.on:
            place = (turn.stage.number, half.header.step, half.header.half_batch)
            self._trace.add(EventKind.STAGE, *place, began)
        if count > 1:  # a runner may write its results where it wrote those of its last run
            for name in self._kept[turn.stage.number]:
                outputs[name] = outputs[name].copy()
        values.update(outputs)
        for transfer in turn.send:
            self._send(transfer, half)
        for name in turn.forget:
            del values[name]

    def _take_in(self, record: Record, expected: Transfer, half: HalfBatch) -> None:
        """Put a record's tensors among the values of its step.

        The sender may have more stages than this device, or fewer, so records of other half-batches
        may come before the expected one. Those of one half-batch always keep their order.
        """
        if record.epoch < self._part.epoch:
            return  # it was on its way when a plan ended
        step, transfer = half.header.step, self._transfers.get(record.transfer)
        early = record.step >= min(self._values) and record.step != step
        if (
            record.epoch != self._part.epoch
            or transfer is None
            or transfer.source != expected.source
            or not (early or (record.step, transfer) == (step, expected))
        ):
            raise LinkError(
                f"device {self.name} expected transfer {expected.number} of step {step} "
                f"from {expected.source}, found a {describe(record)}"
            )
        values = self._values.setdefault(record.step, {})
        values.update(zip(transfer.values, record.tensors, strict=True))

    def _run(self, turn: StageTurn, step: Step, values: dict[str, Array]) -> dict[str, Array]:
        began = time.perf_counter()
        local = {name: values[name] for name in turn.stage.inputs}
        try:
            for unit in self._runners[turn.stage.number]:
                inputs = {name: local[name] for name in unit.subgraph.inputs}
                local.update(unit.runner.run(step, inputs))
            outputs = {name: local[name] for name in turn.stage.outputs}
        except Exception as error:
            raise DeviceFailedError(
                f"device {self.name} failed in {regions_of(self._part, turn.stage.number)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.counters.run_seconds += time.perf_counter() - began
        return outputs

    def _receive(self, receiver: Receiver) -> Record:
        """The next record."""
        began = time.perf_counter()
        while not self._stopping.is_set():
            record = receiver.receive(SLICE_SECONDS)
            if record is not None:
                self.counters.wait_seconds += time.perf_counter() - began
                if self._trace.on:
                    self._trace.received(record, began)
                return record
        raise _Stopped

    def _send(self, transfer: Transfer, half: HalfBatch) -> None:
        began = time.perf_counter()
        tensors = tuple(np.ascontiguousarray(half.values[name]) for name in transfer.values)
        header = half.header
        place = (header.epoch, header.step, header.half_batch, transfer.number)
        record = Record(RecordKind.DATA, *place, tensors)
        sender = self._links.senders[transfer.target]
        while not self._stopping.is_set():
            try:
                sender.send(record, SLICE_SECONDS)
            except LinkFullError:
                continue
            self.counters.records_sent += 1
            nbytes = sum(tensor.nbytes for tensor in tensors)
            self.counters.bytes_sent += nbytes
            if self._trace.on:
                where = (transfer.number, header.step, header.half_batch)
                self._trace.add(EventKind.SEND, *where, began, nbytes)
            return
        raise _Stopped


class _Stopped(Exception):  # noqa: N818  # no error: the loop was told to stop
    """Leaves the loop from any depth."""


def regions_of(part: Part, number: int) -> str:
    """The regions of one of a part's stages, for messages."""
    regions = next(t.stage.regions for t in part.schedule.turns if t.stage.number == number)
    return regions[0] if len(regions) == 1 else f"{regions[0]} to {regions[-1]}"
