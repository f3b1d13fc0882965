"""A fleet of Ray actors, one per device, each pinned to its node."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raygraft.actors import cluster
from raygraft.actors.fleet import Wires, profile_of, share_of_machine
from raygraft.actors.part import Answers, Questions, part_of
from raygraft.actors.ray_device import RayDevice, raw_tensor
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
    ClusterError,
    ConfigurationError,
    DeviceFailedError,
    DeviceLostError,
    LinkError,
    RaygraftError,
)
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.graph import Graph
from raygraft.kernels.base import BackendOptions, Description
from raygraft.kernels.verification.checks import Check, CheckResult, Outcome
from raygraft.kernels.verification.trial import Trial
from raygraft.placement.devices import DeviceProfile, DeviceSpec
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import used_devices

START_SECONDS = 120.0
"""Longest wait for actors to start and answer."""
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
        self._actors: dict[str, Any] = {}
        self._threads: dict[str, int] = {}
        self._answers: dict[str, tuple[Any, Questions, Answers]] = {}
        self._withdrawals = Withdrawals()
        self._loops: dict[Any, str] = {}
        self._unloaded: set[str] = set()
        """Devices that failed to load their part."""
        self._used: tuple[str, ...] = ()
        self._ahead: dict[str, float] = {}
        try:
            living = cluster.nodes()
            self.node = next(node.name for node in living if node.id == cluster.own_node())
            self._nodes = {s.name: cluster.find_node(s.node, s.name, living) for s in specs}
            progress(f"starting {len(specs)} device actor{'s' * (len(specs) != 1)}")
            self._start()
        except BaseException:
            self.shutdown()
            raise

    def _start(self) -> None:
        for node in {node.id: node for node in self._nodes.values()}.values():
            here = [spec for spec in self.specs if self._nodes[spec.name].id == node.id]
            self._threads |= share_of_machine(here, node.cores)
        self._ask({spec.name: self._start_actor(spec) for spec in self.specs})

    def _start_actor(self, spec: DeviceSpec) -> Any:
        """A new actor, and the call that makes its backend."""
        where = cluster.pinned_to(self._nodes[spec.name])
        actor = RayDevice.options(scheduling_strategy=where)  # type: ignore[attr-defined]
        self._actors[spec.name] = actor.remote(spec.name)
        options = BackendOptions(self._threads[spec.name])
        return self._actors[spec.name].start.remote(spec.backend, options)

    def _restart(self, name: str) -> None:
        """Kill an actor that hangs, and start another in its place, which knows nothing yet."""
        ray.kill(self._actors[name])
        self._ask({name: self._start_actor(next(s for s in self.specs if s.name == name))})

    def describe(self) -> dict[str, tuple[str, Description]]:
        """See `Fleet.describe`."""
        calls = {name: actor.describe.remote() for name, actor in self._actors.items()}
        said = self._ask(calls)
        return {name: (self._nodes[name].address, said[name]) for name in said}

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
        has = self._have_files(model, tuple(self._actors))
        weights = MappedWeights(model.files, model.tensors)

        def attempt(trial: Trial, names: Sequence[str]) -> dict[str, CheckResult]:
            tensors = () if all(has[name] for name in names) else trial.check.tensors
            stored = {tensor: ray.put(raw_tensor(weights, tensor)) for tensor in tensors}
            shared = ray.put(trial)
            calls = {
                name: self._actors[name].check.remote(
                    shared, model.files if has[name] else None, {} if has[name] else stored
                )
                for name in names
            }
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=deadline)
            return {n: self._checked(n, call, trial.check, deadline) for n, call in calls.items()}

        return verify_devices(profiles, questions, model, attempt, self._withdrawals, progress)

    def _checked(self, name: str, call: Any, check: Check, deadline: float) -> CheckResult:
        """The result of a check that was given its time; a device that is stuck starts anew."""
        try:
            result: CheckResult = ray.get(call, timeout=0.1)
            return result
        except GetTimeoutError:
            detail = f"no answer within {deadline:g} s"
        except RayActorError:
            detail = "its process died"
        except RayError as error:
            return check.result(Outcome.FAILED, detail=str(self._translated(name, error)))
        self._restart(name)
        return check.result(Outcome.FAILED, detail=detail)

    def _answered(self, questions: Questions) -> tuple[DeviceProfile, ...]:
        """The profiles as the devices answer, verified or not."""
        unasked = [name for name in self._actors if self._remembered(name, questions) is None]
        if unasked:
            self._progress("asking the devices what they can run")
            shared = ray.put(questions)
            calls = {name: self._actors[name].answer.remote(shared) for name in unasked}
            for name, answers in self._ask(calls).items():
                self._answers[name] = (self._actors[name], questions, answers)
        sharers: dict[str, int] = defaultdict(int)
        there = [spec for spec in self.specs if spec.name in self._actors]
        for spec in there:
            sharers[self._nodes[spec.name].id] += spec.memory is None
        return tuple(
            profile_of(
                spec,
                self._answers[spec.name][2],
                node=self._nodes[spec.name].name,
                sharers=sharers[self._nodes[spec.name].id],
            )
            for spec in there
        )

    def _remembered(self, name: str, questions: Questions) -> Answers | None:
        """What this incarnation of a device has answered to these questions."""
        actor, asked, answers = self._answers.get(name, (None, None, None))
        same = actor is self._actors[name] and asked is not None and asked.same_as(questions)
        return answers if same else None

    def load(self, plan: Plan, graph: Graph, model: ModelFile, epoch: int) -> Wires:
        """See `Fleet.load`."""
        self._used = used_devices(plan.stages)
        self._progress(f"loading weights on {', '.join(self._used)}")
        self._load_parts(plan, graph, model, epoch)
        wiring = Wiring(self._actors, self._ask, self._blame, self._progress)
        wires = wiring.connect(openings_of(plan, graph, self.node))
        self._loops = {self._actors[name].run.remote(): name for name in self._used}
        return wires

    def _load_parts(self, plan: Plan, graph: Graph, model: ModelFile, epoch: int) -> None:
        has = self._have_files(model, self._used)
        parts = {name: part_of(plan, graph, name, epoch) for name in self._used}
        missing = {name for part in self._used if not has[part] for name in parts[part].tensors}
        weights = MappedWeights(model.files, model.tensors)
        stored = {tensor: ray.put(raw_tensor(weights, tensor)) for tensor in sorted(missing)}
        calls = {}
        for name, part in parts.items():
            own = {} if has[name] else {tensor: stored[tensor] for tensor in part.tensors}
            calls[name] = self._actors[name].load.remote(
                part, model.files if has[name] else None, own
            )
        try:
            self._ask(calls, LOAD_SECONDS)
        except RaygraftError:
            self._unloaded.update(name for name, call in calls.items() if self._has_failed(call))
            raise

    def _have_files(self, model: ModelFile, names: Sequence[str]) -> dict[str, bool]:
        """Which devices find the model's own files on their machine."""
        files = ray.put(model.files)
        return self._ask({name: self._actors[name].has_files.remote(files) for name in names})

    def check(self) -> None:
        """See `Fleet.check`."""
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

    def end_loops(self) -> tuple[str, ...]:
        """See `Fleet.end_loops`. Actors that cannot be used any more are killed."""
        loops, self._loops = self._loops, {}
        for name in loops.values():
            self._actors[name].stop.remote()
        ended, hanging = ray.wait(list(loops), num_returns=max(1, len(loops)), timeout=END_SECONDS)
        lost = {loops[loop] for loop in hanging} | self._unloaded
        self._unloaded.clear()
        lost.update(loops[loop] for loop in ended if self._has_failed(loop))
        calls = {n: a.close_links.remote() for n, a in self._actors.items() if n not in lost}
        ray.wait(list(calls.values()), num_returns=max(1, len(calls)), timeout=END_SECONDS)
        lost.update(name for name, call in calls.items() if self._has_failed(call))
        self.drop(tuple(lost))
        return tuple(sorted(lost))

    def _has_failed(self, call: Any) -> bool:
        """Whether a call did not end well, for another reason than a link."""
        try:
            ray.get(call, timeout=0.1)
        except RayTaskError as error:
            return not isinstance(error.cause, LinkError)
        except (RayError, GetTimeoutError):
            return True
        return False

    def replace(self, name: str) -> None:
        """See `Fleet.replace`. It has to be on the node where it was."""
        spec = next(spec for spec in self.specs if spec.name == name)
        before = self._nodes[name]
        try:
            self._nodes[name] = cluster.find_node(spec.node, name, cluster.nodes())
        except ConfigurationError as error:
            raise ClusterError(str(error)) from error
        if self._nodes[name].name != before.name:
            raise ClusterError(f"device {name}: its node {before.address} is gone")
        self._progress(f"starting device {name} anew")
        self._ask({name: self._start_actor(spec)})

    def drop(self, names: Sequence[str]) -> None:
        """See `Fleet.drop`."""
        for name in names:
            if name in self._actors:
                ray.kill(self._actors.pop(name))

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
            return self._translated(name, error)
        return DeviceFailedError(f"device {name} left its loop without being told to")

    def counters(self) -> dict[str, Counters]:
        """See `Fleet.counters`."""
        return self._ask({name: self._actors[name].counters.remote() for name in self._used})

    def start_trace(self) -> None:
        """See `Fleet.start_trace`."""
        self._ahead = {name: self._clock_ahead(name) for name in self._used}
        self._ask({name: self._actors[name].start_trace.remote() for name in self._used})

    def recorded(self) -> dict[str, Recorded]:
        """See `Fleet.recorded`."""
        recorded = self._ask({name: self._actors[name].recorded.remote() for name in self._used})
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
            there, said = self._ask({name: self._actors[name].clock.remote()})[name]
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
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        self._loops.clear()
        if self._own_connection:
            ray.shutdown()
            self._own_connection = False

    def _ask(self, calls: Mapping[str, Any], timeout: float = START_SECONDS) -> dict[str, Any]:
        """The results of one call per device. Raises errors of ours, which name the device."""
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout)
        results = {}
        for name, call in calls.items():
            try:
                results[name] = ray.get(call, timeout=0.1)
            except GetTimeoutError:
                raise ClusterError(
                    f"device {name} on node {self._nodes[name].address} did not answer "
                    f"within {timeout:.0f} s"
                ) from None
            except RayError as error:
                raise self._translated(name, error) from error
        return results

    def _translated(self, name: str, error: RayError) -> RaygraftError:
        """One of our errors for one of Ray's."""
        where = f"device {name} on node {self._nodes[name].address}"
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, RaygraftError):
                return cause
            return DeviceFailedError(f"{where} failed: {type(cause).__name__}: {cause}")
        if isinstance(error, RayActorError):
            return DeviceLostError(f"{where} was lost: its actor died")
        return ClusterError(f"{where}: {error}")
