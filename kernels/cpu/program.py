"""A subgraph as a program that threads run together, without Python between its operators.

An instruction is a row of 64-bit numbers: what to do, where its operands lie, and their sizes.
Every thread goes through all instructions and computes its share of each; where an instruction
reads what others wrote, all threads meet first.
"""

from __future__ import annotations

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu import layers
from raygraft.kernels.cpu.matmul import multiply_tiles
from raygraft.kernels.cpu.vector import fetch_add, get_double, word
from raygraft.kernels.waiting import load_acquire, pause, yield_core

(
    LOOK_UP,
    NORM,
    MATMUL,
    ROTATE,
    WRITE_CACHE,
    ATTEND,
    ADD,
    GATE,
    COPY_ROWS,
) = range(9)

# Places of an instruction, in bytes. Its own numbers stand from `OWN` on, the last is a double.
KIND, MEET, LOGIT_SIDE, A, B, C, OUT, WEIGHT = (8 * place for place in range(8))
OWN = 64
FIELDS = 16
BYTES = 8 * FIELDS

_SPINS = 2000
"""Looks at a barrier before the core is offered to somebody else."""


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
def run_share(
    program: int, count: int, step: int, scratch: int, barrier: int, thread: int, threads: int
) -> None:
    """Run one thread's share of the `count` instructions at an address."""
    met = load_acquire(barrier + 128)  # the arrivals before this run
    for number in range(count):
        i = program + BYTES * number
        if word(i + MEET) != 0:
            met = meet(barrier, threads, met)
        rows = word(step + layers.LOGITS) if word(i + LOGIT_SIDE) else word(step + layers.STEP_ROWS)
        _instruction(i, step, rows, scratch, thread, threads)
    meet(barrier, threads, met)


@compiled(nogil=True)
def _instruction(i: int, step: int, rows: int, scratch: int, thread: int, threads: int) -> None:
    kind, a, b, out, weight = (
        word(i + KIND),
        word(i + A),
        word(i + B),
        word(i + OUT),
        word(i + WEIGHT),
    )
    n0, n1, n2 = word(i + OWN), word(i + OWN + 8), word(i + OWN + 16)
    n3, n4 = word(i + OWN + 24), word(i + OWN + 32)
    number = get_double(i + OWN + 56)
    if kind == MATMUL:
        first, last = n3 * thread // threads, n3 * (thread + 1) // threads
        multiply_tiles(n0, weight, n4, first, last, n1, n2, a, rows, out, scratch)
        if b != 0:
            layers.add_bias(out, b, n2, rows, 16 * first, 16 * last)
    elif kind == NORM:
        layers.norm(a, weight, out, n0, number, rows, thread, threads)
    elif kind == ROTATE:
        positions = word(step + layers.POSITIONS)
        layers.rotate(a, out, weight, positions, n0, n1, n2, n3, rows, thread, threads)
    elif kind == WRITE_CACHE:
        layers.write_cache(a, out, n0, n1, n2, step, rows, thread, threads)
    elif kind == ATTEND:
        c = word(i + C)
        layers.attend(
            a, b, c, out, n0, n1, n2, n3, n4, number, step, rows, scratch, thread, threads
        )
    elif kind == ADD:
        layers.sum_of(a, b, out, n0 * rows, thread, threads)
    elif kind == GATE:
        layers.gate(a, b, out, n0 * rows, thread, threads)
    elif kind == COPY_ROWS:
        layers.copy_rows(a, word(step + layers.LOGIT_ROWS), out, n0, rows, thread, threads)
    elif kind == LOOK_UP:
        tokens = word(step + layers.TOKENS)
        layers.look_up(n0, weight, n2, n1, tokens, out, rows, scratch, thread, threads)
