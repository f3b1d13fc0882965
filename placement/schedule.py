"""The static schedule of each actor: what it receives, runs and sends, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from raygraft.placement.costs import BY_DEVICES
from raygraft.placement.devices import ENGINE
from raygraft.placement.plan import Plan, Stage, Transfer

BURST_STEPS = 8
"""Most steps whose results come to the engine together."""


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
    """An actor's turns, of all its devices, in the plan's topological order.

    Its transfers are records: their sources and targets are actors.
    """

    actor: str
    turns: tuple[StageTurn, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Actors it receives from."""
        return tuple(dict.fromkeys(t.source for turn in self.turns for t in turn.receive))

    @property
    def targets(self) -> tuple[str, ...]:
        """Actors it sends to, the engine among them."""
        return tuple(dict.fromkeys(t.target for turn in self.turns for t in turn.send))


def records_of(plan: Plan) -> tuple[Transfer, ...]:
    """The transfers that travel, from actor to actor."""
    actor_of = plan.actor_of
    return tuple(
        replace(t, source=actor_of[t.source], target=actor_of[t.target]) for t in plan.records
    )


def schedule_of(plan: Plan, actor: str) -> Schedule:
    """The schedule of one actor.

    Records between two actors arrive in the order in which they are sent, so a stage takes all
    records up to the ones it needs; those for later stages wait among the actor's values. What its
    own devices give each other is there already.
    """
    stages = [stage for stage in plan.stages if plan.actor_of[stage.device] == actor]
    records = records_of(plan)
    pending = {
        source: [t for t in records if t.target == actor and t.source == source]
        for source in dict.fromkeys(t.source for t in records if t.target == actor)
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
        send = tuple(t for t in records if t.source_stage == stage.number)
        here = {value for t in receive for value in t.values} | {*stage.inputs, *stage.outputs}
        forget = tuple(sorted(v for v in here if last_use.get(v, -1) <= stage.number))
        turns.append(StageTurn(stage, tuple(receive), send, forget))
    return Schedule(actor, tuple(turns))


def most_half_batches(plan: Plan) -> int:
    """How many half-batches keep the busiest actor of a plan at work: more would only queue.

    While it computes one of them, the others are on the other actors: as many as a step's time
    is longer than the busiest actor's share of it, and at most one for each actor. Where GPUs
    write to each other's memory an actor's whole step is one run, which leaves nothing to share.
    """
    if any(transfer.link in BY_DEVICES for transfer in plan.records):
        return 1
    seconds = dict.fromkeys(plan.actor_of.values(), 0.0)
    for use in plan.devices:
        seconds[use.actor] += use.seconds_per_token
    busiest = max(seconds.values())
    used = len(used_actors(plan))
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
    own = [t for t in records_of(plan) if (t.source, t.target) == (source, target)]
    if target == ENGINE:
        return max(1, len(own)) * BURST_STEPS * half_batches
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
    """For each stage, all stages that have surely run before: by data, or earlier in its actor."""
    before: list[set[int]] = []
    latest: dict[str, int] = {}
    produced = {value: stage.number for stage in plan.stages for value in stage.outputs}
    for stage in plan.stages:
        sources = {produced[value] for value in stage.inputs}
        actor = plan.actor_of[stage.device]
        if actor in latest:
            sources.add(latest[actor])
        before.append(sources.union(*(before[source] for source in sources)))
        latest[actor] = stage.number
    return before


def used_devices(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Devices with at least one stage, in the order of their first."""
    return tuple(dict.fromkeys(stage.device for stage in stages))


def used_actors(plan: Plan) -> tuple[str, ...]:
    """Actors with at least one stage, in the order of their first."""
    return tuple(dict.fromkeys(plan.actor_of[name] for name in used_devices(plan.stages)))
