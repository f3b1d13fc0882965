"""The link within one process, for tests and for trying out a plan without Ray.

Tensors are copied on the way, so that code which reuses a buffer too early, or writes into its
input, behaves as it would across processes.
"""

from __future__ import annotations

import queue
from dataclasses import replace

from raygraft.actors.records import Record, describe
from raygraft.graph.errors import LinkError, LinkFullError


def local_link(slots: int, name: str = "local") -> tuple[LocalSender, LocalReceiver]:
    """Both ends of a link that holds at most `slots` records."""
    records: queue.Queue[Record] = queue.Queue(slots)
    return LocalSender(records, name), LocalReceiver(records, name)


class LocalSender:
    """See `raygraft.actors.links.base.Sender`."""

    def __init__(self, records: queue.Queue[Record], name: str) -> None:
        self._records: queue.Queue[Record] | None = records
        self._name = name

    def send(self, record: Record, timeout: float) -> None:
        if self._records is None:
            raise LinkError(f"link {self._name} is closed: cannot send {describe(record)}")
        copied = replace(record, tensors=tuple(tensor.copy() for tensor in record.tensors))
        try:
            self._records.put(copied, timeout=timeout)
        except queue.Full:
            raise LinkFullError(
                f"link {self._name}: no room for {describe(record)} within {timeout:g} s, "
                f"all {self._records.maxsize} slots are full"
            ) from None

    def close(self) -> None:
        self._records = None


class LocalReceiver:
    """See `raygraft.actors.links.base.Receiver`."""

    def __init__(self, records: queue.Queue[Record], name: str) -> None:
        self._records: queue.Queue[Record] | None = records
        self._name = name

    def receive(self, timeout: float) -> Record | None:
        if self._records is None:
            raise LinkError(f"link {self._name} is closed: cannot receive")
        try:
            return self._records.get(timeout=timeout)
        except queue.Empty:
            return None

    def close(self) -> None:
        self._records = None
