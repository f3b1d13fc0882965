"""An actor's turns, made ready: stages of one device, or of several that are computed as one.

Between two stages of one actor nothing is sent. Where, beside that, their runners can be chained
(both on one GPU), the stages become one turn: what they give each other stays where it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from raygraft.actors.worker import LoadedUnit
from raygraft.kernels.base import Runner
from raygraft.placement.plan import Stage, Transfer
from raygraft.placement.schedule import StageTurn


@dataclass(frozen=True, slots=True)
class Turn:
    """Receive, run, send, forget."""

    stages: tuple[Stage, ...]
    receive: tuple[Transfer, ...]
    runs: tuple[tuple[tuple[str, ...], Runner], ...]
    """Runners in order, each with its inputs."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    send: tuple[Transfer, ...]
    forget: tuple[str, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Whose stages these are."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def regions(self) -> tuple[str, ...]:
        """What is computed."""
        return tuple(region for stage in self.stages for region in stage.regions)


def single_turn(turn: StageTurn, units: Sequence[LoadedUnit]) -> Turn:
    """The turn of one stage."""
    return Turn(
        stages=(turn.stage,),
        receive=turn.receive,
        runs=tuple((unit.subgraph.inputs, unit.runner) for unit in units),
        inputs=turn.stage.inputs,
        outputs=turn.stage.outputs,
        send=turn.send,
        forget=turn.forget,
    )


def chained_turns(
    turns: Sequence[StageTurn], units: Mapping[int, Sequence[LoadedUnit]]
) -> dict[int, tuple[Turn, int]]:
    """Turns of several stages: by the number of the first, with the number after the last."""
    found = {}
    start = 0
    while start < len(turns):
        stop = start + 1
        while stop < len(turns) and _goes_on(turns[stop - 1], turns[stop], units):
            stop += 1
        if stop > start + 1:
            found[start] = (_chained(turns[start:stop], units), stop)
        start = stop
    return found


def _goes_on(
    turn: StageTurn, following: StageTurn, units: Mapping[int, Sequence[LoadedUnit]]
) -> bool:
    """Whether nothing comes between two turns, and all their runners make one chain."""
    if turn.send or following.receive:
        return False
    runners = [unit.runner for t in (turn, following) for unit in units[t.stage.number]]
    return all(runner.leads_to(other) for runner, other in pairwise(runners))


def _chained(turns: Sequence[StageTurn], units: Mapping[int, Sequence[LoadedUnit]]) -> Turn:
    stages = [turn.stage for turn in turns]
    made = dict.fromkeys(name for stage in stages for name in stage.outputs)
    read = dict.fromkeys(name for stage in stages for name in stage.inputs)
    gone = dict.fromkeys(name for turn in turns for name in turn.forget)
    sent = {name for transfer in turns[-1].send for name in transfer.values}
    inputs = tuple(name for name in read if name not in made)
    outputs = tuple(name for name in made if name not in gone or name in sent)
    first, *others = [unit.runner for stage in stages for unit in units[stage.number]]
    return Turn(
        stages=tuple(stages),
        receive=turns[0].receive,
        runs=((inputs, first.chain(others, outputs)),),
        inputs=inputs,
        outputs=outputs,
        send=turns[-1].send,
        forget=tuple(name for name in gone if name not in made or name in sent),
    )
