"""An actor's records: what comes in for its half-batches, and what goes out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raygraft.actors.links import Receiver
from raygraft.actors.part import ActorPart, Links
from raygraft.actors.records import Record, RecordKind, describe
from raygraft.actors.sharing import named
from raygraft.actors.trace import EventKind
from raygraft.actors.worker import DeviceWorker
from raygraft.graph.errors import LinkError, LinkFullError
from raygraft.graph.step import Step
from raygraft.kernels.base import Array
from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Transfer

SLICE_SECONDS = 0.1
"""How long one wait lasts before the loop looks whether it should stop."""


class Stopped(Exception):  # noqa: N818  # no error: the loop was told to stop
    """Leaves the loop from any depth."""


@dataclass(slots=True)
class HalfBatch:
    """A step in progress in this actor."""

    header: Record
    step: Step | None
    """None when it has no rows: its turns do nothing."""
    values: dict[str, Array]
    ahead: bool
    """Whether it was sent before all its tokens were known."""
    drawn: Array | None = None
    """The tokens that it drew, where it did so here."""


class Exchange:
    """Receives and sends for an actor's loop; its waits end when the loop is told to stop."""

    def __init__(self, part: ActorPart, links: Links, stopping: threading.Event) -> None:
        self.values: dict[int, dict[str, Array]] = {}
        """By step: values of half-batches in progress, and of some that have yet to begin here."""
        self._title = named(tuple(part.parts))
        self._epoch = part.epoch
        self._links = links
        self._stopping = stopping
        self._transfers = {t.number: t for turn in part.schedule.turns for t in turn.receive}
        self._held: list[tuple[Record, Transfer, DeviceWorker]] | None = None

    def header(self, device: DeviceWorker) -> Record:
        """The next one of this epoch, or what else the engine has to say."""
        header = self._receive(self._links.control, device)
        while header.epoch < self._epoch:  # it was on its way when a plan ended
            header = self._receive(self._links.control, device)
        return header

    def glance(self, seconds: float) -> Record | None:
        """The next header if it comes so soon."""
        return self._links.control.receive(seconds)

    def check(self, header: Record) -> None:
        """Raises LinkError when it is none of this epoch."""
        if header.kind is not RecordKind.STEP or header.epoch != self._epoch:
            raise LinkError(f"{self._title} expected a header, found a {describe(header)}")

    def fetch(self, transfers: Sequence[Transfer], half: HalfBatch, device: DeviceWorker) -> None:
        """Wait until a turn has what it receives. Raises LinkError."""
        for transfer in transfers:
            while transfer.values[0] not in half.values:
                record = self._receive(self._links.receivers[transfer.source], device)
                self._take_in(record, transfer, half)

    def send(self, transfer: Transfer, half: HalfBatch, device: DeviceWorker) -> None:
        """Send a transfer's values; those for the engine go out later while they are held."""
        tensors = tuple(np.ascontiguousarray(half.values[name]) for name in transfer.values)
        header = half.header
        place = (header.epoch, header.step, header.half_batch, transfer.number)
        if self._held is not None and transfer.target == ENGINE:
            tensors = tuple(tensor.copy() for tensor in tensors)  # others will be in their place
            self._held.append((Record(RecordKind.DATA, *place, tensors), transfer, device))
        else:
            self._put(Record(RecordKind.DATA, *place, tensors), transfer, device)

    def hold(self) -> None:
        """Keep what is for the engine from now on."""
        self._held = []

    def release(self) -> None:
        """Send what was kept, one half-batch after the other."""
        held, self._held = self._held or [], None
        for record, transfer, device in sorted(held, key=lambda kept: kept[0].step):
            self._put(record, transfer, device)

    def _receive(self, receiver: Receiver, device: DeviceWorker) -> Record:
        """The next record, for a device's turn."""
        began = time.perf_counter()
        while not self._stopping.is_set():
            record = receiver.receive(SLICE_SECONDS)
            if record is not None:
                device.counters.wait_seconds += time.perf_counter() - began
                if device.trace.on:
                    device.trace.received(record, began)
                return record
        raise Stopped

    def _take_in(self, record: Record, expected: Transfer, half: HalfBatch) -> None:
        """Put a record's tensors among the values of its step.

        The sender may have more stages than this device, or fewer, so records of other half-batches
        may come before the expected one. Those of one half-batch always keep their order.
        """
        if record.epoch < self._epoch:
            return  # it was on its way when a plan ended
        step, transfer = half.header.step, self._transfers.get(record.transfer)
        early = record.step >= min(self.values) and record.step != step
        if (
            record.epoch != self._epoch
            or transfer is None
            or transfer.source != expected.source
            or not (early or (record.step, transfer) == (step, expected))
        ):
            raise LinkError(
                f"{self._title} expected transfer {expected.number} of step {step} "
                f"from {expected.source}, found a {describe(record)}"
            )
        values = self.values.setdefault(record.step, {})
        values.update(zip(transfer.values, record.tensors, strict=True))

    def _put(self, record: Record, transfer: Transfer, device: DeviceWorker) -> None:
        """Send a record, when there is room."""
        began = time.perf_counter()
        sender = self._links.senders[transfer.target]
        while not self._stopping.is_set():
            try:
                sender.send(record, SLICE_SECONDS)
            except LinkFullError:
                continue
            device.counters.records_sent += 1
            nbytes = sum(tensor.nbytes for tensor in record.tensors)
            device.counters.bytes_sent += nbytes
            if device.trace.on:
                where = (transfer.number, record.step, record.half_batch)
                device.trace.add(EventKind.SEND, *where, began, nbytes)
            return
        raise Stopped
