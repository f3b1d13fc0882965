"""Running a program: all threads go through its instructions, without Python between them.

Products and long attentions are dealt out in pieces, so that a thread that lost its core holds up
the others by one piece; other work is divided evenly. Where an instruction reads what others wrote,
all threads meet first.
"""

from __future__ import annotations

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu import instructions as at
from raygraft.kernels.cpu import layers
from raygraft.kernels.cpu.attention import attend
from raygraft.kernels.cpu.cache import KV_HEADS, write_cache
from raygraft.kernels.cpu.matmul import prepare, product_tiles
from raygraft.kernels.cpu.picking import go_on, pick
from raygraft.kernels.cpu.products import WIDEN
from raygraft.kernels.cpu.vector import get_double
from raygraft.kernels.raw import fetch_add, put_word, word
from raygraft.kernels.waiting import load_acquire, pause, yield_core

_SPINS = 100
"""Looks at a barrier (some 20 ns each) before the core is offered to somebody else: the thread that
is waited for may be queued for the same core."""
_PIECES = 8
"""Pieces that each thread gets of a product, if all are equally fast."""


@compiled(nogil=True)
def meet(barrier: int, threads: int, seen: int) -> int:
    """Wait for all threads. `barrier` counts arrivals, `seen` those before this meeting."""
    goal = seen + threads
    if threads > 1:
        fetch_add(barrier, 1)
        spins = 0
        while load_acquire(barrier) < goal:
            spins += 1
            if spins < _SPINS:
                pause()
            else:
                yield_core()
    return goal


@compiled(nogil=True)
def run_share(job: int, scratch: int, barrier: int, thread: int, threads: int) -> None:
    """Run one thread's share of a job: the addresses of a program, a step and counters.

    The counters are an int64 for each instruction and thread, zero at first: what was dealt out.
    """
    program, count, step, counters = word(job), word(job + 8), word(job + 16), word(job + 24)
    met = load_acquire(barrier + 128)  # the arrivals before this run
    for left in range(word(step + at.STEPS), 0, -1):
        for number in range(count):
            i = program + 8 * at.FIELDS * number
            if word(i + at.MEET) != 0:
                met = meet(barrier, threads, met)
            rows = word(step + at.LOGITS) if word(i + at.LOGIT_SIDE) else word(step + at.STEP_ROWS)
            if rows > 0:  # the head has none while a prompt is read in chunks
                own = counters + 8 * threads * number
                if word(i + at.KIND) < at.LOOK_THROUGH:
                    _instruction(i, step, rows, own, scratch, thread, threads)
                else:
                    pick(i, step, rows, scratch, thread, threads)
        met = meet(barrier, threads, met)
        if left > 1:
            if thread == 0:
                go_on(step)
                for number in range(count * threads):
                    put_word(counters + 8 * number, 0)
            met = meet(barrier, threads, met)


@compiled(nogil=True)
def _instruction(
    i: int, step: int, rows: int, counters: int, scratch: int, thread: int, threads: int
) -> None:
    kind = word(i + at.KIND)
    a = word(i + at.A) + word(i + at.A_STEP) * thread
    b = word(i + at.B)
    out = word(i + at.OUT) + word(i + at.OUT_STEP) * thread
    weight = word(i + at.FIRST + at.WEIGHT)
    n0, n1, n2, n3, n4 = (
        word(i + at.OWN),
        word(i + at.OWN + 8),
        word(i + at.OWN + 16),
        word(i + at.OWN + 24),
        word(i + at.OWN + 32),
    )
    # Work that each thread does for itself is not divided.
    first, by = (0, 1) if word(i + at.OUT_STEP) != 0 else (thread, threads)
    if kind == at.MATMUL:
        _product(i, a, rows, out, counters, scratch, thread, threads)
    elif kind == at.NORM:
        layers.norm(a, weight, out, n0, get_double(i + at.NUMBER), first, rows, by)
    elif kind == at.ROTATE:
        positions = word(step + at.POSITIONS)
        own = n0 // n4  # heads of an item
        for item in range(first, rows * n4, by):
            row, unit = item // n4, item % n4
            for head in range(unit * own, (unit + 1) * own):
                layers.rotate(a, out, weight, positions, n0, n1, n2, n3, row, head)
    elif kind == at.WRITE_CACHE:
        write_cache(i, step, a, first, rows * word(i + KV_HEADS), by)
    elif kind == at.ATTEND:
        _attention(i, step, a, out, counters, scratch, thread, threads)
    elif kind in (at.ADD, at.GATE):
        count = n0 * rows
        begin, end = count * thread // threads, count * (thread + 1) // threads
        if kind == at.ADD:
            layers.sum_of(a, b, out, begin, end)
        else:
            layers.gate(a, b, out, begin, end)
    elif kind == at.COPY_ROWS:
        layers.copy_rows(a, word(step + at.LOGIT_ROWS), out, n0, first, rows, by)
    elif kind == at.LOOK_UP:
        widen = word(word(i + at.FIRST + at.FUNCTIONS) + 8 * WIDEN)
        tile_bytes, tokens = word(i + at.FIRST + at.TILE_BYTES), word(step + at.TOKENS)
        layers.look_up(widen, weight, tile_bytes, n0, tokens, out, scratch, first, rows, by)


@compiled(nogil=True)
def _product(
    i: int, a: int, rows: int, out: int, counters: int, scratch: int, thread: int, threads: int
) -> None:
    """Each thread goes through its own run of tiles, as memory is read fastest in order; one that
    has finished helps the next."""
    tiles = word(i + at.TILES)
    prepare(i, a, rows, scratch)
    piece = max(1, tiles // (_PIECES * threads))
    for helped in range(threads):
        owner = (thread + helped) % threads
        begin, end = tiles * owner // threads, tiles * (owner + 1) // threads
        first = begin + fetch_add(counters + 8 * owner, piece)
        while first < end:
            product_tiles(i, first, min(first + piece, end), a, rows, out, scratch)
            first = begin + fetch_add(counters + 8 * owner, piece)


@compiled(nogil=True)
def _attention(
    i: int, step: int, a: int, out: int, counter: int, scratch: int, thread: int, threads: int
) -> None:
    items = word(step + at.RUN_COUNT) * word(i + KV_HEADS)
    if word(i + at.BY_UNITS) != 0:
        attend(i, step, a, out, scratch, thread, items, threads)
        return
    item = fetch_add(counter, 1)
    while item < items:
        attend(i, step, a, out, scratch, item, item + 1, threads)
        item = fetch_add(counter, 1)
