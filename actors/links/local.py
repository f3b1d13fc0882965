"""The link within one process, for tests and for trying out a plan without Ray.

Tensors are copied on the way, so that code which reuses a buffer too early, or writes into its
input, behaves as it would across processes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from queue import Empty, SimpleQueue

from raygraft.actors.records import Record, describe
from raygraft.graph.errors import LinkError, LinkFullError

_LOOK_AGAIN_SECONDS = 0.001
"""While a link is full. Plans have room for what is in flight, so it hardly ever is."""


def local_link(slots: int, name: str = "local") -> tuple[LocalSender, LocalReceiver]:
    """Both ends of a link that holds at most `slots` records."""
    records: SimpleQueue[Record] = SimpleQueue()
    return LocalSender(records, slots, name), LocalReceiver(records, name)


class LocalSender:
    """See `raygraft.actors.links.base.Sender`."""

    def __init__(self, records: SimpleQueue[Record], slots: int, name: str) -> None:
        self._records: SimpleQueue[Record] | None = records
        self._slots = slots
        self._name = name

    def send(self, record: Record, timeout: float) -> None:
        records = self._records
        if records is None:
            raise LinkError(f"link {self._name} is closed: cannot send {describe(record)}")
        copied = replace(record, tensors=tuple(tensor.copy() for tensor in record.tensors))
        end = time.monotonic() + timeout
        while records.qsize() >= self._slots:
            if time.monotonic() >= end:
                raise LinkFullError(
                    f"link {self._name}: no room for {describe(record)} within {timeout:g} s, "
                    f"all {self._slots} slots are full"
                )
            time.sleep(_LOOK_AGAIN_SECONDS)
        records.put(copied)

    def close(self) -> None:
        self._records = None


class LocalReceiver:
    """See `raygraft.actors.links.base.Receiver`."""

    def __init__(self, records: SimpleQueue[Record], name: str) -> None:
        self._records: SimpleQueue[Record] | None = records
        self._name = name

    def receive(self, timeout: float) -> Record | None:
        if self._records is None:
            raise LinkError(f"link {self._name} is closed: cannot receive")
        try:
            return self._records.get(timeout=timeout)
        except Empty:
            return None

    def close(self) -> None:
        self._records = None
