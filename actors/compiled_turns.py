"""Turns of a resident loop in compiled code: it goes through tables of 64-bit numbers.

`native_turns.py` makes the tables, and says what they are for. They describe turns, what each
receives, runs and sends, the rings, and the half-batches of a round; the state says how far a call
has come. A record that is not as expected stays in its ring.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from raygraft.actors.records import RecordKind
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

DONE, LATE, UNEXPECTED = range(3)
"""How a call ended: all turns taken; nothing came, or no room, in time; a record to look at."""

# Of an encoded record (see `records.py`), as 64-bit words.
_MAGIC_AND_KIND = 0x5247 | RecordKind.DATA << 16
_HEADER_BYTES, _TENSOR_BYTES, ALIGNMENT = 40, 24, 64
_FLOAT_MATRIX = 0 | 2 << 8  # code of float32, two dimensions

# Columns of the tables, in bytes.
_RECEIVE, _RECEIVES, _RUN, _RUNS, _SEND, _SENDS = range(0, 48, 8)  # of turns: first and count
_TOTALS_AT = 48  # of turns: where the totals of its device lie
_RING, _TRANSFER, _TENSOR, _TENSORS = range(0, 32, 8)  # of receives and sends
_PLACE, _WIDTH, _LOGIT_SIDE, _ADDRESS = range(0, 32, 8)  # of tensors, and of copies
_FUNCTION, _JOB, _COPY, _COPIES_IN, _COPIES_OUT = range(0, 40, 8)  # of runs
_SENT, _TAKEN, _SENDER_SLEEPS, _RECEIVER_SLEEPS, _SLOTS_AT, _STRIDE, _SLOTS = range(0, 56, 8)
SENT_COUNT, TAKEN_COUNT = 56, 64  # of rings, after their layout
# Of half-batches, then of the state, then of a device's totals.
_ROWS, _LOGITS, _EPOCH, _STEP, _HALF_BATCH, _HOME, _STEP_ADDRESS = range(0, 56, 8)
TURN, _HALF, _PHASE, LEFT, GO_ON = range(0, 40, 8)
STATE_WORDS = 5
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


@functools.cache
def prepare() -> None:
    """Compile all of this, or load it from the cache, so that no first step waits for it."""
    state = np.zeros(STATE_WORDS, np.int64)
    run_turns(Tables(*[int(state.ctypes.data)] * len(Tables._fields)), 0, 0, 0, 0)


@compiled(nogil=True)
def run_turns(t: Tables, first: int, last: int, halves: int, timeout_ns: int) -> int:
    """Turns from the state's on, up to `last`, each for all half-batches.

    Then from `first` on for the step that follows, as long as the state says that one is left.
    """
    while True:
        ended = _take_turns(t, last, halves, timeout_ns)
        if ended != DONE or word(t.state + LEFT) <= 1:
            return ended
        put_word(t.state + LEFT, word(t.state + LEFT) - 1)
        put_word(t.state + TURN, first)
        for number in range(halves):
            half = t.halves + 56 * number
            if word(half + _ROWS) > 0:
                call(word(t.state + GO_ON), (word(half + _STEP_ADDRESS),))
            put_word(half + _STEP, word(half + _STEP) + 1)


@compiled(nogil=True)
def _take_turns(t: Tables, last: int, halves: int, timeout_ns: int) -> int:
    while word(t.state + TURN) < last:
        turn = t.turns + 56 * word(t.state + TURN)
        while word(t.state + _HALF) < halves:
            half = t.halves + 56 * word(t.state + _HALF)
            if word(half + _ROWS) > 0:
                ended = _take_turn(t, turn, half, timeout_ns)
                if ended != DONE:
                    return ended
            put_word(t.state + _PHASE, 0)
            put_word(t.state + _HALF, word(t.state + _HALF) + 1)
        put_word(t.state + _HALF, 0)
        put_word(t.state + TURN, word(t.state + TURN) + 1)
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
    return (offset + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


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
    taken = word(ring + TAKEN_COUNT)
    if word(ring + SENT_COUNT) == taken:
        sleeping = word(ring + _RECEIVER_SLEEPS)
        if not _wait(word(ring + _SENT), taken, sleeping, totals, timeout_ns):
            return LATE
        put_word(ring + SENT_COUNT, load_acquire(word(ring + _SENT)))
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
    put_word(ring + TAKEN_COUNT, taken + 1)
    publish(word(ring + _TAKEN), taken + 1, word(ring + _SENDER_SLEEPS))
    return DONE


@compiled(nogil=True)
def _send(t: Tables, transfer: int, half: int, totals: int, timeout_ns: int) -> bool:
    """Write the record of a transfer into its ring; False when there is no room in time."""
    ring = t.rings + 72 * word(transfer + _RING)
    sent, taken = word(ring + SENT_COUNT), word(ring + TAKEN_COUNT)
    if sent - taken == word(ring + _SLOTS):
        sleeping = word(ring + _SENDER_SLEEPS)
        if not _wait(word(ring + _TAKEN), taken, sleeping, totals, timeout_ns):
            return False
        put_word(ring + TAKEN_COUNT, load_acquire(word(ring + _TAKEN)))
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
    put_word(ring + SENT_COUNT, sent + 1)
    publish(word(ring + _SENT), sent + 1, word(ring + _RECEIVER_SLEEPS))
    put_word(totals + _RECORDS, word(totals + _RECORDS) + 1)
    put_word(totals + _BYTES, word(totals + _BYTES) + total)
    return True
