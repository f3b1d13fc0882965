"""The folder of compiled code: one process of a machine compiles at a time, within a bound.

Actors that start together need the same code, and compiling it takes many seconds. The first one
that misses something takes the turn, a lock on a file; the others wait, and load what it made.

Beyond `RAYGRAFT_COMPILED_BYTES` (512 MiB unless set) the entries that were unused longest go first.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from numba.core.compiler_lock import global_compiler_lock

from raygraft.kernels.cache_folder import cache_path
from raygraft.kernels.interrupts import held_back

T = TypeVar("T")

COMPILING = "compiling kernels, once per machine"
"""What is said while this process compiles, or waits for another that does."""
_LARGEST = 512 * 2**20
_SUFFIXES = (".compiled", ".o")
_OUTDATED = 3600.0
"""Seconds after which a file that nobody finished is removed."""
_PATIENCE = 600.0
"""Seconds after which a process that compiles is taken for stuck, and no longer waited for."""


def cache_folder() -> Path:
    """The folder that holds compiled functions; `RAYGRAFT_CACHE_DIR` moves it."""
    return cache_path() / "compiled"


class _Turn:
    """This process's turn to compile. Only the thread that holds Numba's own lock touches it."""

    def __init__(self) -> None:
        self.doing = ""
        self._depth = 0
        self._taken = False
        self._lock: FileLock | None = None

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Within the outermost scope a turn is kept, once it was taken."""
        with held_back(), global_compiler_lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and self._taken:
                    self._end()

    def take(self) -> None:
        """Wait until no other process compiles. Without a lock it goes on at once."""
        if self._taken:
            return
        self._taken, self.doing = True, COMPILING
        folder = cache_folder()
        # What cannot be locked, or not in time, costs compiling twice, nothing else.
        with contextlib.suppress(OSError, NotImplementedError):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=_PATIENCE, poll_interval=0.01)  # its Timeout is an OSError

    def _end(self) -> None:
        self._taken, self.doing = False, ""
        lock, self._lock = self._lock, None
        with contextlib.suppress(OSError):
            keep_within_bound(cache_folder())
        if lock is not None:
            lock.release()


_turn = _Turn()
compiling = _turn.scope
"""A context in which things are looked up and, where they are missing, compiled."""


def found_or_missed(look: Callable[[], T | None]) -> T | None:
    """What `look` finds, maybe after another process has made it; None: it is to be made now.

    To be called within `compiling()`, at whose end the others may look.
    """
    found = look()
    if found is None:
        _turn.take()
        found = look()
    return found


def doing() -> str:
    """What this process is about that takes long, for people; empty when it is nothing."""
    return _turn.doing


def used(path: Path) -> None:
    """Note that an entry was used now: that decides which goes first."""
    with contextlib.suppress(OSError):
        os.utime(path)


def keep_within_bound(folder: Path) -> None:
    """Remove what was unused longest, drafts that nobody finished, and folders that are empty."""
    limit = int(os.environ.get("RAYGRAFT_COMPILED_BYTES", _LARGEST))
    found = []
    for file in [*folder.iterdir(), *folder.glob("*/*")]:
        with contextlib.suppress(OSError):  # another process was faster, or a folder is not empty
            status = file.stat()
            outdated = time.time() - status.st_mtime > _OUTDATED
            if file.is_dir():
                if outdated:
                    file.rmdir()
            elif file.suffix in _SUFFIXES:
                found.append((status.st_mtime, status.st_size, file))
            elif outdated and file.name != ".lock":
                file.unlink()
    held = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if held <= limit:
            break
        file.unlink(missing_ok=True)
        held -= size
