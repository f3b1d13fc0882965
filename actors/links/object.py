"""The link that goes wherever Ray goes: records are arguments or results of actor methods.

To an actor they are pushed: the sender calls a method of the receiving actor, which puts the
record into that actor's `Inbox`. Ray may run such calls in another order than they were made in, so
each has a sequence number, and the inbox hands records out in order. The method belongs into a
concurrency group of its own, so that it runs beside the actor's resident loop:

    @ray.method(concurrency_group="links")
    def deliver(self, link: str, sequence: int, record: Record) -> None:
        self.inbox.put(link, sequence, record)

To the driver, which is no actor, they are pulled: the actor sends into an `Outbox`, and the
driver's `PulledReceiver` always has one call of its `take` under way. Ray passes small records
within the call and larger ones through the object store.

The classes know Ray only as callables that they are given: `actor.method.remote` is one, and
`await_reply` makes the other.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from raygraft.actors.records import Record, describe
from raygraft.graph.errors import LinkError, LinkFullError

Call = Callable[..., Any]
Await = Callable[[Any, float], tuple[bool, Any]]


class Inbox:
    """An actor's arrivals by link name. `put` and `take` may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._arrived: dict[str, dict[int, Record]] = defaultdict(dict)
        self._next: dict[str, int] = defaultdict(int)
        self._closed: set[str] = set()

    def put(self, link: str, sequence: int, record: Record) -> None:
        """Accept the record number `sequence` (from 0) of a link; a repetition is dropped."""
        with self._changed:
            if link not in self._closed and sequence >= self._next[link]:
                self._arrived[link][sequence] = record
                self._changed.notify_all()

    def take(self, link: str, timeout: float) -> Record | None:
        """The link's next record in order; None if it is not there within `timeout` seconds."""
        with self._changed:
            arrived = self._arrived[link]
            wanted = self._next[link]
            if not self._changed.wait_for(lambda: wanted in arrived, timeout):
                return None
            self._next[link] = wanted + 1
            return arrived.pop(wanted)

    def close(self, link: str) -> None:
        """Drop a link's records, and those that are still to come. Its name is not used again."""
        with self._changed:
            self._closed.add(link)
            self._arrived.pop(link, None)
            self._next.pop(link, None)


class ObjectSender:
    """The sending end of a pushed link; see `raygraft.actors.links.base.Sender`.

    `deliver(link, sequence, record)` starts a delivery and returns something that
    `wait(reply, timeout)` waits for, as (done, value). At most `window` deliveries are under way.
    """

    def __init__(self, name: str, deliver: Call, wait: Await, window: int = 16) -> None:
        self.name = name
        self._deliver = deliver
        self._wait = wait
        self._window = window
        self._sequence = 0
        self._under_way: deque[Any] = deque()
        self._is_open = True

    def send(self, record: Record, timeout: float) -> None:
        if not self._is_open:
            raise LinkError(f"link {self.name} is closed: cannot send {describe(record)}")
        if len(self._under_way) >= self._window:
            done, _ = self._wait(self._under_way[0], timeout)
            if not done:
                raise LinkFullError(
                    f"link {self.name}: no room for {describe(record)} within {timeout:g} s, "
                    f"{len(self._under_way)} records are not delivered yet"
                )
            self._under_way.popleft()
        self._under_way.append(self._deliver(self.name, self._sequence, record))
        self._sequence += 1

    def close(self) -> None:
        self._is_open = False
        self._under_way.clear()


class ObjectReceiver:
    """The receiving end of a pushed link; see `raygraft.actors.links.base.Receiver`."""

    def __init__(self, name: str, inbox: Inbox) -> None:
        self.name = name
        self._inbox: Inbox | None = inbox

    def receive(self, timeout: float) -> Record | None:
        if self._inbox is None:
            raise LinkError(f"link {self.name} is closed")
        record = self._inbox.take(self.name, timeout)
        return None if record is None else _owned(record)

    def close(self) -> None:
        if self._inbox is not None:
            self._inbox.close(self.name)
        self._inbox = None


class Outbox:
    """The sending end of a pulled link; see `raygraft.actors.links.base.Sender`.

    It stays in the actor that sends; the actor's method for the driver calls `take`.
    """

    def __init__(self, name: str, slots: int = 16) -> None:
        self.name = name
        self._slots = slots
        self._changed = threading.Condition()
        self._waiting: deque[Record] = deque()
        self._is_open = True

    def send(self, record: Record, timeout: float) -> None:
        copied = _owned(record)
        with self._changed:
            self._changed.wait_for(self._has_room, timeout)
            if not self._is_open:
                raise LinkError(f"link {self.name} is closed: cannot send {describe(record)}")
            if not self._has_room():
                raise LinkFullError(
                    f"link {self.name}: no room for {describe(record)} within {timeout:g} s, "
                    f"all {self._slots} slots are full"
                )
            self._waiting.append(copied)
            self._changed.notify_all()

    def take(self, timeout: float) -> tuple[Record, ...]:
        """All records that wait, in order; none if none came within `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._is_open, timeout)
            taken = tuple(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        """Refuse further records; those that wait can still be taken."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return not self._is_open or len(self._waiting) < self._slots


class PulledReceiver:
    """The receiving end of a pulled link; see `raygraft.actors.links.base.Receiver`.

    `take(seconds)` starts the actor's `Outbox.take`, and `wait(reply, timeout)` waits for its
    result. One such call is always under way, for at most `patience` seconds each.
    """

    def __init__(self, name: str, take: Call, wait: Await, patience: float = 10.0) -> None:
        self.name = name
        self._take = take
        self._wait = wait
        self._patience = patience
        self._arrived: deque[Record] = deque()
        self._under_way: Any = take(patience)
        self._is_open = True

    def receive(self, timeout: float) -> Record | None:
        if not self._is_open:
            raise LinkError(f"link {self.name} is closed")
        if not self._arrived:
            done, records = self._wait(self._under_way, timeout)
            if not done:
                return None
            self._under_way = self._take(self._patience)
            self._arrived.extend(records)
        return _owned(self._arrived.popleft()) if self._arrived else None

    def close(self) -> None:
        self._is_open = False
        self._under_way = None
        self._arrived.clear()


def await_reply(link: str) -> Await:
    """Waits for a Ray reference: (True, value), or (False, None) when it is not ready in time.

    Raises LinkError when the actor is gone, or its method failed.
    """
    import ray  # noqa: PLC0415  # the classes here need no Ray
    from ray.exceptions import RayActorError, RayError  # noqa: PLC0415

    def wait(reference: Any, timeout: float) -> tuple[bool, Any]:
        ready, _ = ray.wait([reference], timeout=timeout)
        if not ready:
            return False, None
        try:
            return True, ray.get(reference)
        except RayActorError as error:
            raise LinkError(f"link {link}: the actor at its other end is gone") from error
        except RayError as error:
            raise LinkError(f"link {link}: the other end failed: {error}") from error

    return wait


def _owned(record: Record) -> Record:
    """The record with tensors of its own: Ray's are read-only and pin the store's memory."""
    return replace(record, tensors=tuple(tensor.copy() for tensor in record.tensors))
