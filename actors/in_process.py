"""A fleet of threads in this process: for tests, for trials, and for declared plans."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from raygraft.actors.fleet import Wires, profile_of, share_of_machine
from raygraft.actors.links import Receiver, Sender, local_link
from raygraft.actors.part import Links, Questions, part_of
from raygraft.actors.trace import Recorded
from raygraft.actors.verification import (
    DEADLINE,
    Progress,
    Results,
    Withdrawals,
    verify_devices,
)
from raygraft.actors.worker import Counters, DeviceWorker
from raygraft.graph.errors import ConfigurationError, DeviceFailedError, LinkError
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.graph import Graph
from raygraft.graph.tensors import WeightSource
from raygraft.kernels.base import BackendOptions, Description
from raygraft.kernels.verification.checks import CheckResult, Outcome
from raygraft.kernels.verification.trial import Trial
from raygraft.placement.devices import ENGINE, DeviceProfile, DeviceSpec
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import (
    control_slots,
    most_half_batches,
    ring_slots,
    used_devices,
)

JOIN_SECONDS = 5.0


class InProcessFleet:
    """Each device is a thread; records are copied from queue to queue."""

    node = ""

    def __init__(self, specs: Sequence[DeviceSpec], *, asked: bool = True) -> None:
        self.specs = tuple(specs)
        self._asked = asked
        self._withdrawals = Withdrawals()
        self._workers: dict[str, DeviceWorker] = {}
        for node in dict.fromkeys(map(self._node_of, specs)):
            here = [spec for spec in specs if self._node_of(spec) == node]
            threads = share_of_machine(here, os.cpu_count() or 1)
            for spec in here:
                options = BackendOptions(threads[spec.name])
                self._workers[spec.name] = DeviceWorker(spec.name, spec.backend, options)
        self._threads: dict[str, threading.Thread] = {}
        self._failures: dict[str, Exception] = {}
        self._dropped: set[str] = set()
        self._noticed: Callable[[], None] = lambda: None
        self._used: tuple[str, ...] = ()

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
        self._workers[name] = DeviceWorker(name, worker.backend_name, worker.options)
        detail = f"no answer within {deadline:g} s" if thread.is_alive() else "its thread ended"
        return trial.check.result(Outcome.FAILED, detail=detail)

    def _answered(self, questions: Questions) -> tuple[DeviceProfile, ...]:
        """The profiles as the devices answer, verified or not."""
        specs = [spec for spec in self.specs if spec.name not in self._dropped]
        sharers = Counter(self._node_of(spec) for spec in specs if spec.memory is None)
        return tuple(
            profile_of(
                spec,
                self._workers[spec.name].answer(questions),
                node=self._node_of(spec),
                sharers=sharers[self._node_of(spec)],
                asked=self._asked,
            )
            for spec in specs
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
        half_batches = most_half_batches(plan)
        weights = MappedWeights(model.files, model.tensors)
        senders: dict[str, dict[str, Sender]] = {name: {} for name in self._used}
        receivers: dict[str, dict[str, Receiver]] = {name: {} for name in (*self._used, ENGINE)}
        for source, target in dict.fromkeys((t.source, t.target) for t in plan.transfers):
            slots = ring_slots(plan, source, target, half_batches)
            sender, receiver = local_link(slots, f"{source} to {target}")
            senders[source][target], receivers[target][source] = sender, receiver
        control: dict[str, Sender] = {}
        for name in self._used:
            worker = self._workers[name]
            try:
                worker.load(part_of(plan, graph, name, epoch), weights)
            except DeviceFailedError as error:
                self._failures[name] = error
                raise
            control[name], header = local_link(control_slots(half_batches), f"{ENGINE} to {name}")
            links = Links(header, receivers[name], senders[name])
            thread = threading.Thread(
                target=self._run, args=(name, links), name=f"device {name}", daemon=True
            )
            thread.start()
            self._threads[name] = thread
        (results,) = receivers[ENGINE].values()
        return Wires(control, results)

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
            self._workers[name].stop()
        for thread in self._threads.values():
            thread.join(patience)
        hang = [name for name, thread in self._threads.items() if thread.is_alive()]
        failed = [n for n, error in self._failures.items() if not _comes_from_another(error)]
        self._threads.clear()
        self._failures.clear()
        return tuple(dict.fromkeys((*failed, *hang)))

    def prepare(self, plan: Plan, graph: Graph, model: ModelFile) -> None:
        """See `Fleet.prepare`. A device is a thread: it loads when it is switched."""

    def add(self, spec: DeviceSpec) -> None:
        """See `Fleet.add`."""
        if spec.name in self._workers:
            self.replace(spec.name)
            return
        threads = spec.threads or 1
        self._workers[spec.name] = DeviceWorker(spec.name, spec.backend, BackendOptions(threads))
        self.specs = (*self.specs, spec)

    def replace(self, name: str) -> bool:
        """See `Fleet.replace`."""
        before = self._workers[name]
        try:
            self._workers[name] = DeviceWorker(name, before.backend_name, before.options)
        except ConfigurationError as error:
            raise DeviceFailedError(f"cannot start anew: {error}") from error
        self._dropped.discard(name)
        return True

    def drop(self, names: Sequence[str]) -> None:
        """See `Fleet.drop`."""
        self._dropped.update(names)

    def counters(self) -> dict[str, Counters]:
        """See `Fleet.counters`."""
        return {name: self._workers[name].counters for name in self._used}

    def start_trace(self) -> None:
        """See `Fleet.start_trace`."""
        for name in self._used:
            self._workers[name].trace.start()

    def recorded(self) -> dict[str, Recorded]:
        """See `Fleet.recorded`."""
        return {name: self._workers[name].trace.recorded() for name in self._used}

    def shutdown(self) -> None:
        """See `Fleet.shutdown`."""
        for worker in self._workers.values():
            worker.stop()
        for thread in self._threads.values():
            thread.join(JOIN_SECONDS)
        self._threads.clear()

    def _node_of(self, spec: DeviceSpec) -> str:
        """Declared devices keep the nodes of their own, so that a plan shows its real links."""
        return self.node if self._asked or spec.node is None else spec.node

    def _run(self, name: str, links: Links) -> None:
        worker = self._workers[name]
        try:
            worker.run(links)
        except Exception as error:  # noqa: BLE001  # handed to the engine by `check`
            if worker is self._workers[name]:  # and not one that hung and was replaced
                self._failures[name] = error
                self._noticed()


def _comes_from_another(error: Exception) -> bool:
    """Whether it tells of a record that was late or wrong, not of the device itself."""
    return isinstance(error, LinkError)
