"""The tcp link: order, room, errors, killed peers, and who is kept out."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import psutil
import pytest

from raygraft.actors.links import Receiver, Sender, TcpReceiver, TcpSender, new_secret
from raygraft.actors.records import Record, RecordKind
from raygraft.graph.errors import LinkError, LinkFullError

BYTES, SLOTS = 4096, 3
PROCESSES = multiprocessing.get_context("spawn")


def own_address() -> str:
    """An address of this machine that is not the loopback's, if it has one."""
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    return found[0] if found else "127.0.0.1"


ADDRESS = own_address()


def numbered(number: int) -> Record:
    """A record whose every value and whose size follow from its number."""
    tensors = (np.full((number % 7, 64), number, np.float32), np.arange(number, number + 3))
    return Record(RecordKind.DATA, 1, number, number % 2, 0, tensors)


def large(number: int, nbytes: int) -> Record:
    return Record(RecordKind.DATA, 1, number, 0, 0, (np.full(nbytes // 4, number, np.int32),))


def check(record: Record | None, number: int) -> None:
    assert record is not None
    assert (record.step, record.half_batch) == (number, number % 2)
    for found, wanted in zip(record.tensors, numbered(number).tensors, strict=True):
        np.testing.assert_array_equal(found, wanted)


@contextmanager
def both_ends(record_bytes: int = BYTES) -> Iterator[tuple[TcpSender, TcpReceiver]]:
    secret = new_secret()
    receiver = TcpReceiver("a to b", ADDRESS, secret, record_bytes)
    try:
        sender = TcpSender("a to b", receiver.address, secret, record_bytes, SLOTS)
        yield sender, receiver
        sender.close()
    finally:
        receiver.close()


def test_records_arrive_whole_and_in_order() -> None:
    with both_ends() as (sender, receiver):
        for number in range(0, 300, 3):
            for later in range(3):
                sender.send(numbered(number + later), 1)
            for later in range(3):
                check(receiver.receive(1), number + later)
        assert receiver.receive(0) is None
        assert receiver.receive(0.05) is None


def test_what_is_sent_is_the_callers_again() -> None:
    with both_ends() as (sender, receiver):
        tensor = np.zeros(100, np.float32)
        sender.send(Record(RecordKind.DATA, 1, 0, 0, 0, (tensor,)), 1)
        tensor[:] = 9
        record = receiver.receive(1)
        assert record is not None
        assert not record.tensors[0].any()
        record.tensors[0][:] = 5  # the receiver's own


def test_a_link_that_nobody_reads_fills_up_and_loses_nothing() -> None:
    megabyte = 1 << 20
    with both_ends(2 * megabyte) as (sender, receiver):
        sent = 0
        with pytest.raises(LinkFullError, match=r"a to b: no room .* 0\.1 s, 3 records wait"):
            while sent < 1000:
                sender.send(large(sent, megabyte), 0.1)
                sent += 1
        assert SLOTS <= sent < 1000
        for number in range(sent):
            record = receiver.receive(5)
            assert record is not None
            assert record.step == number
            assert (record.tensors[0] == number).all()
        assert receiver.receive(0.05) is None
        sender.send(large(sent, megabyte), 5)
        assert receiver.receive(5) is not None


def test_both_send_much_before_either_receives() -> None:
    size = 8 << 20  # more than the kernel holds
    with both_ends(size + 4096) as there, both_ends(size + 4096) as back:
        for number in range(SLOTS):
            there[0].send(large(number, size), 10)
            back[0].send(large(number, size), 10)
        for number in range(SLOTS):
            for _, receiver in (there, back):
                record = receiver.receive(10)
                assert record is not None
                assert record.step == number


def test_what_was_sent_arrives_after_the_sender_has_closed() -> None:
    with both_ends() as (sender, receiver):
        for number in range(5):
            sender.send(numbered(number), 1)
        sender.close()
        sender.close()
        with pytest.raises(LinkError, match="a to b is closed"):
            sender.send(numbered(5), 1)
        for number in range(5):
            check(receiver.receive(1), number)
        with pytest.raises(LinkError, match=r"a to b: the connection to .* was lost"):
            receiver.receive(1)
        receiver.close()
        receiver.close()
        with pytest.raises(LinkError, match="a to b is closed"):
            receiver.receive(0)


def test_a_record_larger_than_agreed() -> None:
    with both_ends() as (sender, receiver):
        with pytest.raises(LinkError, match=r"a to b: .* needs \d+ bytes"):
            sender.send(large(0, 2 * BYTES), 1)
        sender.send(numbered(1), 1)
        check(receiver.receive(1), 1)


def test_a_receiver_waits_for_its_sender() -> None:
    receiver = TcpReceiver("a to b", ADDRESS, new_secret(), BYTES)
    began = time.monotonic()
    assert receiver.receive(0.1) is None
    assert time.monotonic() - began > 0.09
    receiver.close()


# Who is kept out


def test_only_who_holds_the_secret_gets_in() -> None:
    secret = new_secret()
    receiver = TcpReceiver("a to b", ADDRESS, secret, BYTES)
    for wrong in (new_secret(), bytes(32)):
        with pytest.raises(LinkError, match=r"a to b: .* refused"):
            TcpSender("a to b", receiver.address, wrong, BYTES, SLOTS)
    with pytest.raises(LinkError, match="refused"):  # the secret of one link opens no other
        TcpSender("c to b", receiver.address, secret, BYTES, SLOTS)
    with socket.create_connection(receiver.address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: somebody else's port scanner\r\n\r\n" * 2)
    silent = socket.create_connection(receiver.address)  # says nothing, and stays
    sender = TcpSender("a to b", receiver.address, secret, BYTES, SLOTS)
    sender.send(numbered(1), 1)
    check(receiver.receive(5), 1)
    # One sender, then the port is closed, with whoever stood before it.
    with pytest.raises(LinkError, match=r"cannot reach|refused"):
        TcpSender("a to b", receiver.address, secret, BYTES, SLOTS)
    for end in (sender, receiver, silent):
        end.close()


def test_a_receiver_must_hold_the_secret_too() -> None:
    def pose() -> None:
        with listener.accept()[0] as connection:
            connection.sendall(bytes(32))
            connection.recv(1000)
            connection.sendall(bytes(32))

    with socket.create_server((ADDRESS, 0)) as listener:
        poser = threading.Thread(target=pose)
        poser.start()
        with pytest.raises(LinkError, match="does not hold the link's secret"):
            TcpSender("a to b", listener.getsockname(), new_secret(), BYTES, SLOTS)
        poser.join()


Change = Callable[[list[bytes]], list[bytes]]


class Between:
    """Somebody between both ends who sees everything, and changes the sealed records."""

    def __init__(self, target: tuple[str, int], change: Change) -> None:
        self.seen: list[bytes] = []
        self._change = change
        self._target = target
        self._listener = socket.create_server((ADDRESS, 0))
        self.address = self._listener.getsockname()
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        near, _ = self._listener.accept()
        # An end may close before it has read everything.
        with (
            self._listener,
            near,
            suppress(ConnectionError),
            socket.create_connection(self._target) as far,
        ):
            self._exchange(near, far)

    def _exchange(self, near: socket.socket, far: socket.socket) -> None:
        for source, target, count in ((far, near, 32), (near, far, 64), (far, near, 32)):
            part = source.recv(count, socket.MSG_WAITALL)
            self.seen.append(part)
            target.sendall(part)
        frames = []
        while header := near.recv(8, socket.MSG_WAITALL):
            size = int.from_bytes(header, "little") + 16
            frames.append(header + near.recv(size, socket.MSG_WAITALL))
        self.seen += frames
        for frame in self._change(frames):
            far.sendall(frame)


def flipped(frame: bytes, place: int) -> bytes:
    changed = bytearray(frame)
    changed[place] ^= 1
    return bytes(changed)


# Name -> what happens to three sealed records, and how many of them still arrive.
CHANGES: dict[str, tuple[Change, int]] = {
    "nothing": (lambda f: f, 3),
    "a bit of the contents": (lambda f: [f[0], flipped(f[1], 100), f[2]], 1),
    "a bit of the tag": (lambda f: [f[0], flipped(f[1], -1), f[2]], 1),
    "a bit of the length": (lambda f: [f[0], flipped(f[1], 0), f[2]], 1),
    "an enormous length": (lambda f: [f[0], flipped(f[1], 7), f[2]], 1),
    "one twice": (lambda f: [f[0], f[0], f[1], f[2]], 1),
    "one left out": (lambda f: [f[0], f[2]], 1),
    "another order": (lambda f: [f[1], f[0], f[2]], 0),
    "one cut short": (lambda f: [f[0], f[1], f[2][:-5]], 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_on_the_way_is_refused(change: str) -> None:
    changes, whole = CHANGES[change]
    secret = new_secret()
    receiver = TcpReceiver("a to b", ADDRESS, secret, BYTES)
    between = Between(receiver.address, changes)
    sender = TcpSender("a to b", between.address, secret, BYTES, SLOTS)
    for number in (1, 2, 3):
        sender.send(numbered(number), 1)
    sender.close()
    for number in range(1, whole + 1):
        check(receiver.receive(5), number)
    with pytest.raises(LinkError, match="a to b: "):
        while receiver.receive(5) is not None:
            raise AssertionError("a record got through")
    receiver.close()
    seen = b"".join(between.seen)
    assert len(seen) > 1000
    assert secret not in seen
    assert numbered(3).tensors[0].tobytes()[:32] not in seen


def test_a_recorded_connection_cannot_be_played_again() -> None:
    secret = new_secret()
    receiver = TcpReceiver("a to b", ADDRESS, secret, BYTES)
    between = Between(receiver.address, lambda frames: frames)
    sender = TcpSender("a to b", between.address, secret, BYTES, SLOTS)
    sender.send(numbered(1), 1)
    sender.close()
    check(receiver.receive(5), 1)
    receiver.close()
    _, answer, _, frame = between.seen
    again = TcpReceiver("a to b", ADDRESS, secret, BYTES)
    with socket.create_connection(again.address) as replayed:
        replayed.recv(32, socket.MSG_WAITALL)
        replayed.sendall(answer)
        assert replayed.recv(32) == b""
        with suppress(OSError):
            replayed.sendall(frame)
    assert again.receive(0.1) is None
    again.close()


# Two processes


def exchange(sender: Sender, receiver: Receiver, count: int) -> None:
    """Send and check `count` records, both ways at once: send while there is room, then receive."""
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
            record = receiver.receive(0) if received < count else None
    while sent < count:
        sender.send(numbered(sent), 10)
        sent += 1


def peer(
    address: tuple[str, int], secrets: tuple[bytes, bytes], addresses: object, task: str
) -> None:
    receiver = TcpReceiver("there", ADDRESS, secrets[0], BYTES)
    addresses.put(receiver.address)
    sender = TcpSender("back", address, secrets[1], BYTES, SLOTS)
    if task == "exchange":
        exchange(sender, receiver, 5000)
        sender.close()
        return
    while True:
        record = receiver.receive(0.2)
        if record is not None:
            sender.send(record, 1)


@contextmanager
def other_process(task: str) -> Iterator[tuple[TcpSender, TcpReceiver, Any]]:
    secrets = [new_secret(), new_secret()]
    receiver = TcpReceiver("back", ADDRESS, secrets[1], BYTES)
    addresses = PROCESSES.Queue()
    process = PROCESSES.Process(target=peer, args=(receiver.address, secrets, addresses, task))
    process.start()
    try:
        sender = TcpSender("there", addresses.get(timeout=60), secrets[0], BYTES, SLOTS)
        yield sender, receiver, process
        sender.close()
    finally:
        process.kill()
        process.join()
        receiver.close()
        addresses.close()
        addresses.join_thread()


def test_two_processes_exchange_records_both_ways() -> None:
    with other_process("exchange") as (sender, receiver, process):
        exchange(sender, receiver, 5000)
        process.join(30)
        assert process.exitcode == 0


def test_a_killed_peer_is_an_error_that_names_it() -> None:
    with other_process("echo") as (sender, receiver, process):
        sender.send(numbered(5), 1)
        check(receiver.receive(30), 5)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        began = time.perf_counter()
        with pytest.raises(LinkError, match=rf"back: the connection to {ADDRESS}:\d+ was lost"):
            while True:
                receiver.receive(0.2)
        with pytest.raises(LinkError, match=rf"there lost its connection to {ADDRESS}:\d+"):
            while True:
                sender.send(numbered(1), 0.2)
        assert time.perf_counter() - began < 5
