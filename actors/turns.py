"""An actor's turns, made ready: stages of one device, or of several that are computed as one.

Between two stages of one actor nothing is sent. Where, beside that, their runners can be chained
(both on one GPU), the stages become one turn: what they give each other stays where it is. Records
that another device writes to this one's memory, or this one to another's, are links of such a
chain: then it goes on over stages of others in between, and nobody waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from raygraft.actors.part import Links
from raygraft.actors.worker import LoadedUnit
from raygraft.graph.operators import Value
from raygraft.kernels.base import Runner
from raygraft.placement.plan import Stage, Transfer
from raygraft.placement.schedule import StageTurn

Units = Mapping[int, Sequence[LoadedUnit]]
"""By stage number."""


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
    direct: bool = False
    """Whether its runners themselves take records from other devices, or write to them."""
    written: tuple[tuple[str, Transfer], ...] = ()
    """What they write, each with the device that it is of."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Whose stages these are."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def alone(self) -> bool:
        """Whether it is one run that needs nothing but a step."""
        return not (self.receive or self.inputs) and len(self.runs) == 1

    @property
    def regions(self) -> tuple[str, ...]:
        """What is computed."""
        return tuple(region for stage in self.stages for region in stage.regions)


class Turns:
    """The turns of an actor's schedule, by their numbers."""

    def __init__(
        self,
        turns: Sequence[StageTurn],
        units: Units,
        links: Links,
        values: Mapping[str, Value],
    ) -> None:
        """`values` are all that the turns receive, make and send, by name."""
        self._chaining = _Chaining(units, links, values)
        self._single = [_single(turn, units[turn.stage.number]) for turn in turns]
        self._chained: dict[int, tuple[Turn, int]] = {}
        self._needed: set[int] = set()
        """Chains that cannot be taken apart: some of their records never reach the host."""
        for start, stop in self._chaining.runs_of(turns):
            own = turns[start:stop]
            direct = any(map(self._chaining.direct, own))
            if direct or stop > start + 1:
                self._chained[start] = (self._chaining.chain(own), stop)
            if direct:
                self._needed.add(start)

    def __len__(self) -> int:
        return len(self._single)

    def at(self, number: int, *, apart: bool) -> tuple[Turn, int]:
        """The turn to take, and the number of the next; stages `apart` where that can be."""
        if number in self._chained and (not apart or number in self._needed):
            return self._chained[number]
        return self._single[number], number + 1

    def single(self, number: int) -> Turn:
        """The turn of one stage."""
        return self._single[number]


@dataclass(frozen=True, slots=True)
class _Chaining:
    """How turns follow each other: by what runners they have, and which links."""

    units: Units
    links: Links
    values: Mapping[str, Value]

    def runs_of(self, turns: Sequence[StageTurn]) -> Iterator[tuple[int, int]]:
        """First and end of each longest run of turns that can be one."""
        start = 0
        for number in range(1, len(turns) + 1):
            if number == len(turns) or not self._goes_on(turns[number - 1], turns[number]):
                yield start, number
                start = number

    def direct(self, turn: StageTurn) -> bool:
        """Whether a record of a turn goes from device to device."""
        transfers = (*turn.receive, *turn.send)
        return self._by_host(transfers) != transfers

    def _goes_on(self, turn: StageTurn, following: StageTurn) -> bool:
        """Whether the host has nothing to do between two turns, and all runners make one chain."""
        if self._by_host(turn.send) or self._by_host(following.receive):
            return False
        runners = [unit.runner for t in (turn, following) for unit in self.units[t.stage.number]]
        return all(runner.leads_to(other) for runner, other in pairwise(runners))

    def _by_host(self, transfers: Sequence[Transfer]) -> tuple[Transfer, ...]:
        """Those of transfers to or from this actor that take no ring of devices."""
        taken, put = self.links.rings_in, self.links.rings_out
        return tuple(t for t in transfers if t.source not in taken and t.target not in put)

    def chain(self, turns: Sequence[StageTurn]) -> Turn:
        """One turn for several that go on."""
        stages = [turn.stage for turn in turns]
        rings_in, rings_out = self.links.rings_in, self.links.rings_out
        runners: list[Runner] = []
        written: list[tuple[str, Transfer]] = []
        made: dict[str, None] = {}
        read: dict[str, None] = {}
        for turn in turns:
            own = self.units[turn.stage.number]
            for transfer in turn.receive:
                if transfer.source in rings_in:
                    runners.append(rings_in[transfer.source].runner(self._values_of(transfer)))
                    made |= dict.fromkeys(transfer.values)
            runners += [unit.runner for unit in own]
            read |= dict.fromkeys(turn.stage.inputs)
            made |= dict.fromkeys(turn.stage.outputs)
            for transfer in turn.send:
                if transfer.target in rings_out:
                    runners.append(rings_out[transfer.target].runner(self._values_of(transfer)))
                    written.append((turn.stage.device, transfer))
        send = self._by_host(turns[-1].send)
        gone = dict.fromkeys(name for turn in turns for name in turn.forget)
        sent = {name for transfer in send for name in transfer.values}
        inputs = tuple(name for name in read if name not in made)
        outputs = tuple(name for name in made if name not in gone or name in sent)
        return Turn(
            stages=tuple(stages),
            receive=self._by_host(turns[0].receive),
            runs=((inputs, runners[0].chain(runners[1:], outputs)),),
            inputs=inputs,
            outputs=outputs,
            send=send,
            forget=tuple(name for name in gone if name not in made or name in sent),
            direct=any(map(self.direct, turns)),
            written=tuple(written),
        )

    def _values_of(self, transfer: Transfer) -> tuple[Value, ...]:
        return tuple(self.values[name] for name in transfer.values)


def _single(turn: StageTurn, units: Sequence[LoadedUnit]) -> Turn:
    return Turn(
        stages=(turn.stage,),
        receive=turn.receive,
        runs=tuple((unit.subgraph.inputs, unit.runner) for unit in units),
        inputs=turn.stage.inputs,
        outputs=turn.stage.outputs,
        send=turn.send,
        forget=turn.forget,
    )
