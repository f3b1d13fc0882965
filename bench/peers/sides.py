"""The sides of a comparison, each in a process of its own that stays alive between its turns.

A side loads its models once, then waits on a pipe, asleep, until it is told to measure. So the
sides take turns in one run, with nothing loaded in between and nobody else computing.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from raygraft.benchmark import Workload

KINDS = {
    "raygraft": "ours:Raygraft",
    "llama.cpp": "llama:LlamaCpp",
    "read": "reading:Reader",
}
SETTLE_S = 0.1
"""Between turns: threads that spin for a while after their work have gone to sleep by then."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to load a model; sides know it by its name."""

    name: str
    path: Path
    threads: int
    """Of each device."""
    cut: str | None = None
    """"attention": attention on one device, all else on another; "halves": the layers in two
    parts that read as many bytes each."""
    runtime: str = "ray"
    """Of ours: "ray" or "in-process"."""
    half_batches: int | None = None
    """Of ours: so many in flight, or as many as it finds to pay."""
    context: int = 513
    sequences: int = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """One turn."""

    seconds: float
    busy: Mapping[str, float] = field(default_factory=dict)
    """Device -> seconds that it computed, where the side can tell."""


class Implementation(Protocol):
    """What a side's process runs."""

    def __init__(self, setups: Sequence[Setup]) -> None: ...

    def warm_up(self, setup: str, workload: Workload) -> None:
        """Once before the turns of a workload."""
        ...

    def measure(self, setup: str, workload: Workload) -> Measured: ...

    def close(self) -> None: ...


class Side:
    """A process that holds one implementation's models."""

    def __init__(self, kind: str, setups: Sequence[Setup]) -> None:
        """Start it, and wait until all is loaded."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, setups))
        self._process.start()
        theirs.close()
        self.kind = kind
        self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()

    def warm_up(self, setup: str, workload: Workload) -> None:
        self._connection.send(("warm_up", setup, workload))
        self._receive()

    def measure(self, setup: str, workload: Workload) -> Measured:
        time.sleep(SETTLE_S)
        self._connection.send(("measure", setup, workload))
        measured: Measured = self._receive()
        return measured

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise SystemExit(f"the {self.kind} side ended; see above") from None
        return answer


def _serve(connection: Connection, kind: str, setups: Sequence[Setup]) -> None:
    """The side's process: answers until the other end of the pipe is closed."""
    module, _, name = KINDS[kind].partition(":")
    implementation: Implementation = getattr(import_module(module), name)(setups)
    try:
        connection.send(None)
        while True:
            method, setup, workload = connection.recv()
            connection.send(getattr(implementation, method)(setup, workload))
    except (EOFError, KeyboardInterrupt):
        pass
    finally:
        implementation.close()


@dataclass(frozen=True, slots=True)
class Entrant:
    """Who takes part in the turns of a workload."""

    side: Side
    setup: str
    workload: Workload


def take_turns(entrants: Mapping[str, Entrant], turns: int) -> dict[str, list[Measured]]:
    """All measure `turns` times, one after the other; every second time in reverse order."""
    for entrant in entrants.values():
        entrant.side.warm_up(entrant.setup, entrant.workload)
    found: dict[str, list[Measured]] = {name: [] for name in entrants}
    for turn in range(turns):
        order = list(entrants.items())
        for name, entrant in order if turn % 2 == 0 else reversed(order):
            found[name].append(entrant.side.measure(entrant.setup, entrant.workload))
    return found
