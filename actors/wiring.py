"""Wiring a plan: every link is opened at its receiving end, then handed to who sends into it.

Between nodes, a pair of actors that cannot reach each other directly falls back to Ray's own ways
(the `object` link): that is slow, but it works wherever Ray does, and it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from raygraft.actors.ends import ActorEnd, End, Opening, link_name, open_ring, open_tcp
from raygraft.actors.fleet import Wires
from raygraft.actors.links import PulledReceiver, Receiver, Sender, new_secret
from raygraft.actors.links.object import await_reply
from raygraft.actors.part import control_bytes, transfer_bytes
from raygraft.actors.records import Record
from raygraft.graph.errors import LinkError, LinkFullError
from raygraft.graph.graph import Graph
from raygraft.placement.costs import NCCL, PINNED, link_between
from raygraft.placement.devices import ENGINE, Place
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import (
    control_slots,
    most_half_batches,
    records_of,
    ring_slots,
    used_actors,
)

_THROUGH = {
    PINNED: "memory of the host",
    "ring": "the host's processes",
    "tcp": "the hosts' processes",
}
Pair = tuple[str, str]
"""Which actor sends, and which receives; one of them may be the engine."""
Ask = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Actor -> call; actor -> result."""


def openings_of(plan: Plan, graph: Graph, engine_node: str, epoch: int) -> dict[Pair, Opening]:
    """All links of a plan, with a secret of its own for each that leaves a node."""
    half_batches = most_half_batches(plan)
    size = (control_slots(half_batches), control_bytes(plan.limits, plan.block_size))
    places = {use.actor: Place(use.node, use.actor) for use in plan.devices}
    here = Place(engine_node, ENGINE)
    openings = {
        (ENGINE, name): Opening(link_between(here, places[name]), *size, epoch)
        for name in used_actors(plan)
    }
    records = records_of(plan)
    for pair in dict.fromkeys((t.source, t.target) for t in records):
        own = [t for t in records if (t.source, t.target) == pair]
        nbytes = max(transfer_bytes(t, graph, plan.limits) for t in own)
        openings[pair] = Opening(own[0].link, ring_slots(plan, *pair, half_batches), nbytes, epoch)
    return {
        pair: replace(opening, secret=new_secret()) if opening.link in ("tcp", NCCL) else opening
        for pair, opening in openings.items()
    }


class EngineEnd:
    """A link's end that the engine holds. When it breaks, `blame` may name the device that died."""

    def __init__(self, end: Any, blame: Callable[[], None]) -> None:
        self._end = end
        self._blame = blame
        self.close = end.close

    def send(self, record: Record, timeout: float) -> None:
        try:
            self._end.send(record, timeout)
        except LinkFullError:
            raise
        except LinkError:
            self._blame()
            raise

    def receive(self, timeout: float) -> Record | None:
        try:
            record: Record | None = self._end.receive(timeout)
        except LinkError:
            self._blame()
            raise
        return record


class Wiring:
    """Connects the actors of a plan with each other and with the engine."""

    def __init__(
        self,
        actors: Mapping[str, Any],
        ask: Ask,
        blame: Callable[[], None],
        progress: Callable[[str], None],
    ) -> None:
        self._actors = actors
        self._ask = ask
        self._blame = blame
        self._progress = progress
        self._control: dict[str, Sender] = {}
        self._results: Receiver

    def connect(self, openings: Mapping[Pair, Opening]) -> Wires:
        """Make all links; the engine's own ends of them. Raises LinkError."""
        while unreached := self._join(openings):
            openings = {pair: openings[pair].instead for pair in unreached}
            for pair, reason in unreached.items():
                through = _THROUGH.get(openings[pair].link, "Ray")
                self._progress(f"{reason}; its records go through {through}, which takes longer")
        control = {name: EngineEnd(end, self._blame) for name, end in self._control.items()}
        return Wires(control, EngineEnd(self._results, self._blame))

    def _join(self, openings: Mapping[Pair, Opening]) -> dict[Pair, str]:
        """Open and connect links; those that could not be, and why."""
        ends = self._open(openings)
        unreached: dict[Pair, str] = {}
        calls = {
            actor: self._actors[actor].connect.remote(
                {target: end for (source, target), end in ends.items() if source == actor}
            )
            for actor in dict.fromkeys(source for source, _ in ends if source != ENGINE)
        }
        for actor, reasons in self._ask(calls).items():
            unreached |= {(actor, target): reason for target, reason in reasons.items()}
        for (source, target), end in ends.items():
            if source == ENGINE and end is not None:
                try:
                    self._control[target] = end.sender(link_name(ENGINE, target))
                except LinkError as error:
                    unreached[source, target] = str(error)
        return unreached

    def _open(self, openings: Mapping[Pair, Opening]) -> dict[Pair, End | None]:
        """Open receiving ends. None stands for the outbox of an actor that the engine asks."""
        ends: dict[Pair, End | None] = {}
        calls = {
            actor: self._actors[actor].open_links.remote(
                {source: o for (source, target), o in openings.items() if target == actor}
            )
            for actor in dict.fromkeys(target for _, target in openings if target != ENGINE)
        }
        for (source, target), opening in openings.items():
            if target == ENGINE:  # while the actors open theirs
                self._results, ends[source, target] = self._open_results(source, opening)
        for target, opened in self._ask(calls).items():
            for source, end in opened.items():
                handle = ActorEnd(self._actors[target], openings[source, target].epoch)
                ends[source, target] = end or handle
        return ends

    def _open_results(self, source: str, opening: Opening) -> tuple[Receiver, End | None]:
        name = link_name(source, ENGINE)
        if opening.link == "ring":
            return open_ring(opening, name)
        if opening.link == "tcp":
            return open_tcp(opening, name)
        take = partial(self._actors[source].take.remote, opening.epoch)
        return PulledReceiver(name, take, await_reply(name)), None
