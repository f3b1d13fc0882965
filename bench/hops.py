"""What it costs to hand a record from one actor to the next, several ways, on this machine.

    python bench/hops.py [--rows 1] [--columns 576] [--json]

Actors stand in a circle; each waits for the record and sends it on. A hop is a round divided by the
number of actors, so with two actors it is half a ping-pong. The ways take turns within one run,
and each figure is the median of the rounds' medians, in microseconds.

- spinning: our ring, with both sides only ever spinning. The limit, while each has a core.
- ring: our ring as it is used: spin, yield, sleep.
- tcp: our sealed link between nodes, through an address that is not the loopback's.
  For this and the sockets each actor is kept on a core of its own, as actors of two nodes would be.
- socket: as many bytes through bare TCP sockets that block. What tcp is held against.
- yielding socket: the same, but waiting as tcp does: it looks and yields in turns. Its limit.
- object: records as arguments of an actor method, between the actors' resident loops.
- call: a plain actor call that takes the record and returns it. It carries the record there and
  back, so a hop by plain calls is half of it; the ratio is given for both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import time
from typing import Any

import numpy as np
import psutil
import ray
from rich.console import Console
from rich.table import Table

from raygraft.actors.links import (
    Inbox,
    ObjectReceiver,
    ObjectSender,
    Receiver,
    RingReceiver,
    RingSender,
    Sender,
    TcpReceiver,
    TcpSender,
    allocate_ring,
    new_secret,
)
from raygraft.actors.links.object import await_reply
from raygraft.actors.records import Record, RecordKind, encoded_size
from raygraft.kernels.waiting import SPIN_NS, YIELD_NS, prepare_sockets, wait_until_ready

SLOTS = 4
BUDGETS = {"spinning": (3600 * 10**9, 0), "ring": (SPIN_NS, YIELD_NS)}
WAYS = ("spinning", "ring", "tcp", "socket", "yielding socket", "object", "call")
SOCKETS = ("tcp", "socket", "yielding socket")
WARM_UP = 0.2  # the share of a round's hops that is not counted
PATIENCE_S = 60.0

_turns = itertools.count()


def own_address() -> str:
    """An address of this machine that is not the loopback's, if it has one."""
    entries = [entry for found in psutil.net_if_addrs().values() for entry in found]
    addresses = [entry.address for entry in entries if entry.family == socket.AF_INET]
    return next((a for a in addresses if not a.startswith("127.")), "127.0.0.1")


class SocketReceiver:
    """The receiving end of a bare socket: bytes come, and stand for the record."""

    def __init__(self, record: Record, yielding: bool) -> None:
        self._record = record
        self._buffer = memoryview(bytearray(record.nbytes()))
        self._listener = socket.create_server((own_address(), 0))
        self._connection: socket.socket | None = None
        self._polled = np.zeros(1, [("descriptor", "i4"), ("events", "i2"), ("returned", "i2")])
        self._yielding = yielding
        self.address = self._listener.getsockname()
        prepare_sockets()

    def receive(self, timeout: float) -> Record | None:
        if self._connection is None:
            self._connection, _ = self._listener.accept()
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._polled["descriptor"], self._polled["events"] = self._connection.fileno(), 1
        arrived = 0
        while arrived < self._buffer.nbytes:
            if self._yielding:
                wait_until_ready(self._polled.ctypes.data, int(timeout * 1e9), YIELD_NS)
            arrived += self._connection.recv_into(self._buffer[arrived:])
        return self._record

    def close(self) -> None:
        self._listener.close()


class SocketSender:
    """The sending end of a bare socket."""

    def __init__(self, record: Record, address: tuple[str, int]) -> None:
        self._bytes = bytes(record.nbytes())
        self._connection = socket.create_connection(address)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, record: Record, timeout: float) -> None:
        self._connection.sendall(self._bytes)

    def close(self) -> None:
        self._connection.close()


@ray.remote(num_cpus=0, concurrency_groups={"loop": 1, "links": 1})
class Node:
    """One actor of the circle. Its first member times the rounds, the others pass records on."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.receiver: Receiver
        self.sender: Sender

    @ray.method(concurrency_group="loop")  # type: ignore[untyped-decorator]
    def join_rings(self, references: list[Any], slot_bytes: int, budgets: tuple[int, int]) -> None:
        arriving, leaving = ray.get(references)
        options = {"spin_ns": budgets[0], "yield_ns": budgets[1]}
        self.receiver = RingReceiver(arriving, SLOTS, slot_bytes, "arriving", **options)
        self.sender = RingSender(leaving, SLOTS, slot_bytes, "leaving", **options)

    @ray.method(concurrency_group="loop")  # type: ignore[untyped-decorator]
    def join_objects(self, arriving: str, leaving: str, successor: Any) -> None:
        self.receiver = ObjectReceiver(arriving, self.inbox)
        self.sender = ObjectSender(leaving, successor.deliver.remote, await_reply(leaving))

    @ray.method(concurrency_group="loop")  # type: ignore[untyped-decorator]
    def stay_on(self, cores: set[int]) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)  # this thread, in which all of the group runs

    @ray.method(concurrency_group="loop")  # type: ignore[untyped-decorator]
    def listen(self, way: str, record: Record, secret: bytes) -> tuple[str, int]:
        if way == "tcp":
            self.receiver = TcpReceiver("circle", own_address(), secret, record.nbytes())
        else:
            self.receiver = SocketReceiver(record, way == "yielding socket")
        return self.receiver.address

    @ray.method(concurrency_group="loop")  # type: ignore[untyped-decorator]
    def dial(self, way: str, record: Record, secret: bytes, address: tuple[str, int]) -> None:
        if way == "tcp":
            self.sender = TcpSender("circle", address, secret, record.nbytes(), SLOTS)
        else:
            self.sender = SocketSender(record, address)

    @ray.method(concurrency_group="links")  # type: ignore[untyped-decorator]
    def deliver(self, link: str, sequence: int, record: Record) -> None:
        self.inbox.put(link, sequence, record)

    @ray.method(concurrency_group="loop")  # type: ignore[untyped-decorator]
    def drive(self, record: Record, rounds: int) -> list[float]:
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            self.sender.send(record, PATIENCE_S)
            if self.receiver.receive(PATIENCE_S) is None:
                raise TimeoutError("the record did not come back")
            seconds.append(time.perf_counter() - begin)
        return seconds

    @ray.method(concurrency_group="loop")  # type: ignore[untyped-decorator]
    def pass_on(self, rounds: int) -> None:
        for _ in range(rounds):
            record = self.receiver.receive(PATIENCE_S)
            if record is None:
                raise TimeoutError("no record came")
            self.sender.send(record, PATIENCE_S)

    @ray.method(concurrency_group="loop")  # type: ignore[untyped-decorator]
    def drive_calls(self, record: Record, rounds: int, others: list[Any]) -> list[float]:
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            ray.get(others[0].call.remote(record, others[1:]))
            seconds.append(time.perf_counter() - begin)
        return seconds

    @ray.method(concurrency_group="loop")  # type: ignore[untyped-decorator]
    def call(self, record: Record, others: list[Any]) -> Record:
        if others:
            returned: Record = ray.get(others[0].call.remote(record, others[1:]))
            return returned
        return record


class Circle:
    """Some actors, and one way of passing a record round after another."""

    def __init__(self, nodes: list[Any], record: Record) -> None:
        self.nodes = nodes
        self.record = record
        shapes = [(tensor.shape, tensor.dtype) for tensor in record.tensors]
        self.slot_bytes = encoded_size(shapes)

    def seconds(self, way: str, rounds: int) -> float:
        """Median seconds of a hop, or of a call."""
        if way == "call":
            others = self.nodes[1:]
            times = ray.get(self.nodes[0].drive_calls.remote(self.record, rounds, others))
            return _median(times) / len(others)
        self._join(way)
        passing = [node.pass_on.remote(rounds) for node in self.nodes[1:]]
        times = ray.get(self.nodes[0].drive.remote(self.record, rounds))
        ray.get(passing)
        return _median(times) / len(self.nodes)

    def _join(self, way: str) -> None:
        count = len(self.nodes)
        successors = [(index, (index + 1) % count) for index in range(count)]
        cores = range(os.cpu_count() or 1)
        apart = way in SOCKETS
        for index, node in enumerate(self.nodes):
            ray.get(node.stay_on.remote({cores[index % len(cores)]} if apart else set(cores)))
        if way == "object":
            number = next(_turns)  # an inbox counts records by link name: never use one twice
            names = [f"{number}-{index}" for index in range(count)]
            joining = [
                self.nodes[index].join_objects.remote(names[index], names[after], self.nodes[after])
                for index, after in successors
            ]
        elif way in SOCKETS:
            given = (way, self.record, new_secret())
            addresses = ray.get([node.listen.remote(*given) for node in self.nodes])
            joining = [
                self.nodes[index].dial.remote(*given, addresses[after])
                for index, after in successors
            ]
        else:
            rings = [allocate_ring(SLOTS, self.slot_bytes)[0] for _ in self.nodes]
            joining = [
                self.nodes[index].join_rings.remote(
                    [rings[index], rings[after]], self.slot_bytes, BUDGETS[way]
                )
                for index, after in successors
            ]
        ray.get(joining)


def measure(record: Record, repeats: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each way and number of actors; all ways take turns `repeats` times."""
    node: Any = Node  # Ray's decorators are untyped
    nodes = [node.remote() for _ in range(3)]
    found: dict[tuple[int, str], list[float]] = {}
    for _ in range(repeats):
        for count in (2, 3):
            circle = Circle(nodes[:count], record)
            for way in WAYS:
                # More spinning sides than cores wait for whole time slices: a few rounds suffice.
                crowded = way == "spinning" and count > (os.cpu_count() or 1)
                share = {"object": 5, "call": 5}.get(way, 40 if crowded else 1)
                microseconds = circle.seconds(way, max(rounds // share, 10)) * 1e6
                found.setdefault((count, way), []).append(microseconds)
    return [
        {"actors": count, "way": way, "median_us": statistics.median(values), "repeats_us": values}
        for (count, way), values in found.items()
    ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """A ring's hop against a plain call, and half of one; tcp's against bare sockets'."""
    median = {(row["actors"], row["way"]): row["median_us"] for row in rows}
    found = {}
    for count in sorted({row["actors"] for row in rows}):
        ratio = median[count, "ring"] / median[count, "call"]
        found[f"ring_to_call_{count}_actors"] = ratio
        found[f"ring_to_half_a_call_{count}_actors"] = 2 * ratio
        for way in ("socket", "yielding socket"):
            name = f"tcp_to_{way.replace(' ', '_')}_{count}_actors"
            found[name] = median[count, "tcp"] / median[count, way]
    return found


def show(result: dict[str, Any]) -> None:
    console = Console()
    for name, ratio in result["ratios"].items():
        wanted = "at most 3" if name.startswith("tcp") else "below 0.1"
        console.print(f"{name.replace('_', ' ')}: [bold]{ratio:.3f}[/bold] (wanted: {wanted})")
    table = Table(title=f"us a hop, {result['record_bytes']} bytes, {result['cores']} cores")
    for heading in ("actors", "way", "median", "least", "most", "of a call"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    calls = {row["actors"]: row["median_us"] for row in result["hops"] if row["way"] == "call"}
    for row in result["hops"]:
        median, values = row["median_us"], row["repeats_us"]
        share = f"{median / calls[row['actors']]:.3f}"
        figures = [f"{value:.1f}" for value in (median, min(values), max(values))]
        table.add_row(str(row["actors"]), row["way"], *figures, share)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--columns", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--rounds", type=int, default=1000, help="rounds of the record in a turn")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    tensor = np.ones((options.rows, options.columns), np.float32)
    record = Record(RecordKind.DATA, 0, 0, 0, 0, (tensor,))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about it
    ray.init(
        num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    try:
        rows = measure(record, options.repeats, options.rounds)
    finally:
        ray.shutdown()
    result = {
        "record_bytes": record.nbytes(),
        "cores": os.cpu_count(),
        "ratios": ratios(rows),
        "hops": rows,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds[int(len(seconds) * WARM_UP) :])


if __name__ == "__main__":
    main()
