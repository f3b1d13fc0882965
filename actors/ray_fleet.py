"""A fleet of Ray actors, one per device, each pinned to its node."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from raygraft.actors import cluster
from raygraft.actors.fleet import Wires, profile_of
from raygraft.actors.part import Answers, Part, Questions, part_of
from raygraft.actors.ray_actors import RayActors, has_failed
from raygraft.actors.ray_checks import RayChecks
from raygraft.actors.ray_device import raw_tensor
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
from raygraft.graph.errors import (
    DeviceFailedError,
    DeviceLostError,
    LinkError,
    RaygraftError,
)
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.graph import Graph
from raygraft.kernels.base import Description
from raygraft.placement.devices import DeviceProfile, DeviceSpec
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import used_devices

LOAD_SECONDS = 3600.0
"""Longest wait for weights: a large model from a slow disk takes its time."""
STOP_SECONDS = 2.0
END_SECONDS = 20.0
"""How long a device may go on with what it computes before it is taken for hanging."""
CLOCK_TRIPS = 20
"""Round trips that compare two machines' clocks."""
LOSS_SECONDS = 2.0
"""How much later than a broken connection Ray may tell of the actor that died."""


class RayFleet:
    """Devices as actors of the cluster that this process is connected to."""

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        address: str | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Join or start Ray, and start the actors. Raises ClusterError, ConfigurationError."""
        self.specs = tuple(specs)
        self._progress = progress
        progress("joining Ray" if address else "starting Ray")
        self._own_connection = cluster.connect(address)
        self._answers: dict[str, tuple[Any, Questions, Answers]] = {}
        self._withdrawals = Withdrawals()
        self._actors: RayActors
        self._loops: dict[Any, str] = {}
        self._unloaded: set[str] = set()
        """Devices that failed to load their part."""
        self._gone: set[str] = set()
        """Devices that were lost, and neither replaced nor dropped yet."""
        self._used: tuple[str, ...] = ()
        self._parts: Mapping[str, Part] = {}
        self._ahead: dict[str, float] = {}
        self._noticed: Callable[[], None] = lambda: None
        try:
            self._actors = RayActors(specs)
            self.node = self._actors.own_node
            progress(f"starting {len(specs)} device actor{'s' * (len(specs) != 1)}")
            self._actors.start([spec.name for spec in specs])
        except BaseException:
            self.shutdown()
            raise

    def watch(self, noticed: Callable[[], None]) -> None:
        """See `Fleet.watch`."""
        self._noticed = noticed

    def describe(self) -> dict[str, tuple[str, Description]]:
        """See `Fleet.describe`."""
        calls = {name: actor.describe.remote() for name, actor in self._actors.items()}
        said = self._actors.ask(calls)
        return {name: (self._actors.nodes[name].address, said[name]) for name in said}

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
        attempt = RayChecks(
            self._actors, model, self._have_files(model, tuple(self._actors)), deadline
        )
        return verify_devices(profiles, questions, model, attempt, self._withdrawals, progress)

    def _answered(self, questions: Questions) -> tuple[DeviceProfile, ...]:
        """The profiles as the devices answer, verified or not."""
        unasked = [name for name in self._actors if self._remembered(name, questions) is None]
        if unasked:
            self._progress("asking the devices what they can run")
            shared = ray.put(questions)
            calls = {name: self._actors[name].answer.remote(shared) for name in unasked}
            for name, answers in self._actors.ask(calls).items():
                self._answers[name] = (self._actors[name], questions, answers)
        sharers: dict[str, int] = defaultdict(int)
        there = [spec for spec in self.specs if spec.name in self._actors]
        for spec in there:
            sharers[self._actors.nodes[spec.name].id] += spec.memory is None
        return tuple(
            profile_of(
                spec,
                self._answers[spec.name][2],
                node=self._actors.nodes[spec.name].name,
                sharers=sharers[self._actors.nodes[spec.name].id],
            )
            for spec in there
        )

    def _remembered(self, name: str, questions: Questions) -> Answers | None:
        """What this incarnation of a device has answered to these questions."""
        actor, asked, answers = self._answers.get(name, (None, None, None))
        same = actor is self._actors[name] and asked is not None and asked.same_as(questions)
        return answers if same else None

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
        self._progress(f"loading weights on {', '.join(self._used)}")
        parts = {name: part_of(plan, graph, name, epoch) for name in self._used}
        before, self._parts = self._parts, parts
        states = StatesOnTheMove(self._actors, before, parts, pages)
        self._load_parts(parts, model, "load")
        kept = states.arrive()
        wiring = Wiring(self._actors, self._actors.ask, self._blame, self._progress)
        wires = wiring.connect(openings_of(plan, graph, self.node, epoch))
        self._loops = {self._actors[name].run.remote(): name for name in self._used}
        for loop in self._loops:
            loop.future().add_done_callback(lambda _: self._noticed())
        return replace(wires, kept=kept)

    def _load_parts(self, parts: Mapping[str, Part], model: ModelFile, method: str) -> None:
        has = self._have_files(model, tuple(parts))
        missing = {name for part in parts if not has[part] for name in parts[part].tensors}
        weights = MappedWeights(model.files, model.tensors)
        stored = {tensor: ray.put(raw_tensor(weights, tensor)) for tensor in sorted(missing)}
        calls = {}
        for name, part in parts.items():
            own = {} if has[name] else {tensor: stored[tensor] for tensor in part.tensors}
            calls[name] = getattr(self._actors[name], method).remote(
                part, model.files if has[name] else None, own
            )
        try:
            self._actors.ask(calls, LOAD_SECONDS, watched=True)
        except RaygraftError:
            self._unloaded.update(name for name, call in calls.items() if has_failed(call))
            raise

    def _have_files(self, model: ModelFile, names: Sequence[str]) -> dict[str, bool]:
        """Which devices find the model's own files on their machine."""
        files = ray.put(model.files)
        return self._actors.ask(
            {name: self._actors[name].has_files.remote(files) for name in names}
        )

    def check(self) -> None:
        """See `Fleet.check`."""
        if self._loops:
            self._actors.check_answers(self._used)
        errors = self._ends_of_loops()
        deadline = time.monotonic() + LOSS_SECONDS
        # A dead actor makes the links of others fail, sooner than Ray knows; it is the one to name.
        while errors and isinstance(errors[0], LinkError) and time.monotonic() < deadline:
            time.sleep(0.05)
            errors = self._ends_of_loops()
        if errors:
            raise errors[0]

    def _ends_of_loops(self) -> list[RaygraftError]:
        """Why loops have ended, what explains most first."""
        if not self._loops:
            return []
        ended, _ = ray.wait(list(self._loops), num_returns=len(self._loops), timeout=0)
        errors = [self._end_of(self._loops[loop], loop) for loop in ended]
        return sorted(
            errors, key=lambda e: (not isinstance(e, DeviceLostError), isinstance(e, LinkError))
        )

    def end_loops(self, patience: float = END_SECONDS) -> tuple[str, ...]:
        """See `Fleet.end_loops`. Actors that cannot be used any more are killed."""
        loops, self._loops = self._loops, {}
        lost = self._unloaded | self._actors.silent | self._gone
        self._unloaded.clear()
        for name in set(loops.values()) - lost:
            self._actors[name].stop.remote()
        awaited = [loop for loop, name in loops.items() if name not in lost]
        ended, hanging = ray.wait(awaited, num_returns=max(1, len(awaited)), timeout=patience)
        lost.update(loops[loop] for loop in hanging)
        lost.update(loops[loop] for loop in ended if has_failed(loop))
        calls = {n: a.close_links.remote() for n, a in self._actors.items() if n not in lost}
        ray.wait(list(calls.values()), num_returns=max(1, len(calls)), timeout=patience)
        lost.update(name for name, call in calls.items() if has_failed(call))
        self._actors.kill(lost)
        self._gone = lost
        return tuple(sorted(lost))

    def prepare(self, plan: Plan, graph: Graph, model: ModelFile) -> None:
        """See `Fleet.prepare`."""
        used = used_devices(plan.stages)
        self._load_parts({name: part_of(plan, graph, name, 0) for name in used}, model, "prepare")

    def add(self, spec: DeviceSpec) -> None:
        """See `Fleet.add`."""
        if spec.name not in self._actors:
            self._progress(f"starting device {spec.name}")
            self._actors.add(spec)
        if spec.name not in {own.name for own in self.specs}:
            self.specs = (*self.specs, spec)

    def replace(self, name: str) -> bool:
        """See `Fleet.replace`."""
        before = self._actors.nodes[name].name
        self._progress(f"starting device {name} anew")
        self._actors.start_anew(name)
        self._gone.discard(name)
        return self._actors.nodes[name].name == before

    def drop(self, names: Sequence[str]) -> None:
        """See `Fleet.drop`."""
        self._actors.kill(names)
        self._gone.difference_update(names)

    def _blame(self) -> None:
        """A link of the engine broke: wait a little for the device that explains it."""
        deadline = time.monotonic() + LOSS_SECONDS
        while time.monotonic() < deadline:
            self.check()
            time.sleep(0.05)

    def _end_of(self, name: str, loop: Any) -> RaygraftError:
        """Why a loop has ended."""
        try:
            ray.get(loop)
        except RayError as error:
            return self._actors.translated(name, error)
        return DeviceFailedError(f"device {name} left its loop without being told to")

    def counters(self) -> dict[str, Counters]:
        """See `Fleet.counters`."""
        return self._actors.ask({name: self._actors[name].counters.remote() for name in self._used})

    def start_trace(self) -> None:
        """See `Fleet.start_trace`."""
        self._ahead = {name: self._clock_ahead(name) for name in self._used}
        self._actors.ask({name: self._actors[name].start_trace.remote() for name in self._used})

    def recorded(self) -> dict[str, Recorded]:
        """See `Fleet.recorded`."""
        recorded = self._actors.ask(
            {name: self._actors[name].recorded.remote() for name in self._used}
        )
        return {
            name: replace(own, ahead=self._ahead.get(name, 0.0)) for name, own in recorded.items()
        }

    def _clock_ahead(self, name: str) -> float:
        """Seconds that the clock of a device's machine is ahead of this one's.

        Exactly none on this machine; else to half of the shortest of some round trips.
        """
        best, ahead = float("inf"), 0.0
        for _ in range(CLOCK_TRIPS):
            here, began = clock()
            there, said = self._actors.ask({name: self._actors[name].clock.remote()})[name]
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
        if self._loops:
            ray.wait(list(self._loops), num_returns=len(self._loops), timeout=STOP_SECONDS)
        if hasattr(self, "_actors"):  # it could be started
            self._actors.kill(tuple(self._actors))
        self._loops.clear()
        if self._own_connection:
            ray.shutdown()
            self._own_connection = False
