"""The static schedule of each device: what it receives, runs and sends, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Plan, Stage, Transfer


@dataclass(frozen=True, slots=True)
class StageTurn:
    """One stage's turn in a step: receive, run, send, forget."""

    stage: Stage
    receive: tuple[Transfer, ...]
    send: tuple[Transfer, ...]
    forget: tuple[str, ...]
    """Values whose last use this was."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A device's turns, in the plan's topological order."""

    device: str
    turns: tuple[StageTurn, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Devices it receives from."""
        return tuple(dict.fromkeys(t.source for turn in self.turns for t in turn.receive))

    @property
    def targets(self) -> tuple[str, ...]:
        """Devices it sends to, the engine among them."""
        return tuple(dict.fromkeys(t.target for turn in self.turns for t in turn.send))


def schedule_of(plan: Plan, device: str) -> Schedule:
    """The schedule of one device.

    Records between two devices arrive in the order in which they are sent, so a stage takes all
    records up to the ones it needs; those for later stages wait among the device's values.
    """
    stages = [stage for stage in plan.stages if stage.device == device]
    pending = {
        source: [t for t in plan.transfers if t.target == device and t.source == source]
        for source in dict.fromkeys(t.source for t in plan.transfers if t.target == device)
    }
    last_use = {value: stage.number for stage in stages for value in stage.inputs}
    turns = []
    for stage in stages:
        receive: list[Transfer] = []
        for queue in pending.values():
            needed = [i for i, t in enumerate(queue) if set(t.values) & set(stage.inputs)]
            if needed:
                receive += queue[: needed[-1] + 1]
                del queue[: needed[-1] + 1]
        receive.sort(key=lambda transfer: transfer.number)
        send = tuple(t for t in plan.transfers if t.source_stage == stage.number)
        here = {value for t in receive for value in t.values} | {*stage.inputs, *stage.outputs}
        forget = tuple(sorted(v for v in here if last_use.get(v, -1) <= stage.number))
        turns.append(StageTurn(stage, tuple(receive), send, forget))
    return Schedule(device, tuple(turns))


def most_half_batches(plan: Plan) -> int:
    """How many half-batches keep the busiest device of a plan at work: more would only queue.

    While it computes one of them, the others are on the other devices: as many as a step's time
    is longer than the busiest device's share of it, and at most one for each device.
    """
    busiest = max(use.seconds_per_token for use in plan.devices)
    used = len(used_devices(plan.stages))
    return max(1, min(used, ceil(plan.seconds_per_token / busiest))) if busiest else used


def control_slots(half_batches: int) -> int:
    """Slots for step headers so that none waits for room.

    The first half-batch of a round may be back before a device takes the headers of the others,
    and then those of the next round follow.
    """
    return 2 * half_batches


def ring_slots(plan: Plan, source: str, target: str, half_batches: int = 1) -> int:
    """Slots that a ring needs so that no send ever waits for room.

    A record has surely been taken when something the sending stage depends on ran after it was
    received. What is left is the most records of a step that can be on their way at once; waiting
    for room instead could close a circle of waits. Each half-batch in flight is a step.
    """
    own = [t for t in plan.transfers if (t.source, t.target) == (source, target)]
    if target == ENGINE:
        return max(1, len(own)) * half_batches
    taken_at = {
        t.number: turn.stage.number
        for turn in schedule_of(plan, target).turns
        for t in turn.receive
        if t.source == source
    }
    before = _stages_before(plan)
    most = 0
    for position, transfer in enumerate(own):
        known = before[transfer.source_stage]
        taken = sum(taken_at[earlier.number] in known for earlier in own[:position])
        most = max(most, position + 1 - taken)
    return most * half_batches


def _stages_before(plan: Plan) -> list[set[int]]:
    """For each stage, all stages that have surely run before: by data, or earlier on its device."""
    before: list[set[int]] = []
    latest: dict[str, int] = {}
    produced = {value: stage.number for stage in plan.stages for value in stage.outputs}
    for stage in plan.stages:
        sources = {produced[value] for value in stage.inputs}
        if stage.device in latest:
            sources.add(latest[stage.device])
        before.append(sources.union(*(before[source] for source in sources)))
        latest[stage.device] = stage.number
    return before


def used_devices(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Devices with at least one stage, in the order of their first."""
    return tuple(dict.fromkeys(stage.device for stage in stages))
