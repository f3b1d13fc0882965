"""A fixed number of threads that run programs together.

The caller is the first of them. Each of the others lives in one compiled call that holds no GIL: it
waits for the next job as links wait for records (spin, yield, sleep), runs its share, waits again.

All of them enter by one C function: its code, compiled once, is most of what a device's own memory
holds beside weights and cache.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raygraft.kernels.compiled import c_function, compiled
from raygraft.kernels.cpu.instructions import FEW
from raygraft.kernels.cpu.picking import go_on
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
# What a job holds: see `Team.job_of`.
_PROGRAM, _COUNT, _FEW_PROGRAM, _FEW_COUNT, _COUNTERS, _SHARED, _SCRATCH, _THREADS, _THREAD = (
    8 * place for place in range(9)
)
_STOPS = -1
"""In the place of a thread: the one that ends all others."""


@compiled(nogil=True)
def _work(shared: int, scratch: int, thread: int, threads: int) -> None:
    """The first thread starts a job and returns when all shares are done; the others live here."""
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
def _begin(job: int, step: int) -> None:
    """Tell all threads which program of a job suits a step."""
    own = job + _FEW_PROGRAM if word(step + FEW) else job + _PROGRAM
    program, count = word(own), word(own + _COUNT)
    counters, shared = word(job + _COUNTERS), word(job + _SHARED)
    for number in range(count * word(job + _THREADS)):
        put_word(counters + 8 * number, 0)
    put_word(shared + _JOB, program)
    put_word(shared + _JOB + 8, count)
    put_word(shared + _JOB + 16, step)
    put_word(shared + _JOB + 24, counters)


def _take_part(job: int, step: int) -> None:
    """What the thread of a job does: the first one runs it for a step, one caller at a time."""
    shared, threads, thread = word(job + _SHARED), word(job + _THREADS), word(job + _THREAD)
    if thread == _STOPS:
        store_release(shared + _STOP, 1)
        _wake_all(shared, threads)
        return
    if thread == 0:
        _begin(job, step)
    _work(shared, word(job + _SCRATCH), thread, threads)


@functools.cache
def job_function() -> int:
    """Address of the function that runs a job for a step, for callers in C."""
    return c_function(_take_part, "void(int64, int64)")


def _go_on(step: int) -> None:
    go_on(step)


@functools.cache
def go_on_function() -> int:
    """Address of the function that makes a described step the following one."""
    return c_function(_go_on, "void(int64)")


@functools.cache
def _called() -> Callable[[int, int], None]:
    """The same for Python; the GIL is not held."""
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(job_function())


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
        programs = (many.ctypes.data, len(many), few.ctypes.data, len(few))
        return self._job(0, *programs, counters.ctypes.data)

    def run(self, job: NDArray[np.int64], step: NDArray[np.int64]) -> None:
        """Run a job's program for a step on all threads. One caller at a time."""
        _called()(job.ctypes.data, step.ctypes.data)

    @staticmethod
    def prepare() -> None:
        """Compile what every run needs, or load it from the cache (15 s and 0.04 s)."""
        job_function()
        go_on_function()
        multiply_functions()

    def _job(self, thread: int, *words: int) -> NDArray[np.int64]:
        """What a thread enters with. Only the first one has programs and counters."""
        scratch = 0 if thread == _STOPS else self._scratch[thread].ctypes.data
        programs = words or (0,) * 5
        return np.array([*programs, self._shared, scratch, self.threads, thread], np.int64)

    def _start(self) -> None:
        self._started = True
        for number in range(1, self.threads):
            keep = (self._words, self._scratch[number])
            threading.Thread(
                target=_live, args=(self._job(number), keep), name=f"share {number}", daemon=True
            ).start()
        weakref.finalize(self, _live, self._job(_STOPS), self._words)


def _live(job: NDArray[np.int64], keep: object) -> None:
    """Enter as a follower, or to end them; `keep` holds their memory as long."""
    _called()(job.ctypes.data, 0)
