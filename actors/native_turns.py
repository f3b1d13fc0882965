"""Turns of a resident loop without Python: receive, run and send in one compiled call.

A hop of a microsecond is worth little if Python spends thirty on each side of it. Turns whose
runners can run natively (`Runner.native`), and whose records go over rings, are described by tables
of 64-bit numbers; compiled code goes through them. Values lie at fixed addresses, one set for each
half-batch of a round. What it cannot do (a record that is not the expected one) is left to Python,
at the place that was reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raygraft.actors.compiled_turns import (
    ALIGNMENT,
    DONE,
    GO_ON,
    LATE,
    LEFT,
    SENT_COUNT,
    STATE_WORDS,
    TAKEN_COUNT,
    TURN,
    UNEXPECTED,
    Tables,
    run_turns,
)
from raygraft.actors.links import RingReceiver, RingSender
from raygraft.actors.part import ActorPart, Links
from raygraft.actors.records import Array
from raygraft.graph.operators import Value
from raygraft.graph.step import Step
from raygraft.kernels.base import NativeRun, Runner
from raygraft.placement.plan import Transfer
from raygraft.placement.schedule import StageTurn

__all__ = ["DONE", "LATE", "UNEXPECTED", "Half", "NativeTurns"]


@dataclass(frozen=True, slots=True)
class Half:
    """A half-batch as compiled code needs to know it."""

    step: Step | None
    epoch: int
    number: int
    half_batch: int
    values: dict[str, Array]


class NativeTurns:
    """The tables of an actor's turns, and the calls that go through them."""

    def __init__(
        self,
        part: ActorPart,
        turns: Sequence[StageTurn],
        runners: Mapping[int, Sequence[Runner]],
        links: Links,
    ) -> None:
        self._turns = turns
        self._values = part.values
        self._units = {
            number: [(runner, runner.native()) for runner in own] for number, own in runners.items()
        }
        describers = (r for own in self._units.values() for r, native in own if native is not None)
        self._kind = type(next(describers, None))
        self._sampler = self._find_sampler()
        self._links = links
        self._most_rows = part.limits.max_rows
        self.possible = [self._is_possible(turn) for turn in turns]
        self._live = _live_before(turns)
        self._devices = tuple(dict.fromkeys(turn.stage.device for turn in turns))
        self._homes: list[Array] = []
        if any(self.possible):
            self._make_tables()

    def end_of(self, first: int, *, early: bool = False) -> int:
        """The end of the possible turns from `first` on; `first` if there are none.

        What is sampled may have to go out `early`: before another half-batch takes the same turn.
        """
        end = first
        while end < len(self.possible) and self.possible[end]:
            if early and self._samples_of(self._turns[end]):
                break
            end += 1
        return end

    def can_go_on(self, halves: int) -> bool:
        """Whether all turns are possible, of one step after the other.

        Records of several half-batches have to come in the order in which they are taken.
        """
        return self.end_of(0) == len(self._turns) and (halves == 1 or _stage_by_stage(self._turns))

    def begin(self, first: int, last: int, halves: Sequence[Half], steps: int = 1) -> bool:
        """Prepare turns `first:last`; False when records for them are there already.

        With `steps` that follow each other it is all turns, so many times.
        """
        expected = {v for turn in self._turns[first:last] for t in turn.receive for v in t.values}
        if any(not expected.isdisjoint(half.values) for half in halves):
            return False
        self._first, self._last, self._halves = first, last, halves
        while len(self._homes) < len(halves):
            self._homes.append(np.zeros(self._home_bytes, np.uint8))
        rows = np.zeros((len(halves), 7), np.int64)
        for row, half, home in zip(rows, halves, self._homes, strict=False):
            if half.step is None:
                continue
            address = self._describer.describe_step(half.step, steps)
            row[:] = (
                half.step.rows, len(half.step.logit_rows), half.epoch, half.number,
                half.half_batch, home.ctypes.data, address,
            )  # fmt: skip
            for name in self._live[first] & half.values.keys() & self._places.keys():
                self._view(name, home, half.step)[:] = half.values[name]
        self._half_rows = rows
        self._state[:] = 0
        self._totals[:] = 0
        self._state[TURN // 8], self._state[LEFT // 8] = first, steps
        self._state[GO_ON // 8] = self._go_on
        for row, ring in zip(self._rings, self._ring_ends, strict=True):
            row[SENT_COUNT // 8 :] = ring.counts
        return True

    def run(self, timeout: float) -> int:
        """Go on with the prepared turns: DONE, LATE or UNEXPECTED. The GIL is not held."""
        tables = self._tables._replace(halves=int(self._half_rows.ctypes.data))
        turns = self._first, self._last
        return int(run_turns(tables, *turns, len(self._halves), int(timeout * 1e9)))

    def finish(self) -> tuple[int, int]:
        """Hand values and counts back to Python: the turn and the half-batch to go on with."""
        turn, place, phase = (int(n) for n in self._state[:3])
        for row, ring in zip(self._rings, self._ring_ends, strict=True):
            ring.counts = int(row[SENT_COUNT // 8]), int(row[TAKEN_COUNT // 8])
        for number, (half, home) in enumerate(zip(self._halves, self._homes, strict=False)):
            if half.step is None:
                continue
            live = set(self._live[turn + (number < place)])
            if number == place and turn < len(self._turns):
                live.update(v for t in self._turns[turn].receive[:phase] for v in t.values)
            for name in live & self._places.keys():
                half.values[name] = self._view(name, home, half.step)
        return turn, place

    def sampled(self, step: Step | None, steps: int) -> Iterator[dict[str, Array]]:
        """What a step that was run, and those that followed it, sampled if it was their turn."""
        sampled = any(self._samples_of(turn) for turn in self._turns[self._first : self._last])
        if sampled and self._sampler is not None and step is not None:
            yield from (self._sampler.sampled(step, number) for number in range(steps))

    @property
    def totals(self) -> dict[str, tuple[float, float, int, int]]:
        """Of each device, since `begin`: seconds waited and run, records sent and their bytes."""
        rows = zip(self._devices, self._totals.tolist(), strict=True)
        return {
            device: (waited / 1e9, ran / 1e9, records, nbytes)
            for device, (waited, ran, records, nbytes) in rows
        }

    def _is_possible(self, turn: StageTurn) -> bool:
        links = self._links
        names = self._floats_of(turn)
        return (
            all(
                native is not None and type(runner) is self._kind  # which all know their steps
                for runner, native in self._units[turn.stage.number]
            )
            and all(isinstance(links.receivers.get(t.source), RingReceiver) for t in turn.receive)
            and all(isinstance(links.senders.get(t.target), RingSender) for t in self._sent(turn))
            and all(n in self._values and self._values[n].dtype == "float32" for n in names)
        )

    def _make_tables(self) -> None:
        self._ring_ends: list[RingReceiver | RingSender] = []
        self._places: dict[str, int] = {}
        self._free: dict[int, list[int]] = {}
        self._home_bytes = 0
        turns, transfers, tensors, runs, copies = ([] for _ in range(5))  # type: ignore[var-annotated]

        def add_transfers(some: Sequence[Transfer], sending: bool) -> None:
            for transfer in some:
                ends = self._links.senders if sending else self._links.receivers
                end = ends[transfer.target if sending else transfer.source]
                assert isinstance(end, RingSender | RingReceiver)
                if end not in self._ring_ends:
                    self._ring_ends.append(end)
                own = [self._tensor(name) for name in transfer.values]
                place = (self._ring_ends.index(end), transfer.number, len(tensors), len(own))
                transfers.append(place)
                tensors.extend(own)

        used = {v for turn in self._possible_turns() for v in self._floats_of(turn)}
        for number, turn in enumerate(self._turns):
            for name in sorted(self._live[number] & used):
                self._place(name)
            if not self.possible[number]:
                turns.append((0,) * 7)
                self._release(turn)
                continue
            units = self._units[turn.stage.number]
            first, run = len(transfers), len(runs)
            add_transfers(turn.receive, sending=False)
            for runner, native in units:
                assert native is not None
                self._describer = self._sampler or runner
                self._go_on = native.go_on
                runs.append(self._run_row(native, len(copies)))
                copies.extend(self._copy_rows(native))
            send = len(transfers)
            sent = self._sent(turn)
            add_transfers(sent, sending=True)
            totals = 32 * self._devices.index(turn.stage.device)
            turns.append((first, len(turn.receive), run, len(units), send, len(sent), totals))
            self._release(turn)
        self._rings = np.array([(*end.layout, 0, 0) for end in self._ring_ends], np.int64)
        self._rings = self._rings.reshape(-1, 9)
        self._totals = np.zeros((len(self._devices), 4), np.int64)
        self._state = np.zeros(STATE_WORDS, np.int64)
        tables = (turns, transfers, tensors, runs, copies)
        self._arrays = [np.array(table or [0], np.int64) for table in tables]
        self._arrays += [self._rings, np.zeros(1, np.int64), self._totals, self._state]
        self._tables = Tables._make(int(array.ctypes.data) for array in self._arrays)

    def _find_sampler(self) -> Runner | None:
        """The runner that samples, if one of them does."""
        every = (both for own in self._units.values() for both in own)
        return next((runner for runner, native in every if native and native.samples), None)

    def _samples_of(self, turn: StageTurn) -> set[str]:
        """Values that a turn samples: they lie elsewhere, and are sent by Python."""
        units = self._units[turn.stage.number]
        return {name for _, native in units if native is not None for name in native.samples}

    def _floats_of(self, turn: StageTurn) -> set[str]:
        """All other values that a turn receives, reads, makes or sends."""
        return _values_of(turn) - self._samples_of(turn)

    def _sent(self, turn: StageTurn) -> list[Transfer]:
        """What a turn sends beside what it samples."""
        samples = self._samples_of(turn)
        return [transfer for transfer in turn.send if not samples.issuperset(transfer.values)]

    def _place(self, name: str) -> int:
        """Where a value lies in the memory of a half-batch."""
        if name not in self._places:
            width = self._values[name].width
            if self._free.get(width):
                self._places[name] = self._free[width].pop()
            else:
                self._places[name] = self._home_bytes
                self._home_bytes += -(-4 * width * self._most_rows // ALIGNMENT) * ALIGNMENT
        return self._places[name]

    def _release(self, turn: StageTurn) -> None:
        """The places of values that nobody reads after a turn serve later ones."""
        for name in turn.forget:
            if name in self._places:
                self._free.setdefault(self._values[name].width, []).append(self._places[name])

    def _possible_turns(self) -> list[StageTurn]:
        both = zip(self._turns, self.possible, strict=True)
        return [turn for turn, possible in both if possible]

    def _tensor(self, name: str) -> tuple[int, ...]:
        value = self._values[name]
        return (self._place(name), value.width, int(value.rows == "logits"), 0)

    def _run_row(self, native: NativeRun, copy: int) -> tuple[int, ...]:
        return (native.function, native.job, copy, len(native.inputs), len(native.outputs))

    def _copy_rows(self, native: NativeRun) -> list[tuple[int, ...]]:
        both = (*native.inputs.items(), *native.outputs.items())
        return [(*self._tensor(name)[:3], address) for name, address in both]

    def _view(self, name: str, home: Array, step: Step) -> Array:
        value: Value = self._values[name]
        rows = len(step.logit_rows) if value.rows == "logits" else step.rows
        place = self._places[name]
        return home[place : place + 4 * rows * value.width].view(np.float32).reshape(rows, -1)


def _values_of(turn: StageTurn) -> set[str]:
    """All values that a turn receives, reads, makes or sends."""
    sent = {v for t in (*turn.receive, *turn.send) for v in t.values}
    return sent | {*turn.stage.inputs, *turn.stage.outputs}


def _stage_by_stage(turns: Sequence[StageTurn]) -> bool:
    """Whether each turn takes from an actor what one stage of it sends, and takes all of that."""
    pairs = {(t.source, t.source_stage, turn.stage.number) for turn in turns for t in turn.receive}
    sent = {(source, stage) for source, stage, _ in pairs}
    taken = {(source, number) for source, _, number in pairs}
    return len(pairs) == len(sent) == len(taken)


def _live_before(turns: Sequence[StageTurn]) -> list[frozenset[str]]:
    """Values that are there before each turn, and after the last."""
    live: set[str] = set()
    found = [frozenset(live)]
    for turn in turns:
        live |= {v for t in turn.receive for v in t.values} | {*turn.stage.outputs}
        live -= {*turn.forget}
        found.append(frozenset(live))
    return found
