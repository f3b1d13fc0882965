"""Threads of clients that ask an engine again and again, until they are stopped."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

GIVE_UP_SECONDS = 120.0
"""How long a request may take to end after it was said that it is the last."""


class Clients:
    """Each calls `ask` with its number and its own random numbers, and again when that returns."""

    def __init__(self, count: int, ask: Callable[[int, random.Random], None], seed: int) -> None:
        self._ask, self._seed = ask, seed
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[str]:
        """Let every client finish the request that it has; complaints about those that do not."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(GIVE_UP_SECONDS)
        return ["a request has not ended" for thread in self._threads if thread.is_alive()]

    def _run(self, number: int) -> None:
        draw = random.Random(self._seed + number)
        while not self._stopping.is_set():
            self._ask(number, draw)
