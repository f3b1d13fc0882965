"""A fleet of Ray actors, each pinned to its node; each holds one device, or those that share it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from raygraft.actors import cluster
from raygraft.actors.fleet import Wires
from raygraft.actors.journeys import Journeys
from raygraft.actors.part import ActorPart, Answers, Questions
from raygraft.actors.ray_actors import RayActors
from raygraft.actors.ray_checks import RayChecks
from raygraft.actors.ray_loops import END_SECONDS, RayLoops
from raygraft.actors.ray_weights import PlanLoader, have_files
from raygraft.actors.sharing import core_left, named, profiles_of
from raygraft.actors.states import StatesOnTheMove
from raygraft.actors.trace import Recorded, clock
from raygraft.actors.verification import (
    DEADLINE,
    Progress,
    Results,
    Withdrawals,
    verify_devices,
)
from raygraft.actors.wiring import Wiring, openings_of
from raygraft.actors.worker import Counters
from raygraft.graph.errors import DeviceLostError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.kernels.base import Description
from raygraft.placement.devices import DeviceProfile, DeviceSpec
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import used_devices

CLOCK_TRIPS = 20
"""Round trips that compare two machines' clocks."""


class RayFleet:
    """Devices in actors of the cluster that this process is connected to."""

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        address: str | None = None,
        progress: Callable[[str], None] = lambda _: None,
        spares: int = 0,
    ) -> None:
        """Join or start Ray, and start the actors. Raises ClusterError, ConfigurationError.

        On each node so many `spares` stand by to take the place of actors.
        """
        self._progress = progress
        progress("joining Ray" if address else "starting Ray")
        self._own_connection = cluster.connect(address)
        self._answers: dict[str, tuple[Any, Questions, Answers]] = {}
        self._withdrawals = Withdrawals()
        self._actors: RayActors
        self._loops: RayLoops
        self._unloaded: set[str] = set()
        """Actors that failed to load their part."""
        self._gone: set[str] = set()
        """Devices that were lost, and neither replaced nor dropped yet."""
        self._used: tuple[str, ...] = ()
        self._parts: Mapping[str, ActorPart] = {}
        self._prepared: PlanLoader | None = None
        """For the plan that comes next."""
        self._ahead: dict[str, float] = {}
        try:
            self._actors = RayActors(specs, spares, progress)
            self._loops = RayLoops(self._actors)
            self.node = self._actors.own_node
            progress(f"starting {len(specs)} device{'s' * (len(specs) != 1)}")
            self._actors.start([spec.name for spec in specs])
        except BaseException:
            self.shutdown()
            raise

    def watch(self, noticed: Callable[[], None]) -> None:
        """See `Fleet.watch`."""
        self._loops.noticed = noticed

    def describe(self) -> dict[str, tuple[str, Description]]:
        """See `Fleet.describe`."""
        said = self._ask_all("describe", self._actors)
        return {name: (self._actors.nodes[name].address, said[name]) for name in self._there}

    def profiles(self, questions: Questions) -> tuple[DeviceProfile, ...]:
        """See `Fleet.profiles`. Answers are remembered as long as the actor lives."""
        return tuple(map(self._withdrawals.applied, self._answered(questions)))

    def verify(
        self,
        questions: Questions,
        model: ModelFile,
        deadline: float = DEADLINE,
        progress: Progress = lambda _: None,
    ) -> Results:
        """See `Fleet.verify`."""
        profiles = self._answered(questions)
        has = have_files(self._actors, model, self._actors)
        attempt = RayChecks(self._actors, model, has, deadline)
        return verify_devices(profiles, questions, model, attempt, self._withdrawals, progress)

    @property
    def _there(self) -> list[str]:
        """The devices that can be asked."""
        return self._actors.devices

    def _ask_all(self, method: str, actors: Sequence[str] | RayActors) -> dict[str, Any]:
        """Device -> what its actor says of it."""
        there = [actor for actor in actors if actor in self._actors]
        said = self._actors.ask({a: getattr(self._actors[a], method).remote() for a in there})
        return {name: found for of_actor in said.values() for name, found in of_actor.items()}

    def _answered(self, questions: Questions) -> tuple[DeviceProfile, ...]:
        """The profiles as the devices answer, verified or not."""
        actors = self._actors
        unasked: dict[str, list[str]] = {}
        for name in self._there:
            if self._remembered(name, questions) is None:
                unasked.setdefault(actors.actor_of[name], []).append(name)
        if unasked:
            self._progress("asking the devices what they can run")
            shared = ray.put(questions)
            calls = {a: actors[a].answer.remote(names, shared) for a, names in unasked.items()}
            for actor, answers in actors.ask(calls).items():
                for name, own in answers.items():
                    self._answers[name] = (actors[actor], questions, own)
        return profiles_of(
            [actors.specs[name] for name in self._there],
            {name: self._answers[name][2] for name in self._there},
            {name: actors.nodes[name].name for name in self._there},
            actors.actor_of,
        )

    def _remembered(self, name: str, questions: Questions) -> Answers | None:
        """What this incarnation of a device has answered to these questions."""
        actor, asked, answers = self._answers.get(name, (None, None, None))
        here = actor is self._actors[self._actors.actor_of[name]]
        return answers if here and asked is not None and asked.same_as(questions) else None

    def load(
        self,
        plan: Plan,
        graph: Graph,
        model: ModelFile,
        epoch: int,
        pages: Sequence[int] | None = None,
    ) -> Wires:
        """See `Fleet.load`."""
        self._used = used_devices(plan.stages)
        if lost := self._gone.intersection(self._used):
            raise DeviceLostError(f"{named(sorted(lost))} was lost")
        self._progress(f"loading weights on {', '.join(self._used)}")
        loader, self._prepared = self._prepared, None
        if loader is None or not loader.brings(plan, graph):
            loader = PlanLoader(self._actors, plan, graph, model)
        parts = loader.parts(epoch)
        before, self._parts = self._parts, parts
        journeys = Journeys.between(before, parts, pages)
        states = StatesOnTheMove(self._actors, journeys, pages)
        stayed = loader.load(epoch, journeys.staying, self._unloaded)
        kept = states.arrive() and stayed
        wiring = Wiring(self._actors, self._actors.ask, self._loops.blame, self._progress)
        wires = wiring.connect(openings_of(plan, graph, self.node, epoch))
        self._loops.start(tuple(parts))
        self._actors.spares.refill_soon(self._actors.nodes, self._actors.specs)
        own = {name: spec.threads or 1 for name, spec in self._actors.specs.items()}
        here = [use for use in plan.devices if use.node == self.node]
        return replace(
            wires, kept=kept, copy_seconds=states.seconds, copied_bytes=states.nbytes,
            core_left=core_left(here, own, os.cpu_count() or 1),
        )  # fmt: skip

    def check(self) -> None:
        """See `Fleet.check`."""
        self._loops.check()

    def end_loops(self, patience: float = END_SECONDS) -> tuple[str, ...]:
        """See `Fleet.end_loops`. Actors that cannot be used any more are killed."""
        lost = self._loops.end(self._unloaded | self._actors.silent, patience)
        self._unloaded.clear()
        self._gone |= {name for actor in lost for name in self._actors.devices_of(actor)}
        self._actors.kill(lost)
        return tuple(sorted(self._gone))

    def prepare(self, plan: Plan, graph: Graph, model: ModelFile) -> None:
        """See `Fleet.prepare`."""
        self._prepared = None
        loader = PlanLoader(self._actors, plan, graph, model)
        loader.prepare(self._unloaded)
        self._prepared = loader

    def add(self, spec: DeviceSpec) -> None:
        """See `Fleet.add`."""
        if spec.name not in self._there:
            self._progress(f"starting device {spec.name}")
            self._start(spec.name, lambda: self._actors.add(spec))

    def replace(self, name: str) -> bool:
        """See `Fleet.replace`."""
        before = self._actors.nodes[name].name
        if name not in self._there:
            self._progress(f"starting device {name} anew")
            self._start(name, lambda: self._actors.start_anew(name))
        return self._actors.nodes[name].name == before

    def _start(self, name: str, start: Callable[[], None]) -> None:
        """Start a device; when its actor dies of it, others that live there die as well."""
        others = set(self._there)
        try:
            start()
        except DeviceLostError:
            self._gone |= others.difference(self._there, (name,))
            raise
        self._gone.discard(name)

    def drop(self, names: Sequence[str]) -> None:
        """See `Fleet.drop`."""
        self._actors.remove(names)
        self._gone.difference_update(names)

    def counters(self) -> dict[str, Counters]:
        """See `Fleet.counters`."""
        used, actors = self._used, tuple(self._parts)
        said = self._ask_all("counters", actors)
        return {name: said[name] for name in used if name in said}  # a move may be under way

    def start_trace(self) -> None:
        """See `Fleet.start_trace`."""
        actors = {name: self._actors.actor_of[name] for name in self._used}
        ahead = {actor: self._clock_ahead(actor) for actor in dict.fromkeys(actors.values())}
        self._ahead = {name: ahead[actor] for name, actor in actors.items()}
        self._actors.ask({actor: self._actors[actor].start_trace.remote() for actor in ahead})

    def recorded(self) -> dict[str, Recorded]:
        """See `Fleet.recorded`."""
        said = self._ask_all("recorded", tuple(self._parts))
        return {name: replace(said[name], ahead=self._ahead.get(name, 0.0)) for name in self._used}

    def _clock_ahead(self, actor: str) -> float:
        """Seconds that the clock of an actor's machine is ahead of this one's.

        Exactly none on this machine; else to half of the shortest of some round trips.
        """
        best, ahead = float("inf"), 0.0
        for _ in range(CLOCK_TRIPS):
            here, began = clock()
            there, said = self._actors.ask({actor: self._actors[actor].clock.remote()})[actor]
            if here and here == there:
                return 0.0
            trip = clock()[1] - began
            if trip < best:
                best, ahead = trip, said - began - trip / 2
        return ahead

    def shutdown(self) -> None:
        """See `Fleet.shutdown`."""
        if not ray.is_initialized():
            return
        if hasattr(self, "_loops"):  # they could be started
            self._actors.spares.close()
            self._loops.await_ends()
            self._actors.kill(tuple(self._actors))
        if self._own_connection:
            ray.shutdown()
            self._own_connection = False
