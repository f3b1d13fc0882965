"""How fast this machine's memory can be read: the limit of decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numpy.typing import NDArray
from sides import Measured, Setup

from raygraft.benchmark import Workload

NBYTES = 1 << 30
PASSES = 3


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _sum(words: NDArray[np.int64]) -> int:
    """Compiled to wide loads and adds, several in flight: it waits for memory alone."""
    total = 0
    for index in range(len(words)):
        total += words[index]
    return total


class Reader:
    """Sums a gigabyte, with as many threads as the setup says; `measure` gives seconds a pass."""

    def __init__(self, setups: Sequence[Setup]) -> None:
        self._threads = {setup.name: setup.threads for setup in setups}
        self._words = np.ones(NBYTES // 8, np.int64)
        self._pool = ThreadPoolExecutor(max(self._threads.values()))

    def warm_up(self, setup: str, workload: Workload) -> None:
        self._pass(self._threads[setup])

    def measure(self, setup: str, workload: Workload) -> Measured:
        began = time.perf_counter()
        for _ in range(PASSES):
            self._pass(self._threads[setup])
        return Measured((time.perf_counter() - began) / PASSES)

    def _pass(self, threads: int) -> None:
        total = sum(self._pool.map(_sum, np.array_split(self._words, threads)))
        if total != len(self._words):
            raise AssertionError("a part was not read")

    def close(self) -> None:
        self._pool.shutdown()
