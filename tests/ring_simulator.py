"""A plan's schedules as coroutines over bounded queues, in an order that the test chooses."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import ring_slots, schedule_of, used_devices

Pair = tuple[str, str]
Action = tuple[str, Pair, Any]
"""("send" or "receive", (source, target), what is sent)."""
Choice = Callable[[Sequence[str]], str]
"""Which of the devices that can go on does so."""


class DeadlockError(AssertionError):
    """Nobody can go on."""


@dataclass
class Simulation:
    """What happened: per pair of devices, the records in the order of sending and receiving."""

    sent: dict[Pair, list[Any]]
    received: dict[Pair, list[Any]]
    waits_for_room: int = 0
    """How often a send found its ring full."""


def simulate(
    plan: Plan, choose: Choice, *, steps: int = 2, slots: Callable[[Pair], int] | None = None
) -> Simulation:
    """Run some steps. Raises DeadlockError, or AssertionError when a device lacks a value."""
    devices = used_devices(plan.stages)
    pairs = dict.fromkeys((transfer.source, transfer.target) for transfer in plan.transfers)
    room = {pair: slots(pair) if slots else ring_slots(plan, *pair) for pair in pairs}
    room |= {(ENGINE, device): steps for device in devices}
    rings: dict[Pair, deque[Any]] = {pair: deque() for pair in room}
    result = Simulation({pair: [] for pair in room}, {pair: [] for pair in room})
    running = {name: _device(plan, name, steps) for name in devices}
    running[ENGINE] = _engine(plan, devices, steps)
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


def _device(plan: Plan, name: str, steps: int) -> Iterator[Action]:
    """What a device's resident loop does, without computing."""
    schedule = schedule_of(plan, name)
    for step in range(steps):
        yield "receive", (ENGINE, name), None
        values: set[str] = set()
        for turn in schedule.turns:
            for transfer in turn.receive:
                record = yield "receive", (transfer.source, name), None
                assert record == (step, transfer.number), f"{name} expected {transfer}"
                assert values.isdisjoint(transfer.values), f"{name} has {transfer.values} already"
                values.update(transfer.values)
            assert values.issuperset(turn.stage.inputs), f"{turn.stage} has only {values}"
            values.update(turn.stage.outputs)
            for transfer in turn.send:
                assert values.issuperset(transfer.values)
                yield "send", (name, transfer.target), (step, transfer.number)
            assert values.issuperset(turn.forget)
            values.difference_update(turn.forget)
        assert not values, f"{name} never forgets {values}"


def _engine(plan: Plan, devices: Sequence[str], steps: int) -> Iterator[Action]:
    for step in range(steps):
        for name in devices:
            yield "send", (ENGINE, name), step
        for transfer in plan.transfers:
            if transfer.target == ENGINE:
                record = yield "receive", (transfer.source, ENGINE), None
                assert record == (step, transfer.number)
