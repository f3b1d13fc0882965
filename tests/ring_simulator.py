"""A plan's schedules as coroutines over bounded queues, in an order that the test chooses."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raygraft.actors.ahead import MOST_IN_FLIGHT
from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Plan, Transfer
from raygraft.placement.schedule import (
    StageTurn,
    control_slots,
    records_of,
    ring_slots,
    schedule_of,
    used_actors,
)

Pair = tuple[str, str]
Action = tuple[str, Pair, Any]
"""("send" or "receive", (source, target), what is sent). Both are actors, or the engine."""
Choice = Callable[[Sequence[str]], str]
"""Which of the actors that can go on does so."""
Rounds = Sequence[Sequence[bool]]
"""For each round its half-batches: whether they have rows."""


class DeadlockError(AssertionError):
    """Nobody can go on."""


@dataclass
class Simulation:
    """What happened: per pair of actors, the records in the order of sending and receiving."""

    sent: dict[Pair, list[Any]]
    received: dict[Pair, list[Any]]
    waits_for_room: int = 0
    """How often a send found its ring full."""


def simulate(
    plan: Plan,
    choose: Choice,
    *,
    rounds: Rounds = ((True,), (True,)),
    slots: Callable[[Pair], int] | None = None,
    ahead: bool = False,
) -> Simulation:
    """Run some rounds, each sent while the last one is in flight if `ahead`.

    Raises DeadlockError, or AssertionError when an actor lacks a value.
    """
    most = max(map(len, rounds))
    actors = used_actors(plan)
    pairs = dict.fromkeys((transfer.source, transfer.target) for transfer in records_of(plan))
    room = {pair: slots(pair) if slots else ring_slots(plan, *pair, most) for pair in pairs}
    room |= {(ENGINE, actor): control_slots(most) for actor in actors}
    rings: dict[Pair, deque[Any]] = {pair: deque() for pair in room}
    result = Simulation({pair: [] for pair in room}, {pair: [] for pair in room})
    running = {name: _actor(plan, name, rounds) for name in actors}
    running[ENGINE] = _engine(plan, actors, rounds, MOST_IN_FLIGHT if ahead else 1)
    pending = {name: next(actor) for name, actor in running.items()}

    def can_go_on(name: str) -> bool:
        kind, pair, _ = pending[name]
        return bool(rings[pair]) if kind == "receive" else len(rings[pair]) < room[pair]

    while pending:
        ready = [name for name in pending if can_go_on(name)]
        result.waits_for_room += sum(
            pending[name][0] == "send" for name in pending.keys() - set(ready)
        )
        if not ready:
            raise DeadlockError(f"all wait: {pending}, rings {rings}")
        name = choose(ready)
        kind, pair, record = pending[name]
        if kind == "send":
            rings[pair].append(record)
            result.sent[pair].append(record)
        else:
            record = rings[pair].popleft()
            result.received[pair].append(record)
        try:
            pending[name] = running[name].send(record)
        except StopIteration:
            del pending[name]
    assert not any(rings.values())
    return result


def _actor(plan: Plan, name: str, rounds: Rounds) -> Iterator[Action]:
    """What an actor's resident loop does, without computing."""
    schedule = schedule_of(plan, name)
    values: dict[int, set[str]] = {}
    for halves in rounds:
        steps: list[tuple[int, bool]] = []
        for turn in schedule.turns:
            for index in range(len(halves)):
                if len(steps) == index:
                    steps.append((yield "receive", (ENGINE, name), None))
                    values.setdefault(steps[-1][0], set())
                step, has_rows = steps[index]
                if has_rows:
                    yield from _turn(turn, name, step, values)
        for step, _ in steps:
            left = values.pop(step)
            assert not left, f"{name} never forgets {left}"


def _turn(
    turn: StageTurn, name: str, step: int, values: dict[int, set[str]]
) -> Generator[Action, Any, None]:
    """A half-batch's turn; records of others that come before the wanted ones are put aside."""
    own = values[step]
    for transfer in turn.receive:
        while transfer.values[0] not in own:
            found, number, names = yield "receive", (transfer.source, name), None
            assert found != step or number == transfer.number, f"{name} expected {transfer}"
            assert values.setdefault(found, set()).isdisjoint(names), f"{name} has {names} already"
            values[found].update(names)
    assert own.issuperset(turn.stage.inputs), f"{turn.stage} has only {own}"
    own.update(turn.stage.outputs)
    for transfer in turn.send:
        assert own.issuperset(transfer.values)
        yield "send", (name, transfer.target), (step, transfer.number, transfer.values)
    assert own.issuperset(turn.forget)
    own.difference_update(turn.forget)


def _engine(
    plan: Plan, actors: Sequence[str], rounds: Rounds, in_flight_of_one: int
) -> Iterator[Action]:
    """Headers in turn, each as soon as the half-batch's last result is back, or the one before."""
    (result,) = (transfer for transfer in records_of(plan) if transfer.target == ENGINE)
    in_flight: deque[tuple[int, int]] = deque()
    step = 0
    for halves in rounds:
        for index, has_rows in enumerate(halves):
            while sum(other == index for _, other in in_flight) == in_flight_of_one:
                yield from _result(result, in_flight)
            for name in actors:
                yield "send", (ENGINE, name), (step, has_rows)
            if has_rows:
                in_flight.append((step, index))
            step += 1
    while in_flight:
        yield from _result(result, in_flight)


def _result(transfer: Transfer, in_flight: deque[tuple[int, int]]) -> Generator[Action, Any, None]:
    step, number, _ = yield "receive", (transfer.source, ENGINE), None
    assert (step, number) == (in_flight.popleft()[0], transfer.number)
