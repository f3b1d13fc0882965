"""A fixed number of threads that run programs together.

The caller is the first of them. Each of the others lives in one compiled call that holds no GIL: it
waits for the next job as links wait for records (spin, yield, sleep), runs its share, waits again.
"""

from __future__ import annotations

import functools
import threading
import weakref

import numpy as np
from numba import types
from numpy.typing import NDArray

from raygraft.kernels.compiled import c_function, compiled
from raygraft.kernels.cpu.instructions import FEW
from raygraft.kernels.cpu.products import multiply_functions
from raygraft.kernels.cpu.program import run_share
from raygraft.kernels.raw import put_word, word
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


@compiled(nogil=True)
def run_job(job: int, step: int) -> None:
    """Run the program of a job (see `Team.job_of`) that suits a step. One caller at a time."""
    own = job + 16 if word(step + FEW) else job
    program, count = word(own), word(own + 8)
    counters, shared = word(job + 32), word(job + 40)
    for number in range(count * word(job + 56)):
        put_word(counters + 8 * number, 0)
    put_word(shared + _JOB, program)
    put_word(shared + _JOB + 8, count)
    put_word(shared + _JOB + 16, step)
    put_word(shared + _JOB + 24, counters)
    _work(shared, word(job + 48), 0, word(job + 56))


@functools.cache
def job_function() -> int:
    """Address of `run_job` for callers in C."""
    return c_function(_run_job, "void(int64, int64)")


def _run_job(job: int, step: int) -> None:
    run_job(job, step)


class Team:
    """The threads of one device. They end with the object."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        lines = 6 + threads
        self._words = np.zeros((lines + 1) * _LINE // 8, np.int64)
        address = self._words.ctypes.data
        self._shared = -(-address // _LINE) * _LINE
        self._scratch: list[NDArray[np.uint8]] = []
        self._kept: list[NDArray[np.int64]] = []
        self._started = False
        self._finish = weakref.finalize(self, _stop, self._words, self._shared, threads)

    def reserve(self, scratch_bytes: int) -> None:
        """Make sure that each thread has so much memory of its own. Before the first run."""
        assert not self._started
        if not self._scratch or len(self._scratch[0]) < scratch_bytes:
            self._scratch = [np.empty(scratch_bytes, np.uint8) for _ in range(self.threads)]

    def job_of(self, many: NDArray[np.int64], few: NDArray[np.int64]) -> NDArray[np.int64]:
        """What `run` takes: two programs `[instructions, fields]`, and what they run with."""
        if not self._started:
            self._start()
        counters = np.zeros(max(len(many), len(few), 1) * self.threads, np.int64)
        self._kept += [many, few, counters]
        scratch = self._scratch[0].ctypes.data
        programs = (many.ctypes.data, len(many), few.ctypes.data, len(few))
        return np.array(
            [*programs, counters.ctypes.data, self._shared, scratch, self.threads], np.int64
        )

    def run(self, job: NDArray[np.int64], step: NDArray[np.int64]) -> None:
        """Run a job's program for a step on all threads. One caller at a time."""
        run_job(job.ctypes.data, step.ctypes.data)

    @staticmethod
    def prepare() -> None:
        """Compile what every run needs, or load it from the cache (20 s and 0.4 s)."""
        _work.compile(types.void(*[types.int64] * 4))  # type: ignore[attr-defined]
        run_job.compile(types.void(types.int64, types.int64))  # type: ignore[attr-defined]
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
