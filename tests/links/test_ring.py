"""The ring: order, blocking, errors, two processes, a killed peer, two actors."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from raygraft.actors.links import (
    RingReceiver,
    RingSender,
    allocate_ring,
    format_ring,
    ring_bytes,
)
from raygraft.actors.records import Record, RecordKind
from raygraft.graph.errors import LinkError, LinkFullError

SLOTS, SLOT_BYTES = 3, 4096
PROCESSES = multiprocessing.get_context("spawn")


def numbered(number: int) -> Record:
    """A record whose every value and whose size follow from its number."""
    tensors = (np.full((number % 7, 64), number, np.float32), np.arange(number, number + 3))
    return Record(RecordKind.DATA, 1, number, number % 2, 0, tensors)


def check(record: Record | None, number: int) -> None:
    assert record is not None
    assert (record.step, record.half_batch) == (number, number % 2)
    for found, wanted in zip(record.tensors, numbered(number).tensors, strict=True):
        np.testing.assert_array_equal(found, wanted)


def both_ends(offset: int = 0) -> tuple[RingSender, RingReceiver]:
    buffer = np.zeros(ring_bytes(SLOTS, SLOT_BYTES) + offset, np.uint8)[offset:]
    format_ring(buffer, SLOTS, SLOT_BYTES)
    buffer.flags.writeable = False  # as an array from the object store is
    ends = (buffer, SLOTS, SLOT_BYTES, "a to b")
    return RingSender(*ends), RingReceiver(*ends)


@pytest.mark.parametrize("offset", [0, 1, 8, 64, 127])
def test_wraps_around_at_any_alignment(offset: int) -> None:
    sender, receiver = both_ends(offset)
    for number in range(20):
        sender.send(numbered(2 * number), 1)
        sender.send(numbered(2 * number + 1), 1)
        check(receiver.receive(1), 2 * number)
        check(receiver.receive(1), 2 * number + 1)
    assert receiver.receive(0) is None


def test_a_full_ring_blocks_and_says_so() -> None:
    sender, receiver = both_ends()
    for number in range(SLOTS):
        sender.send(numbered(number), 1)
    begin = time.perf_counter()
    with pytest.raises(LinkFullError, match=r"a to b: no room .* within 0\.1 s, all 3 slots"):
        sender.send(numbered(SLOTS), 0.1)
    assert 0.09 < time.perf_counter() - begin < 2
    for number in range(SLOTS + 1):
        check(receiver.receive(1), number)
        if number == 0:
            sender.send(numbered(SLOTS), 1)
    assert receiver.receive(0.01) is None


def test_an_end_that_comes_later_finds_what_was_sent() -> None:
    sender, receiver = both_ends()
    sender.send(numbered(0), 1)
    check(receiver.receive(1), 0)
    sender.send(numbered(1), 1)
    again = RingReceiver(receiver._buffer, SLOTS, SLOT_BYTES, "again")
    check(again.receive(1), 1)


def test_a_record_larger_than_a_slot() -> None:
    sender, receiver = both_ends()
    large = Record(RecordKind.DATA, 0, 0, 0, 0, (np.zeros(SLOT_BYTES, np.float32),))
    with pytest.raises(LinkError, match=rf"a to b: .*{large.nbytes()} bytes.* has {SLOT_BYTES}"):
        sender.send(large, 1)
    assert receiver.receive(0) is None
    sender.send(numbered(1), 1)
    check(receiver.receive(1), 1)


def test_ends_must_agree_with_the_buffer() -> None:
    buffer = np.zeros(ring_bytes(SLOTS, SLOT_BYTES), np.uint8)
    with pytest.raises(LinkError, match="a to b: expected a ring of 3 slots"):
        RingSender(buffer, SLOTS, SLOT_BYTES, "a to b")
    format_ring(buffer, SLOTS, SLOT_BYTES)
    with pytest.raises(LinkError, match="expected a ring of 4 slots"):
        RingSender(buffer, 4, SLOT_BYTES, "a to b")
    with pytest.raises(LinkError, match=r"needs \d+ bytes, the buffer has"):
        format_ring(buffer, 100, SLOT_BYTES)


def test_a_closed_end() -> None:
    sender, receiver = both_ends()
    for end in (sender, receiver, sender):
        end.close()
    with pytest.raises(LinkError, match="a to b is closed"):
        sender.send(numbered(0), 1)
    with pytest.raises(LinkError, match="a to b is closed"):
        receiver.receive(1)


def shared_rings(folder: Path) -> list[Path]:
    """Two rings in files that processes can map, there and back."""
    paths = [folder / "there", folder / "back"]
    for path in paths:
        memory = np.memmap(path, np.uint8, "w+", shape=ring_bytes(SLOTS, SLOT_BYTES))
        format_ring(memory, SLOTS, SLOT_BYTES)
    return paths


def attach(paths: list[Path]) -> tuple[RingSender, RingReceiver]:
    leaving, arriving = (np.memmap(path, np.uint8, "r+") for path in paths)
    return (
        RingSender(leaving, SLOTS, SLOT_BYTES, "leaving"),
        RingReceiver(arriving, SLOTS, SLOT_BYTES, "arriving"),
    )


def exchange(paths: list[Path], count: int) -> None:
    """Send and check `count` records, both ways at once: send while there is room, then receive."""
    sender, receiver = attach(paths)
    sent = received = 0
    deadline = time.monotonic() + 60
    while received < count:
        assert time.monotonic() < deadline
        try:
            while sent < count:
                sender.send(numbered(sent), 0)
                sent += 1
        except LinkFullError:
            pass
        record = receiver.receive(0.05)
        while record is not None:
            check(record, received)
            received += 1
            record = receiver.receive(0)
    while sent < count:
        sender.send(numbered(sent), 10)
        sent += 1


def test_two_processes_exchange_records_both_ways(tmp_path: Path) -> None:
    paths = shared_rings(tmp_path)
    peer = PROCESSES.Process(target=exchange, args=(paths[::-1], 10_000))
    peer.start()
    try:
        exchange(paths, 10_000)
        peer.join(30)
        assert peer.exitcode == 0
    finally:
        peer.kill()


def echo(paths: list[Path]) -> None:
    sender, receiver = attach(paths)
    while True:
        record = receiver.receive(0.2)
        if record is not None:
            sender.send(record, 1)


def test_a_killed_peer_means_timeouts(tmp_path: Path) -> None:
    paths = shared_rings(tmp_path)
    sender, receiver = attach(paths)
    peer = PROCESSES.Process(target=echo, args=(paths[::-1],))
    peer.start()
    sender.send(numbered(5), 1)
    check(receiver.receive(30), 5)
    assert peer.pid is not None
    os.kill(peer.pid, signal.SIGKILL)
    peer.join(10)
    begin = time.perf_counter()
    assert receiver.receive(0.1) is None
    with pytest.raises(LinkFullError):
        for number in range(SLOTS + 1):
            sender.send(numbered(number), 0.1)
    assert time.perf_counter() - begin < 5


@pytest.mark.ray
def test_ring_between_two_actors(ray_cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Node:
        def join(self, references: list) -> None:
            leaving, arriving = ray.get(references)
            self.sender = RingSender(leaving, SLOTS, SLOT_BYTES, "leaving")
            self.receiver = RingReceiver(arriving, SLOTS, SLOT_BYTES, "arriving")

        def exchange(self, count: int) -> int:
            total = 0
            for number in range(count):
                self.sender.send(Record(RecordKind.DATA, 0, number, 0, 0, ()), 10)
                record = self.receiver.receive(10)
                total += record.step
            return total

    rings = [allocate_ring(SLOTS, SLOT_BYTES) for _ in range(2)]
    there, back = (reference for reference, _ in rings)
    nodes = [Node.remote(), Node.remote()]
    ray.get([nodes[0].join.remote([there, back]), nodes[1].join.remote([back, there])])
    sent_words = [np.frombuffer(array, np.uint8) for _, array in rings]
    del rings, there, back  # from here on the actors' arrays alone hold the memory
    assert all(not array.flags.writeable for array in sent_words)
    del sent_words
    assert ray.get([node.exchange.remote(1000) for node in nodes], timeout=60) == [499_500] * 2
