"""A fixed number of threads that run programs together.

The caller is the first of them. Each of the others lives in one compiled call that holds no GIL: it
waits for the next job as links wait for records (spin, yield, sleep), runs its share, waits again.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
from numba import types
from numpy.typing import NDArray

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu.products import multiply_functions
from raygraft.kernels.cpu.program import run_share
from raygraft.kernels.waiting import (
    SPIN_NS,
    YIELD_NS,
    load_acquire,
    publish,
    store_release,
    wait_for_change,
)

_LINE = 128
# Offsets of the shared words, each on a line of its own.
_GENERATION, _BARRIER, _BARRIER_BEGAN, _STOP, _JOB, _SLEEPING = (_LINE * n for n in range(6))
_NAP_NS = 1_000_000_000


@compiled(nogil=True)
def _work(shared: int, scratch: int, thread: int, threads: int) -> None:
    """The first thread starts a job and returns when all shares are done; the others live here.

    One function for both, as compiling what they call takes its time.
    """
    if thread == 0:
        store_release(shared + _BARRIER_BEGAN, load_acquire(shared + _BARRIER))
        _wake_all(shared, threads)
    seen = 0
    sleeping = shared + _SLEEPING + _LINE * thread
    while load_acquire(shared + _STOP) == 0:
        if thread == 0 or load_acquire(shared + _GENERATION) != seen:
            seen = load_acquire(shared + _GENERATION)
            run_share(shared + _JOB, scratch, shared + _BARRIER, thread, threads)
            if thread == 0:
                return
        wait_for_change(shared + _GENERATION, seen, sleeping, _NAP_NS, SPIN_NS, YIELD_NS)


@compiled(nogil=True)
def _wake_all(shared: int, threads: int) -> None:
    generation = load_acquire(shared + _GENERATION) + 1
    for thread in range(1, threads):
        publish(shared + _GENERATION, generation, shared + _SLEEPING + _LINE * thread)


class Team:
    """The threads of one device. They end with the object."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        lines = 6 + threads
        self._words = np.zeros((lines + 1) * _LINE // 8, np.int64)
        address = self._words.ctypes.data
        self._shared = -(-address // _LINE) * _LINE
        self._job = self._words[(self._shared + _JOB - address) // 8 :]
        self._scratch: list[NDArray[np.uint8]] = []
        self._counters = np.zeros(0, np.int64)
        self._started = False
        self._finish = weakref.finalize(self, _stop, self._words, self._shared, threads)

    def reserve(self, scratch_bytes: int) -> None:
        """Make sure that each thread has so much memory of its own. Before the first run."""
        assert not self._started
        if not self._scratch or len(self._scratch[0]) < scratch_bytes:
            self._scratch = [np.empty(scratch_bytes, np.uint8) for _ in range(self.threads)]

    def run(self, program: NDArray[np.int64], step: NDArray[np.int64]) -> None:
        """Run a program `[instructions, fields]` on all threads. One caller at a time."""
        if not self._started:
            self._start()
        self._job[0] = program.ctypes.data
        self._job[1] = len(program)
        self._job[2] = step.ctypes.data
        if len(self._counters) < len(program):
            self._counters = np.zeros(len(program), np.int64)
        self._counters[: len(program)] = 0
        self._job[3] = self._counters.ctypes.data
        _work(self._shared, self._scratch[0].ctypes.data, 0, self.threads)

    @staticmethod
    def prepare() -> None:
        """Compile what every run needs, or load it from the cache (20 s and 0.4 s)."""
        _work.compile(types.void(*[types.int64] * 4))  # type: ignore[attr-defined]
        multiply_functions()

    def _start(self) -> None:
        self._started = True
        for number in range(1, self.threads):
            arguments = (self._shared, self._scratch[number].ctypes.data, number, self.threads)
            keep = (self._words, self._scratch[number])
            threading.Thread(
                target=_live, args=(arguments, keep), name=f"share {number}", daemon=True
            ).start()


def _live(arguments: tuple[int, int, int, int], keep: object) -> None:
    """Run a follower; `keep` holds its memory as long as it lives."""
    _work(*arguments)


def _stop(words: NDArray[np.int64], shared: int, threads: int) -> None:
    """Let the followers return. `words` holds the memory until then."""
    _stop_all(shared, threads)


@compiled(nogil=True)
def _stop_all(shared: int, threads: int) -> None:
    store_release(shared + _STOP, 1)
    _wake_all(shared, threads)
