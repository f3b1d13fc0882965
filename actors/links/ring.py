"""The link within one node: a ring of slots in memory that both actors map.

One process writes, one reads. The memory is an object of Ray's object store that both hold:
Ray hands it out as a read-only array, but maps it writable, so both write through its address.
While either holds the array the store neither evicts nor spills it, and it goes when the last
holder lets go or dies: a killed actor leaves nothing behind.

Layout, from the first multiple of 128 bytes (a line) in the buffer:

| line | word | written by |
|---|---|---|
| 0 | magic; slots; bytes of a slot | whoever allocates |
| 1 | records sent so far | sender |
| 2 | records taken so far | receiver |
| 3 | 1 while the sender sleeps | sender |
| 4 | 1 while the receiver sleeps | receiver |
| 5... | the slots, an encoded record each | sender |

Each word that changes has a line to itself, as two processors that write one line slow each other.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from raygraft.actors.records import Record, decode, describe, encode_into
from raygraft.graph.errors import LinkError, LinkFullError
from raygraft.kernels.waiting import SPIN_NS, YIELD_NS, load, prepare, publish, wait_for_change

Bytes = npt.NDArray[np.uint8]

_LINE = 128
_CONTROL_LINES = 5
_MAGIC = 0x52696E67_00000001
# Ray sends smaller objects along with a call instead of sharing them (100 KiB, configurable).
_LEAST_SHARED_BYTES = 256 * 1024
_LONGEST_WAIT_S = 3600.0


def ring_bytes(slots: int, slot_bytes: int) -> int:
    """Size of a buffer that holds such a ring, wherever the buffer begins."""
    return (_CONTROL_LINES + 1) * _LINE + slots * _stride(slot_bytes)


def format_ring(buffer: Bytes, slots: int, slot_bytes: int) -> None:
    """Make an empty ring of a buffer of at least `ring_bytes(slots, slot_bytes)` bytes.

    To be done once, before either end is made. Raises LinkError when the buffer is too small.
    """
    if slots < 1 or slot_bytes < 1:
        raise LinkError(f"a ring needs a slot of a byte, not {slots} slots of {slot_bytes} bytes")
    needed = ring_bytes(slots, slot_bytes)
    if buffer.nbytes < needed:
        raise LinkError(
            f"a ring of {slots} slots of {slot_bytes} bytes needs {needed} bytes, "
            f"the buffer has {buffer.nbytes}"
        )
    view, _ = _map(buffer)
    words = view[: _CONTROL_LINES * _LINE].cast("q")
    for index in range(len(words)):
        words[index] = 0
    words[0], words[1], words[2] = _MAGIC, slots, slot_bytes


def allocate_ring(slots: int, slot_bytes: int) -> tuple[Any, Bytes]:
    """A ring in Ray's object store: (object reference, array).

    Pass the reference to the actors inside a list and let them `ray.get` it. Keep it until all
    have: from then on their arrays alone hold the memory.
    """
    import ray  # noqa: PLC0415  # rings over other memory need no Ray

    reference = ray.put(np.zeros(max(ring_bytes(slots, slot_bytes), _LEAST_SHARED_BYTES), np.uint8))
    buffer: Bytes = ray.get(reference)
    format_ring(buffer, slots, slot_bytes)
    return reference, buffer


class _RingEnd:
    """What both ends share: the mapped buffer, the addresses of the four words, the two counts."""

    def __init__(
        self,
        buffer: Bytes,
        slots: int,
        slot_bytes: int,
        name: str,
        *,
        spin_ns: int = SPIN_NS,
        yield_ns: int = YIELD_NS,
    ) -> None:
        view, address = _map(buffer)
        found = tuple(view[: 3 * 8].cast("q"))
        if found != (_MAGIC, slots, slot_bytes):
            raise LinkError(
                f"link {name}: expected a ring of {slots} slots of {slot_bytes} bytes, the "
                f"buffer's first words are {found}"
            )
        self.name = name
        self._slots = slots
        self._sent_word = address + _LINE
        self._taken_word = address + 2 * _LINE
        self._sender_sleeps = address + 3 * _LINE
        self._receiver_sleeps = address + 4 * _LINE
        self._budgets = (spin_ns, yield_ns)
        self._idle = False
        stride = _stride(slot_bytes)
        begins = (_CONTROL_LINES * _LINE + index * stride for index in range(slots))
        self._slot_views = [view[begin : begin + slot_bytes] for begin in begins]
        self._first_slot, self._stride = address + _CONTROL_LINES * _LINE, stride
        self._buffer: Bytes | None = buffer  # the memory lives as long as this
        prepare()
        self._sent: int = load(self._sent_word)
        self._taken: int = load(self._taken_word)

    @property
    def layout(self) -> tuple[int, ...]:
        """For compiled code: addresses of the words of lines 1 to 4, first slot, stride, slots."""
        words = (self._sent_word, self._taken_word, self._sender_sleeps, self._receiver_sleeps)
        return (*words, self._first_slot, self._stride, self._slots)

    @property
    def counts(self) -> tuple[int, int]:
        """Records sent and taken, as far as this end knows."""
        return self._sent, self._taken

    @counts.setter
    def counts(self, counts: tuple[int, int]) -> None:
        self._sent, self._taken = counts

    def close(self) -> None:
        self._slot_views = []
        self._buffer = None

    def _check_open(self) -> None:
        if self._buffer is None:
            raise LinkError(f"link {self.name} is closed")


class RingSender(_RingEnd):
    """See `raygraft.actors.links.base.Sender`.

    `buffer` is a formatted ring, an array of bytes that may be marked read-only. The budgets say
    for how long to spin and then to yield before sleeping, in nanoseconds.
    """

    def send(self, record: Record, timeout: float) -> None:
        self._check_open()
        if self._sent - self._taken == self._slots:
            self._wait_for_room(record, timeout)
        try:
            encode_into(record, self._slot_views[self._sent % self._slots])
        except LinkError as error:
            raise LinkError(f"link {self.name}: {error}") from None
        self._sent += 1
        publish(self._sent_word, self._sent, self._receiver_sleeps)

    def _wait_for_room(self, record: Record, timeout: float) -> None:
        wait = (self._taken_word, self._taken, self._sender_sleeps, _nanoseconds(timeout))
        if not wait_for_change(*wait, *self._budgets):
            raise LinkFullError(
                f"link {self.name}: no room for {describe(record)} within {timeout:g} s, "
                f"all {self._slots} slots are full"
            )
        self._taken = load(self._taken_word)


class RingReceiver(_RingEnd):
    """See `raygraft.actors.links.base.Receiver`; arguments as for `RingSender`."""

    def receive(self, timeout: float) -> Record | None:
        self._check_open()
        if self._sent == self._taken:
            wait = (self._sent_word, self._sent, self._receiver_sleeps, _nanoseconds(timeout))
            # Who has waited in vain before sleeps at once: an idle loop must cost nothing.
            budgets = (0, 0) if self._idle else self._budgets
            self._idle = not wait_for_change(*wait, *budgets)
            if self._idle:
                return None
            self._sent = load(self._sent_word)
        try:
            record = decode(self._slot_views[self._taken % self._slots])
        except LinkError as error:
            raise LinkError(f"link {self.name}: {error}") from None
        self._taken += 1
        publish(self._taken_word, self._taken, self._sender_sleeps)
        return record


def _map(buffer: Bytes) -> tuple[memoryview, int]:
    """A writable view from the buffer's first line on, and the address of that line."""
    begin = buffer.ctypes.data
    address = -(-begin // _LINE) * _LINE
    # Both processes skip alike: they map the same pages, so addresses agree modulo a page.
    mapped = (ctypes.c_uint8 * (buffer.nbytes - (address - begin))).from_address(address)
    return memoryview(mapped).cast("B"), address


def _stride(slot_bytes: int) -> int:
    return -(-slot_bytes // _LINE) * _LINE


def _nanoseconds(seconds: float) -> int:
    return int(min(max(seconds, 0.0), _LONGEST_WAIT_S) * 1e9)
