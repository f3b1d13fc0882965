"""Turns of a resident loop without Python: receive, run and send in one compiled call.

A hop of a microsecond is worth little if Python spends thirty on each side of it. Turns whose
runners can run natively (`Runner.native`), and whose records go over rings, are described by tables
of 64-bit numbers; compiled code goes through them. Values lie at fixed addresses, one set for each
half-batch of a round. What it cannot do (a record that is not the expected one) is left to Python,
at the place that was reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raygraft.actors.links import RingReceiver, RingSender
from raygraft.actors.part import ActorPart, Links
from raygraft.actors.records import Array, RecordKind
from raygraft.graph.operators import Value
from raygraft.graph.step import Step
from raygraft.kernels.base import NativeRun, Runner
from raygraft.kernels.compiled import compiled
from raygraft.kernels.raw import call, copy_bytes, put_word, word
from raygraft.kernels.waiting import (
    SPIN_NS,
    YIELD_NS,
    load_acquire,
    now_ns,
    publish,
    wait_for_change,
)
from raygraft.placement.plan import Transfer
from raygraft.placement.schedule import StageTurn

DONE, LATE, UNEXPECTED = range(3)
"""How a call ended: all turns taken; nothing came, or no room, in time; a record to look at."""

Words = NDArray[np.int64]

# Of an encoded record (see `records.py`), as 64-bit words.
_MAGIC_AND_KIND = 0x5247 | RecordKind.DATA << 16
_HEADER_BYTES, _TENSOR_BYTES, _ALIGNMENT = 40, 24, 64
_FLOAT_MATRIX = 0 | 2 << 8  # code of float32, two dimensions

# Columns of the tables, in bytes.
_RECEIVE, _RECEIVES, _RUN, _RUNS, _SEND, _SENDS = range(0, 48, 8)  # of turns: first and count
_TOTALS_AT = 48  # of turns: where the totals of its device lie
_RING, _TRANSFER, _TENSOR, _TENSORS = range(0, 32, 8)  # of receives and sends
_PLACE, _WIDTH, _LOGIT_SIDE, _ADDRESS = range(0, 32, 8)  # of tensors, and of copies
_FUNCTION, _JOB, _COPY, _COPIES_IN, _COPIES_OUT = range(0, 40, 8)  # of runs
_SENT, _TAKEN, _SENDER_SLEEPS, _RECEIVER_SLEEPS, _SLOTS_AT, _STRIDE, _SLOTS = range(0, 56, 8)
_SENT_COUNT, _TAKEN_COUNT = 56, 64  # of rings, after their layout
# Of half-batches, then of the state, then of a device's totals.
_ROWS, _LOGITS, _EPOCH, _STEP, _HALF_BATCH, _HOME, _STEP_ADDRESS = range(0, 56, 8)
_TURN, _HALF, _PHASE = range(0, 24, 8)
_WAITED, _RAN, _RECORDS, _BYTES = range(0, 32, 8)


class Tables(NamedTuple):
    """Addresses of the tables."""

    turns: int
    transfers: int
    tensors: int
    runs: int
    copies: int
    rings: int
    halves: int
    totals: int
    state: int


@dataclass(frozen=True, slots=True)
class Half:
    """A half-batch as compiled code needs to know it."""

    step: Step | None
    epoch: int
    number: int
    half_batch: int
    values: dict[str, Array]


class NativeTurns:
    """The tables of an actor's turns, and the calls that go through them."""

    def __init__(
        self,
        part: ActorPart,
        turns: Sequence[StageTurn],
        runners: Mapping[int, Sequence[Runner]],
        links: Links,
    ) -> None:
        self._turns = turns
        self._values = {
            name: value
            for units in part.subgraphs.values()
            for unit in units
            for name, value in unit.values.items()
        }
        self._units = {
            number: [(runner, runner.native()) for runner in own] for number, own in runners.items()
        }
        describers = (r for own in self._units.values() for r, native in own if native is not None)
        self._kind = type(next(describers, None))
        self._links = links
        self._most_rows = part.limits.max_rows
        self.possible = [self._is_possible(turn) for turn in turns]
        self._live = _live_before(turns)
        self._devices = tuple(dict.fromkeys(turn.stage.device for turn in turns))
        self._homes: list[Array] = []
        if any(self.possible):
            self._make_tables()

    def end_of(self, first: int) -> int:
        """The end of the possible turns from `first` on; `first` if there are none."""
        end = first
        while end < len(self.possible) and self.possible[end]:
            end += 1
        return end

    def begin(self, first: int, last: int, halves: Sequence[Half]) -> bool:
        """Prepare turns `first:last`; False when records for them are there already."""
        expected = {v for turn in self._turns[first:last] for t in turn.receive for v in t.values}
        if any(not expected.isdisjoint(half.values) for half in halves):
            return False
        self._first, self._last, self._halves = first, last, halves
        while len(self._homes) < len(halves):
            self._homes.append(np.zeros(self._home_bytes, np.uint8))
        rows = np.zeros((len(halves), 7), np.int64)
        for row, half, home in zip(rows, halves, self._homes, strict=False):
            if half.step is None:
                continue
            address = self._describer.describe_step(half.step)
            row[:] = (
                half.step.rows, len(half.step.logit_rows), half.epoch, half.number,
                half.half_batch, home.ctypes.data, address,
            )  # fmt: skip
            for name in self._live[first] & half.values.keys() & self._places.keys():
                self._view(name, home, half.step)[:] = half.values[name]
        self._half_rows = rows
        self._state[:] = 0
        self._totals[:] = 0
        self._state[_TURN // 8] = first
        for row, ring in zip(self._rings, self._ring_ends, strict=True):
            row[_SENT_COUNT // 8 :] = ring.counts
        return True

    def run(self, timeout: float) -> int:
        """Go on with the prepared turns: DONE, LATE or UNEXPECTED. The GIL is not held."""
        tables = self._tables._replace(halves=int(self._half_rows.ctypes.data))
        return int(_run_turns(tables, self._last, len(self._halves), int(timeout * 1e9)))

    def finish(self) -> tuple[int, int]:
        """Hand values and counts back to Python: the turn and the half-batch to go on with."""
        turn, place, phase = (int(n) for n in self._state[:3])
        for row, ring in zip(self._rings, self._ring_ends, strict=True):
            ring.counts = int(row[_SENT_COUNT // 8]), int(row[_TAKEN_COUNT // 8])
        for number, (half, home) in enumerate(zip(self._halves, self._homes, strict=False)):
            if half.step is None:
                continue
            live = set(self._live[turn + (number < place)])
            if number == place and turn < len(self._turns):
                live.update(v for t in self._turns[turn].receive[:phase] for v in t.values)
            for name in live & self._places.keys():
                half.values[name] = self._view(name, home, half.step)
        return turn, place

    @property
    def totals(self) -> dict[str, tuple[float, float, int, int]]:
        """Of each device, since `begin`: seconds waited and run, records sent and their bytes."""
        rows = zip(self._devices, self._totals.tolist(), strict=True)
        return {
            device: (waited / 1e9, ran / 1e9, records, nbytes)
            for device, (waited, ran, records, nbytes) in rows
        }

    def _is_possible(self, turn: StageTurn) -> bool:
        links = self._links
        names = _values_of(turn)
        return (
            all(
                native is not None and type(runner) is self._kind  # which all know their steps
                for runner, native in self._units[turn.stage.number]
            )
            and all(isinstance(links.receivers[t.source], RingReceiver) for t in turn.receive)
            and all(isinstance(links.senders[t.target], RingSender) for t in turn.send)
            and all(n in self._values and self._values[n].dtype == "float32" for n in names)
        )

    def _make_tables(self) -> None:
        self._ring_ends: list[RingReceiver | RingSender] = []
        self._places: dict[str, int] = {}
        self._free: dict[int, list[int]] = {}
        self._home_bytes = 0
        turns, transfers, tensors, runs, copies = ([] for _ in range(5))  # type: ignore[var-annotated]

        def add_transfers(some: Sequence[Transfer], sending: bool) -> None:
            for transfer in some:
                ends = self._links.senders if sending else self._links.receivers
                end = ends[transfer.target if sending else transfer.source]
                assert isinstance(end, RingSender | RingReceiver)
                if end not in self._ring_ends:
                    self._ring_ends.append(end)
                own = [self._tensor(name) for name in transfer.values]
                place = (self._ring_ends.index(end), transfer.number, len(tensors), len(own))
                transfers.append(place)
                tensors.extend(own)

        used = {v for turn in self._possible_turns() for v in _values_of(turn)}
        for number, turn in enumerate(self._turns):
            for name in sorted(self._live[number] & used):
                self._place(name)
            if not self.possible[number]:
                turns.append((0,) * 7)
                self._release(turn)
                continue
            units = self._units[turn.stage.number]
            first, run = len(transfers), len(runs)
            add_transfers(turn.receive, sending=False)
            for runner, native in units:
                assert native is not None
                self._describer = runner
                runs.append(self._run_row(native, len(copies)))
                copies.extend(self._copy_rows(native))
            send = len(transfers)
            add_transfers(turn.send, sending=True)
            totals = 32 * self._devices.index(turn.stage.device)
            turns.append((first, len(turn.receive), run, len(units), send, len(turn.send), totals))
            self._release(turn)
        self._rings = np.array([(*end.layout, 0, 0) for end in self._ring_ends], np.int64)
        self._rings = self._rings.reshape(-1, 9)
        self._totals = np.zeros((len(self._devices), 4), np.int64)
        self._state = np.zeros(3, np.int64)
        tables = (turns, transfers, tensors, runs, copies)
        self._arrays = [np.array(table or [0], np.int64) for table in tables]
        self._arrays += [self._rings, np.zeros(1, np.int64), self._totals, self._state]
        self._tables = Tables._make(int(array.ctypes.data) for array in self._arrays)

    def _place(self, name: str) -> int:
        """Where a value lies in the memory of a half-batch."""
        if name not in self._places:
            width = self._values[name].width
            if self._free.get(width):
                self._places[name] = self._free[width].pop()
            else:
                self._places[name] = self._home_bytes
                self._home_bytes += -(-4 * width * self._most_rows // _ALIGNMENT) * _ALIGNMENT
        return self._places[name]

    def _release(self, turn: StageTurn) -> None:
        """The places of values that nobody reads after a turn serve later ones."""
        for name in turn.forget:
            if name in self._places:
                self._free.setdefault(self._values[name].width, []).append(self._places[name])

    def _possible_turns(self) -> list[StageTurn]:
        both = zip(self._turns, self.possible, strict=True)
        return [turn for turn, possible in both if possible]

    def _tensor(self, name: str) -> tuple[int, ...]:
        value = self._values[name]
        return (self._place(name), value.width, int(value.rows == "logits"), 0)

    def _run_row(self, native: NativeRun, copy: int) -> tuple[int, ...]:
        return (native.function, native.job, copy, len(native.inputs), len(native.outputs))

    def _copy_rows(self, native: NativeRun) -> list[tuple[int, ...]]:
        both = (*native.inputs.items(), *native.outputs.items())
        return [(*self._tensor(name)[:3], address) for name, address in both]

    def _view(self, name: str, home: Array, step: Step) -> Array:
        value: Value = self._values[name]
        rows = len(step.logit_rows) if value.rows == "logits" else step.rows
        place = self._places[name]
        return home[place : place + 4 * rows * value.width].view(np.float32).reshape(rows, -1)


def _values_of(turn: StageTurn) -> set[str]:
    """All values that a turn receives, reads, makes or sends."""
    sent = {v for t in (*turn.receive, *turn.send) for v in t.values}
    return sent | {*turn.stage.inputs, *turn.stage.outputs}


def _live_before(turns: Sequence[StageTurn]) -> list[frozenset[str]]:
    """Values that are there before each turn, and after the last."""
    live: set[str] = set()
    found = [frozenset(live)]
    for turn in turns:
        live |= {v for t in turn.receive for v in t.values} | {*turn.stage.outputs}
        live -= {*turn.forget}
        found.append(frozenset(live))
    return found


@compiled(nogil=True)
def _run_turns(t: Tables, last: int, halves: int, timeout_ns: int) -> int:
    """Turns from the state's on, up to `last`, each for all half-batches."""
    while word(t.state + _TURN) < last:
        turn = t.turns + 56 * word(t.state + _TURN)
        while word(t.state + _HALF) < halves:
            half = t.halves + 56 * word(t.state + _HALF)
            if word(half + _ROWS) > 0:
                ended = _take_turn(t, turn, half, timeout_ns)
                if ended != DONE:
                    return ended
            put_word(t.state + _PHASE, 0)
            put_word(t.state + _HALF, word(t.state + _HALF) + 1)
        put_word(t.state + _HALF, 0)
        put_word(t.state + _TURN, word(t.state + _TURN) + 1)
    return DONE


@compiled(nogil=True)
def _take_turn(t: Tables, turn: int, half: int, timeout_ns: int) -> int:
    """Receive, run, send; the state's phase counts what of it is done."""
    receives, sends = word(turn + _RECEIVES), word(turn + _SENDS)
    totals = t.totals + word(turn + _TOTALS_AT)
    while word(t.state + _PHASE) < receives:
        transfer = t.transfers + 32 * (word(turn + _RECEIVE) + word(t.state + _PHASE))
        ended = _receive(t, transfer, half, totals, timeout_ns)
        if ended != DONE:
            return ended
        put_word(t.state + _PHASE, word(t.state + _PHASE) + 1)
    if word(t.state + _PHASE) == receives:
        began = now_ns()
        for number in range(word(turn + _RUNS)):
            _run(t, t.runs + 40 * (word(turn + _RUN) + number), half)
        put_word(totals + _RAN, word(totals + _RAN) + now_ns() - began)
        put_word(t.state + _PHASE, receives + 1)
    while word(t.state + _PHASE) <= receives + sends:
        done = word(t.state + _PHASE) - receives - 1
        transfer = t.transfers + 32 * (word(turn + _SEND) + done)
        if not _send(t, transfer, half, totals, timeout_ns):
            return LATE
        put_word(t.state + _PHASE, word(t.state + _PHASE) + 1)
    return DONE


@compiled(nogil=True)
def _rows_of(tensor: int, half: int) -> int:
    rows: int = word(half + _LOGITS) if word(tensor + _LOGIT_SIDE) else word(half + _ROWS)
    return rows


@compiled(nogil=True)
def _run(t: Tables, run: int, half: int) -> None:
    """Copy inputs in, compute, copy outputs out."""
    inputs, outputs = word(run + _COPIES_IN), word(run + _COPIES_OUT)
    first = t.copies + 32 * word(run + _COPY)
    for number in range(inputs):
        copy = first + 32 * number
        nbytes = 4 * word(copy + _WIDTH) * _rows_of(copy, half)
        copy_bytes(word(copy + _ADDRESS), word(half + _HOME) + word(copy + _PLACE), nbytes)
    call(word(run + _FUNCTION), (word(run + _JOB), word(half + _STEP_ADDRESS)))
    for number in range(inputs, inputs + outputs):
        copy = first + 32 * number
        nbytes = 4 * word(copy + _WIDTH) * _rows_of(copy, half)
        copy_bytes(word(half + _HOME) + word(copy + _PLACE), word(copy + _ADDRESS), nbytes)


@compiled(nogil=True)
def _aligned(offset: int) -> int:
    return (offset + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


@compiled(nogil=True)
def _wait(counter: int, seen: int, sleeping: int, totals: int, timeout_ns: int) -> bool:
    began = now_ns()
    changed: bool = wait_for_change(counter, seen, sleeping, timeout_ns, SPIN_NS, YIELD_NS)
    put_word(totals + _WAITED, word(totals + _WAITED) + now_ns() - began)
    return changed


@compiled(nogil=True)
def _receive(t: Tables, transfer: int, half: int, totals: int, timeout_ns: int) -> int:
    """Take the record of a transfer from its ring; what is not as expected is left there."""
    ring = t.rings + 72 * word(transfer + _RING)
    taken = word(ring + _TAKEN_COUNT)
    if word(ring + _SENT_COUNT) == taken:
        sleeping = word(ring + _RECEIVER_SLEEPS)
        if not _wait(word(ring + _SENT), taken, sleeping, totals, timeout_ns):
            return LATE
        put_word(ring + _SENT_COUNT, load_acquire(word(ring + _SENT)))
    slot = word(ring + _SLOTS_AT) + word(ring + _STRIDE) * (taken % word(ring + _SLOTS))
    tensors, count = t.tensors + 32 * word(transfer + _TENSOR), word(transfer + _TENSORS)
    begin = _MAGIC_AND_KIND + count * 2**24 + word(transfer + _TRANSFER) * 2**32
    if (
        word(slot) != begin
        or word(slot + 8) % 2**32 != word(half + _HALF_BATCH)
        or word(slot + 16) != word(half + _EPOCH)
        or word(slot + 24) != word(half + _STEP)
    ):
        return UNEXPECTED
    for number in range(count):
        tensor, shape = tensors + 32 * number, slot + _HEADER_BYTES + _TENSOR_BYTES * number
        if (
            word(shape) % 2**16 != _FLOAT_MATRIX
            or word(shape + 8) != _rows_of(tensor, half)
            or word(shape + 16) != word(tensor + _WIDTH)
        ):
            return UNEXPECTED
    offset = _aligned(_HEADER_BYTES + _TENSOR_BYTES * count)
    for number in range(count):
        tensor = tensors + 32 * number
        nbytes = 4 * word(tensor + _WIDTH) * _rows_of(tensor, half)
        copy_bytes(word(half + _HOME) + word(tensor + _PLACE), slot + offset, nbytes)
        offset = _aligned(offset + nbytes)
    put_word(ring + _TAKEN_COUNT, taken + 1)
    publish(word(ring + _TAKEN), taken + 1, word(ring + _SENDER_SLEEPS))
    return DONE


@compiled(nogil=True)
def _send(t: Tables, transfer: int, half: int, totals: int, timeout_ns: int) -> bool:
    """Write the record of a transfer into its ring; False when there is no room in time."""
    ring = t.rings + 72 * word(transfer + _RING)
    sent, taken = word(ring + _SENT_COUNT), word(ring + _TAKEN_COUNT)
    if sent - taken == word(ring + _SLOTS):
        sleeping = word(ring + _SENDER_SLEEPS)
        if not _wait(word(ring + _TAKEN), taken, sleeping, totals, timeout_ns):
            return False
        put_word(ring + _TAKEN_COUNT, load_acquire(word(ring + _TAKEN)))
    slot = word(ring + _SLOTS_AT) + word(ring + _STRIDE) * (sent % word(ring + _SLOTS))
    tensors, count = t.tensors + 32 * word(transfer + _TENSOR), word(transfer + _TENSORS)
    put_word(slot, _MAGIC_AND_KIND + count * 2**24 + word(transfer + _TRANSFER) * 2**32)
    put_word(slot + 8, word(half + _HALF_BATCH))
    put_word(slot + 16, word(half + _EPOCH))
    put_word(slot + 24, word(half + _STEP))
    offset = _aligned(_HEADER_BYTES + _TENSOR_BYTES * count)
    total = 0
    for number in range(count):
        tensor, shape = tensors + 32 * number, slot + _HEADER_BYTES + _TENSOR_BYTES * number
        rows, width = _rows_of(tensor, half), word(tensor + _WIDTH)
        put_word(shape, _FLOAT_MATRIX)
        put_word(shape + 8, rows)
        put_word(shape + 16, width)
        copy_bytes(slot + offset, word(half + _HOME) + word(tensor + _PLACE), 4 * rows * width)
        offset = _aligned(offset + 4 * rows * width)
        total += 4 * rows * width
    put_word(slot + 32, offset)
    put_word(ring + _SENT_COUNT, sent + 1)
    publish(word(ring + _SENT), sent + 1, word(ring + _RECEIVER_SLEEPS))
    put_word(totals + _RECORDS, word(totals + _RECORDS) + 1)
    put_word(totals + _BYTES, word(totals + _BYTES) + total)
    return True
