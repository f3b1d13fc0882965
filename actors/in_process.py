"""A fleet of threads in this process: for tests, for trials, and for declared plans."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from raygraft.actors.fleet import Wires
from raygraft.actors.host import Host
from raygraft.actors.journeys import NOTHING_STAYS, Journeys
from raygraft.actors.links import Receiver, Sender, local_link
from raygraft.actors.part import ActorPart, Links, Questions, actor_part_of, transfer_bytes
from raygraft.actors.sharing import actors_of, core_left, profiles_of, threads_of
from raygraft.actors.trace import Recorded
from raygraft.actors.verification import (
    DEADLINE,
    Progress,
    Results,
    Withdrawals,
    verify_devices,
)
from raygraft.actors.worker import Counters, DeviceWorker
from raygraft.graph.errors import (
    CapacityError,
    ConfigurationError,
    DeviceFailedError,
    LinkError,
)
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.graph import Graph
from raygraft.graph.tensors import WeightSource
from raygraft.kernels.base import Description
from raygraft.kernels.verification.checks import CheckResult, Outcome
from raygraft.kernels.verification.trial import Trial
from raygraft.placement.costs import BY_DEVICES
from raygraft.placement.devices import ENGINE, DeviceProfile, DeviceSpec
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import (
    control_slots,
    most_half_batches,
    records_of,
    ring_slots,
    used_actors,
    used_devices,
)

JOIN_SECONDS = 5.0


class InProcessFleet:
    """Each actor is a thread; records are copied from queue to queue."""

    node = ""

    def __init__(self, specs: Sequence[DeviceSpec], *, asked: bool = True) -> None:
        """Raises ConfigurationError."""
        self._asked = asked
        self._withdrawals = Withdrawals()
        self._hosts: dict[str, Host] = {}
        """By actor; those that were lost are gone."""
        self._specs: dict[str, DeviceSpec] = {}
        self._place(specs)
        for node in dict.fromkeys(map(self._node_of, specs)):
            here = [spec for spec in specs if self._node_of(spec) == node]
            threads = threads_of(here, self._actor_of, os.cpu_count() or 1)
            for spec in here:
                self._specs[spec.name] = spec.with_threads(threads[spec.name])
        for spec in specs:
            self._start(spec.name)
        self._threads: dict[str, threading.Thread] = {}
        """By actor."""
        self._failures: dict[str, Exception] = {}
        """By actor."""
        self._noticed: Callable[[], None] = lambda: None
        self._used: tuple[str, ...] = ()
        self._parts: Mapping[str, ActorPart] = {}

    def _place(self, specs: Sequence[DeviceSpec]) -> None:
        """Know more devices, and in which actors they live."""
        every = self._specs | {spec.name: spec for spec in specs}
        nodes = {name: self._node_of(spec) for name, spec in every.items()}
        self._actor_of = actors_of(tuple(every.values()), nodes)
        self._specs = every

    def _start(self, name: str) -> None:
        """Make a device's backend, in its actor. Raises ConfigurationError."""
        self._hosts.setdefault(self._actor_of[name], Host()).add(self._specs[name])

    @property
    def _workers(self) -> dict[str, DeviceWorker]:
        """All devices that are there, in their order."""
        there = {name: worker for host in self._hosts.values() for name, worker in host.items()}
        return {name: there[name] for name in self._specs if name in there}

    def describe(self) -> dict[str, tuple[str, Description]]:
        """See `Fleet.describe`."""
        return {name: (self.node, worker.describe()) for name, worker in self._workers.items()}

    def profiles(self, questions: Questions) -> tuple[DeviceProfile, ...]:
        """See `Fleet.profiles`."""
        return tuple(map(self._withdrawals.applied, self._answered(questions)))

    def verify(
        self,
        questions: Questions,
        model: ModelFile,
        deadline: float = DEADLINE,
        progress: Progress = lambda _: None,
    ) -> Results:
        """See `Fleet.verify`. A device that ends its process ends this one."""
        weights = MappedWeights(model.files, model.tensors)

        def attempt(trial: Trial, names: Sequence[str]) -> Mapping[str, CheckResult]:
            return {name: self._check(name, trial, weights, deadline) for name in names}

        profiles = self._answered(questions)
        return verify_devices(profiles, questions, model, attempt, self._withdrawals, progress)

    def _check(
        self, name: str, trial: Trial, weights: WeightSource, deadline: float
    ) -> CheckResult:
        """One check, in a thread that is left behind when it hangs."""
        worker, results = self._workers[name], list[CheckResult]()

        def run() -> None:
            with suppress(SystemExit):
                results.append(worker.check(trial, weights))

        thread = threading.Thread(target=run, name=f"check of {name}", daemon=True)
        thread.start()
        thread.join(deadline)
        if results:
            return results[0]
        self._start(name)
        detail = f"no answer within {deadline:g} s" if thread.is_alive() else "its thread ended"
        return trial.check.result(Outcome.FAILED, detail=detail)

    def _answered(self, questions: Questions) -> tuple[DeviceProfile, ...]:
        """The profiles as the devices answer, verified or not."""
        workers = self._workers
        specs = [self._specs[name] for name in workers]
        return profiles_of(
            specs,
            {name: worker.answer(questions) for name, worker in workers.items()},
            {spec.name: self._node_of(spec) for spec in specs},
            self._actor_of,
            asked=self._asked,
        )

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
        actors = used_actors(plan)
        parts = {name: actor_part_of(plan, graph, name, epoch) for name in actors}
        before, self._parts = self._parts, parts
        weights = MappedWeights(model.files, model.tensors)
        copied, seconds = self._load(parts, before, weights, pages)
        control, results, links = self._connect(plan, graph)
        for name in actors:
            thread = threading.Thread(
                target=self._run, args=(name, links[name]), name=f"actor {name}", daemon=True
            )
            thread.start()
            self._threads[name] = thread
        own = {name: spec.threads or 1 for name, spec in self._specs.items()}
        left = core_left(plan.devices, own, os.cpu_count() or 1)
        return Wires(control, results, copied is not None, seconds, copied or 0, left)

    def _load(
        self,
        parts: Mapping[str, ActorPart],
        before: Mapping[str, ActorPart],
        weights: WeightSource,
        pages: Sequence[int] | None,
    ) -> tuple[int | None, float]:
        """Load parts; bytes copied from cache to cache, None if not all was kept, and seconds."""
        began = time.monotonic()
        journeys, held = Journeys.between(before, parts, pages), pages or ()
        left = [
            exported
            for name, states in journeys.leaving.items()
            if name in self._hosts
            for exported in self._hosts[name].export_states(states, held)
        ]
        seconds = time.monotonic() - began
        stayed = pages is not None
        for name, part in parts.items():
            staying = journeys.staying.get(name, NOTHING_STAYS)
            try:
                stayed &= self._hosts[name].load(part, weights, staying)
            except (DeviceFailedError, CapacityError) as error:
                self._failures[name] = error
                raise
        began = time.monotonic()
        arriving = journeys.arriving.items()
        copied = [self._hosts[name].import_states(own, held, left) for name, own in arriving]
        seconds += time.monotonic() - began
        return sum(n or 0 for n in copied) if stayed and None not in copied else None, seconds

    def _connect(
        self, plan: Plan, graph: Graph
    ) -> tuple[dict[str, Sender], Receiver, dict[str, Links]]:
        """The engine's ends of all links, and those of each actor."""
        actors, half_batches = used_actors(plan), most_half_batches(plan)
        control: dict[str, Sender] = {}
        links: dict[str, Links] = {}
        for name in actors:
            control[name], header = local_link(control_slots(half_batches), f"{ENGINE} to {name}")
            links[name] = Links(header, {}, {}, {}, {})
        records = records_of(plan)
        for source, target in dict.fromkeys((t.source, t.target) for t in records):
            own = [t for t in records if (t.source, t.target) == (source, target)]
            slots = ring_slots(plan, source, target, half_batches)
            if own[0].link in BY_DEVICES:
                most = max(transfer_bytes(t, graph, plan.limits) for t in own)
                ring, opened = self._hosts[target].open_ring(slots, most, own[0].link)
                with suppress(LinkError):
                    links[source].rings_out[target] = self._hosts[source].join_ring(opened)
                    links[target].rings_in[source] = ring
                    continue
                ring.close()
            sender, receiver = local_link(slots, f"{source} to {target}")
            links[source].senders[target] = sender
            if target == ENGINE:
                results = receiver
            else:
                links[target].receivers[source] = receiver
        return control, results, links

    def check(self) -> None:
        """See `Fleet.check`."""
        for failure in sorted(self._failures.values(), key=_comes_from_another):
            raise failure

    def watch(self, noticed: Callable[[], None]) -> None:
        """See `Fleet.watch`."""
        self._noticed = noticed

    def end_loops(self, patience: float = JOIN_SECONDS) -> tuple[str, ...]:
        """See `Fleet.end_loops`."""
        for name in self._threads:
            self._hosts[name].stop()
        for thread in self._threads.values():
            thread.join(patience)
        hang = [name for name, thread in self._threads.items() if thread.is_alive()]
        failed = [n for n, error in self._failures.items() if not _comes_from_another(error)]
        self._threads.clear()
        self._failures.clear()
        gone = [self._hosts.pop(actor) for actor in dict.fromkeys((*failed, *hang))]
        return tuple(name for host in gone for name in host)

    def prepare(self, plan: Plan, graph: Graph, model: ModelFile) -> None:
        """See `Fleet.prepare`. A device is in a thread: it loads when it is switched."""

    def add(self, spec: DeviceSpec) -> None:
        """See `Fleet.add`."""
        if spec.name not in self._specs:
            self._place([spec.with_threads(1)])
            self._start(spec.name)
        else:
            self.replace(spec.name)

    def replace(self, name: str) -> bool:
        """See `Fleet.replace`."""
        if name not in self._workers:
            try:
                self._start(name)
            except ConfigurationError as error:
                raise DeviceFailedError(f"cannot start anew: {error}") from error
        return True

    def drop(self, names: Sequence[str]) -> None:
        """See `Fleet.drop`."""
        for name in names:
            if name in self._workers:
                self._hosts[self._actor_of[name]].remove(name)

    def counters(self) -> dict[str, Counters]:
        """See `Fleet.counters`."""
        return {name: worker.counters for name, worker in self._at_work().items()}

    def start_trace(self) -> None:
        """See `Fleet.start_trace`."""
        for worker in self._at_work().values():
            worker.trace.start()

    def recorded(self) -> dict[str, Recorded]:
        """See `Fleet.recorded`."""
        return {name: worker.trace.recorded() for name, worker in self._at_work().items()}

    def shutdown(self) -> None:
        """See `Fleet.shutdown`."""
        for host in self._hosts.values():
            host.stop()
        for thread in self._threads.values():
            thread.join(JOIN_SECONDS)
        self._threads.clear()

    def _at_work(self) -> dict[str, DeviceWorker]:
        """The devices of the plan, less those that are lost."""
        workers = self._workers
        return {name: workers[name] for name in self._used if name in workers}

    def _node_of(self, spec: DeviceSpec) -> str:
        """Declared devices keep the nodes of their own, so that a plan shows its real links."""
        return self.node if self._asked or spec.node is None else spec.node

    def _run(self, actor: str, links: Links) -> None:
        host = self._hosts[actor]
        try:
            host.run(links)
        except Exception as error:  # noqa: BLE001  # handed to the engine by `check`
            if host is self._hosts.get(actor):  # and not one that hung and was replaced
                self._failures[actor] = error
                self._noticed()


def _comes_from_another(error: Exception) -> bool:
    """Whether it tells of a record that was late or wrong, not of the device itself."""
    return isinstance(error, LinkError)
