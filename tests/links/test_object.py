"""The link between nodes, without Ray, then with two actors and the driver."""

import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from raygraft.actors.links import (
    Inbox,
    ObjectReceiver,
    ObjectSender,
    Outbox,
    PulledReceiver,
)
from raygraft.actors.links.object import await_reply
from raygraft.actors.records import Record, RecordKind
from raygraft.graph.errors import LinkError, LinkFullError


def numbered(number: int) -> Record:
    return Record(RecordKind.DATA, 0, number, 0, 0, (np.full(4, number, np.int32),))


def steps(receiver: ObjectReceiver | PulledReceiver, count: int) -> list[int]:
    records = [receiver.receive(5) for _ in range(count)]
    return [record.step for record in records if record is not None]


def test_order_is_restored() -> None:
    inbox = Inbox()
    arrivals = [(link, number) for link in ("a", "b") for number in range(100)]
    random.Random(7).shuffle(arrivals)
    receivers = {link: ObjectReceiver(link, inbox) for link in ("a", "b")}
    for link, number in arrivals:
        inbox.put(link, number, numbered(number))
    for receiver in receivers.values():
        assert steps(receiver, 100) == list(range(100))
        assert receiver.receive(0) is None


def test_a_gap_waits_for_what_is_missing() -> None:
    inbox = Inbox()
    receiver = ObjectReceiver("a", inbox)
    inbox.put("a", 1, numbered(1))
    assert receiver.receive(0.05) is None
    threading.Timer(0.1, inbox.put, ("a", 0, numbered(0))).start()
    assert steps(receiver, 2) == [0, 1]


def test_repetitions_and_late_arrivals_are_dropped() -> None:
    inbox = Inbox()
    receiver = ObjectReceiver("a", inbox)
    for sequence in (0, 0, 1, 0):
        inbox.put("a", sequence, numbered(sequence))
    assert steps(receiver, 2) == [0, 1]
    inbox.put("a", 1, numbered(1))
    assert receiver.receive(0) is None
    receiver.close()
    inbox.put("a", 2, numbered(2))
    assert inbox.take("a", 0) is None
    with pytest.raises(LinkError, match="a is closed"):
        receiver.receive(0)


def test_received_tensors_are_the_callers_own() -> None:
    inbox = Inbox()
    record = numbered(3)
    record.tensors[0].flags.writeable = False  # as it comes from Ray
    inbox.put("a", 0, record)
    received = ObjectReceiver("a", inbox).receive(0)
    assert received is not None
    received.tensors[0][:] = 9
    assert record.tensors[0][0] == 3


def test_the_sender_waits_for_the_oldest_of_its_window() -> None:
    inbox = Inbox()
    done: set[int] = set()

    def deliver(link: str, sequence: int, record: Record) -> int:
        inbox.put(link, sequence, record)
        return sequence

    sender = ObjectSender("a", deliver, lambda reply, timeout: (reply in done, None), window=2)
    sender.send(numbered(0), 0)
    sender.send(numbered(1), 0)
    with pytest.raises(LinkFullError, match=r"a: no room .*2 records are not delivered"):
        sender.send(numbered(2), 0)
    done.add(0)
    sender.send(numbered(2), 0)
    assert steps(ObjectReceiver("a", inbox), 3) == [0, 1, 2]
    sender.close()
    with pytest.raises(LinkError, match="closed"):
        sender.send(numbered(3), 0)


class Started:
    """A call on a thread, as a stand-in for a call of an actor."""

    def __init__(self, take: Any, seconds: float) -> None:
        self.result: tuple[Record, ...] = ()
        self.thread = threading.Thread(target=self.run, args=(take, seconds), daemon=True)
        self.thread.start()

    def run(self, take: Any, seconds: float) -> None:
        self.result = take(seconds)

    @staticmethod
    def wait(call: "Started", timeout: float) -> tuple[bool, tuple[Record, ...]]:
        call.thread.join(timeout)
        return not call.thread.is_alive(), call.result


def test_the_driver_pulls_from_an_outbox() -> None:
    outbox = Outbox("to driver", slots=4)
    receiver = PulledReceiver(
        "to driver", lambda seconds: Started(outbox.take, seconds), Started.wait, patience=0.2
    )
    assert receiver.receive(0.05) is None
    sending = threading.Thread(
        target=lambda: [outbox.send(numbered(number), 5) for number in range(50)]
    )
    sending.start()
    found: list[int] = []
    while len(found) < 50:
        record = receiver.receive(0.1)
        found += [] if record is None else [record.step]
    assert found == list(range(50))
    sending.join()
    receiver.close()
    with pytest.raises(LinkError, match="closed"):
        receiver.receive(0)


def test_an_outbox_fills_up_and_closes() -> None:
    outbox = Outbox("to driver", slots=1)
    outbox.send(numbered(0), 0)
    with pytest.raises(LinkFullError, match="to driver: no room"):
        outbox.send(numbered(1), 0.01)
    outbox.close()
    with pytest.raises(LinkError, match="closed"):
        outbox.send(numbered(1), 0)
    assert [record.step for record in outbox.take(0)] == [0]
    assert outbox.take(0) == ()


@pytest.mark.ray
def test_between_two_actors_and_to_the_driver(ray_cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0, concurrency_groups={"loop": 1, "links": 1, "pull": 1})
    class Node:
        def __init__(self) -> None:
            self.inbox = Inbox()
            self.outbox = Outbox("to driver")

        @ray.method(concurrency_group="links")
        def deliver(self, link: str, sequence: int, record: Record) -> None:
            self.inbox.put(link, sequence, record)

        @ray.method(concurrency_group="pull")
        def take(self, seconds: float) -> tuple[Record, ...]:
            return self.outbox.take(seconds)

        @ray.method(concurrency_group="loop")
        def send_on(self, successor: Any, count: int) -> None:
            sender = ObjectSender("a", successor.deliver.remote, await_reply("a"), window=4)
            for number in range(count):
                size = 50_000 if number % 10 == 0 else 3  # some too large to travel in the call
                tensor = np.full(size, number, np.float32)
                sender.send(Record(RecordKind.DATA, 0, number, 0, 0, (tensor,)), 10)
                tensor[:] = -1  # it may be overwritten at once

        @ray.method(concurrency_group="loop")
        def bring_to_driver(self, count: int) -> None:
            receiver = ObjectReceiver("a", self.inbox)
            for _ in range(count):
                self.outbox.send(receiver.receive(10), 10)

    first, last = Node.remote(), Node.remote()
    count = 100
    loops = [last.bring_to_driver.remote(count), first.send_on.remote(last, count)]
    receiver = PulledReceiver("to driver", last.take.remote, await_reply("to driver"))
    for number in range(count):
        record = receiver.receive(30)
        assert record is not None
        assert record.step == number
        assert (record.tensors[0] == number).all()
    ray.get(loops, timeout=30)
    ray.kill(last)
    with pytest.raises(LinkError, match="to driver: the actor at its other end is gone"):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            receiver.receive(0.2)
