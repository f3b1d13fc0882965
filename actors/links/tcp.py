"""The link between nodes: sealed records over a TCP connection of its own.

The receiver listens on its node's address, at a port that the system chooses, and lets in the one
peer that holds the link's secret (`sealing.py`). Records are one way.

A send copies, seals, and hands its bytes to the kernel; what does not fit there is left to a
thread, so that two actors that send each other much at once do not wait for each other. At most
`slots` records wait for that thread.

A wait looks at the socket and yields in turns for a millisecond, then sleeps until bytes come: a
sleeper's waking costs more than sealing does.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque

import numpy as np

from raygraft.actors.links.sealing import Opener, Sealer, admit, ask_in
from raygraft.actors.records import Record, describe
from raygraft.graph.errors import LinkError, LinkFullError
from raygraft.kernels.waiting import YIELD_NS, prepare_sockets, wait_until_ready

CONNECT_SECONDS = 10.0
"""Longest wait of a sender for its receiver's host to answer."""
_CHALLENGE_SECONDS = 2.0  # of a peer that was let in to prove itself; others wait in line
_CLOSE_SECONDS = 2.0
_POLLIN = 1
_POLLED = np.dtype([("descriptor", "i4"), ("events", "i2"), ("returned", "i2")])
# A host that has vanished is noticed by whoever waits for its records, within some ten seconds.
# There is no TCP_USER_TIMEOUT, as it would also end a connection whose receiver is merely busy.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}


class TcpReceiver:
    """See `raygraft.actors.links.base.Receiver`.

    It listens from the start, and lets the sender in behind the scenes; until then `receive` waits.
    """

    def __init__(self, name: str, address: str, secret: bytes, record_bytes: int) -> None:
        """Listen on an address of this node, for records of at most `record_bytes` bytes.

        Raises LinkError when the node cannot listen.
        """
        self.name = name
        self._secret = secret
        self._record_bytes = record_bytes
        self._connection: socket.socket | None = None
        self._connected = threading.Event()
        self._closed = False
        self._opener: Opener
        self._peer = "its sender"
        self._idle = False
        self._polled = np.zeros(1, _POLLED)
        self._polled_address: int = self._polled.ctypes.data
        prepare_sockets()
        self._listener = _listen(name, address)
        self.address: tuple[str, int] = (address, self._listener.getsockname()[1])
        threading.Thread(target=self._let_in, name=f"link {name}", daemon=True).start()

    def receive(self, timeout: float) -> Record | None:
        if self._closed:
            raise LinkError(f"link {self.name} is closed")
        deadline = time.monotonic() + timeout
        if self._connection is None and not self._connected.wait(timeout):
            return None
        try:
            while (record := self._opener.open_next()) is None:
                if not self._wait(deadline - time.monotonic()):
                    return None
                self._read()
        except LinkError as error:
            raise LinkError(f"link {self.name}: {error}") from None
        return record

    def close(self) -> None:
        self._closed = True
        _hang_up(self._listener)
        if self._connection is not None:
            _hang_up(self._connection)

    def _wait(self, seconds: float) -> bool:
        """Wait for more bytes; False when there are none."""
        # Who has waited in vain before sleeps at once: an idle loop must cost nothing.
        yield_ns = 0 if self._idle else YIELD_NS
        timeout_ns = int(seconds * 1e9) if seconds > 0 else 0
        ready: bool = wait_until_ready(self._polled_address, timeout_ns, yield_ns)
        self._idle = not ready
        return ready

    def _read(self) -> None:
        """Take what has arrived, as far as there is room."""
        assert self._connection is not None
        try:
            count = self._connection.recv_into(self._opener.room())
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkError(f"the connection to {self._peer} was lost: {error}") from None
        if count == 0:
            raise LinkError(f"the connection to {self._peer} was lost: it hung up")
        self._opener.add(count)

    def _let_in(self) -> None:
        """Accept peers until one of them proves that it is the sender."""
        while not self._closed:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                break  # closed
            try:
                connection.settimeout(_CHALLENGE_SECONDS)
                opener = admit(connection, self._secret, self.name, self._record_bytes)
            except OSError:
                opener = None
            if opener is None:
                connection.close()
                continue
            _tune(connection)
            connection.setblocking(False)
            self._polled["descriptor"], self._polled["events"] = connection.fileno(), _POLLIN
            self._opener, self._peer = opener, f"{peer[0]}:{peer[1]}"
            self._connection = connection
            self._connected.set()
            break
        _hang_up(self._listener)
        if self._closed and self._connection is not None:
            _hang_up(self._connection)


class TcpSender:
    """See `raygraft.actors.links.base.Sender`.

    Connecting, it proves itself to the receiver and has it prove itself; raises LinkError when
    nobody answers there, or somebody else does.
    """

    def __init__(
        self, name: str, address: tuple[str, int], secret: bytes, record_bytes: int, slots: int
    ) -> None:
        self.name = name
        self._peer = f"{address[0]}:{address[1]}"
        self._slots = slots
        self._connection, self._sealer = self._connect(address, secret, record_bytes)
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._writer: threading.Thread | None = None
        self._failure: str | None = None

    def _connect(
        self, address: tuple[str, int], secret: bytes, record_bytes: int
    ) -> tuple[socket.socket, Sealer]:
        try:
            connection = socket.create_connection(address, CONNECT_SECONDS)
        except OSError as error:
            raise LinkError(f"link {self.name}: cannot reach {self._peer}: {error}") from None
        try:
            sealer = ask_in(connection, secret, self.name, record_bytes)
        except OSError as error:
            connection.close()
            raise LinkError(f"link {self.name}: {self._peer} refused: {error}") from None
        if sealer is None:
            connection.close()
            raise LinkError(f"link {self.name}: {self._peer} does not hold the link's secret")
        _tune(connection)
        connection.settimeout(None)
        return connection, sealer

    def send(self, record: Record, timeout: float) -> None:
        self._check()
        behind = bool(self._waiting)
        if behind:
            self._wait_for_room(record, timeout)
        try:
            sealed = self._sealer.seal(record)
        except LinkError as error:
            raise LinkError(f"link {self.name}: {error}") from None
        sent = 0 if behind else self._write(sealed)
        if sent < sealed.nbytes:
            self._leave(bytes(sealed[sent:]))

    def close(self) -> None:
        """What was sent still goes out, for as long as a patient peer takes it."""
        with self._changed:
            self._failure = self._failure or "is closed"
            self._changed.notify_all()
        if self._writer is not None:
            self._writer.join(_CLOSE_SECONDS)
        _hang_up(self._connection)

    def _check(self) -> None:
        if self._failure is not None:
            raise LinkError(f"link {self.name} {self._failure}")

    def _wait_for_room(self, record: Record, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or len(self._waiting) < self._slots, timeout
            )
            self._check()
            if len(self._waiting) >= self._slots:
                raise LinkFullError(
                    f"link {self.name}: no room for {describe(record)} within {timeout:g} s, "
                    f"{len(self._waiting)} records wait for {self._peer} to take them"
                )

    def _write(self, sealed: memoryview) -> int:
        """Give the kernel what it takes at once; how much that was."""
        try:
            return self._connection.send(sealed, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._fail(error)
            self._check()
            raise

    def _leave(self, rest: bytes) -> None:
        """Leave bytes to the thread that writes what the kernel has no room for yet."""
        with self._changed:
            self._waiting.append(rest)
            self._changed.notify_all()
        if self._writer is None:
            self._writer = threading.Thread(
                target=self._write_waiting, name=f"link {self.name}", daemon=True
            )
            self._writer.start()

    def _write_waiting(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._failure)
                if not self._waiting:
                    return
                first = self._waiting[0]
            try:
                self._connection.sendall(first)
            except OSError as error:
                self._fail(error)
                return
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()

    def _fail(self, error: OSError) -> None:
        with self._changed:
            self._failure = self._failure or f"lost its connection to {self._peer}: {error}"
            self._changed.notify_all()


def _listen(name: str, address: str) -> socket.socket:
    """A listening socket at the node's address, or at all where that one is not the node's own.

    The latter is so behind an address translation; whoever comes has to prove itself anyway.
    """
    try:
        return socket.create_server((address, 0))
    except OSError as error:
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0))
        raise LinkError(f"link {name}: cannot listen on {address}: {error}") from None


def _tune(connection: socket.socket) -> None:
    """Send at once, and notice a peer that has vanished."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE.items():
        if hasattr(socket, option):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in it
    connection.close()
