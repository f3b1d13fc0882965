"""A device: it answers questions, loads its part of a plan, and runs its resident loop.

The worker knows nothing of Ray. An actor, or a thread, holds one and gives it its links.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from raygraft.actors.links import Receiver, Sender
from raygraft.actors.part import Answers, Links, Part, Questions
from raygraft.actors.records import Record, RecordKind, describe
from raygraft.graph.errors import (
    ConfigurationError,
    DeviceFailedError,
    LinkError,
    LinkFullError,
    RaygraftError,
)
from raygraft.graph.graph import Subgraph
from raygraft.graph.patterns import find_patterns
from raygraft.graph.step import Step, step_from_arrays
from raygraft.graph.tensors import WeightSource
from raygraft.kernels import create_backend
from raygraft.kernels.base import Array, BackendOptions, Description, Runner
from raygraft.kernels.verification.checks import CheckResult
from raygraft.kernels.verification.trial import Trial, run_trial
from raygraft.placement.plan import Transfer
from raygraft.placement.schedule import StageTurn

SLICE_SECONDS = 0.2
"""How long one wait lasts before the loop looks whether it should stop."""


@dataclass(slots=True)
class Counters:
    """What a device has done so far. Times are in seconds."""

    questions: int = 0
    """How often it was asked what it can run."""
    steps: int = 0
    rows: int = 0
    run_seconds: float = 0.0
    wait_seconds: float = 0.0
    records_sent: int = 0
    bytes_sent: int = 0


@dataclass(frozen=True, slots=True)
class LoadedUnit:
    """A unit of a stage, ready to run."""

    subgraph: Subgraph
    runner: Runner


class DeviceWorker:
    """One device of a fleet."""

    def __init__(self, name: str, backend: str, options: BackendOptions) -> None:
        """Make the device's backend. Raises ConfigurationError when there is none such."""
        self.name = name
        self.backend_name = backend
        self.options = options
        try:
            self.backend = create_backend(backend, options)
        except ConfigurationError as error:
            raise ConfigurationError(f"device {name}: {error}") from error
        self.counters = Counters()
        self._stopping = threading.Event()
        self._part: Part | None = None
        self._runners: dict[int, list[LoadedUnit]] = {}

    def describe(self) -> Description:
        """What the device is, as it is now."""
        return self.backend.describe()

    def answer(self, questions: Questions) -> Answers:
        """Answer all questions of a model at once; each distinct one is put to the backend once."""
        self.counters.questions += 1
        graph, limits = questions.graph, questions.limits
        found = find_patterns(graph, self.backend.patterns())
        signatures = {graph.region_signature(region) for region in (*graph.all_regions, *found)}
        return Answers(
            description=self.describe(),
            verdicts={s: self.backend.supports_op(s, limits) for s in graph.signatures},
            claims={s: self.backend.claims(s, limits) for s in signatures},
            found=found,
            weight_bytes={form: self.backend.weight_bytes(form) for form in graph.weight_forms},
        )

    def check(self, trial: Trial, weights: WeightSource) -> CheckResult:
        """Run one check of what it claims or supports, and compare with the right answers.

        The backend is made anew afterwards: a check leaves no weights behind, and no harm.
        """
        try:
            return run_trial(self.backend, trial, weights)
        finally:
            del self.backend  # two at once may be one too many for the hardware
            self.backend = create_backend(self.backend_name, self.options)

    def load(self, part: Part, weights: WeightSource) -> None:
        """Load the weights of a part of a plan, and make room for its cache.

        Raises DeviceFailedError when the backend fails.
        """
        self._part = part
        self._runners = {}
        for number, subgraphs in part.subgraphs.items():
            try:
                self._runners[number] = [
                    self._load_unit(part, subgraph, weights) for subgraph in subgraphs
                ]
            except RaygraftError:
                raise
            except Exception as error:
                where = self._regions(number)
                raise DeviceFailedError(
                    f"device {self.name} failed to load {where}: {type(error).__name__}: {error}"
                ) from error

    def _load_unit(self, part: Part, subgraph: Subgraph, weights: WeightSource) -> LoadedUnit:
        runner = self.backend.load(subgraph, weights, part.limits)
        if subgraph.states:
            runner.allocate_state(part.cache_blocks, part.block_size)
        return LoadedUnit(subgraph, runner)

    def stop(self) -> None:
        """Make the loop return soon, whatever it waits for."""
        self._stopping.set()

    def run(self, links: Links) -> None:
        """The resident loop: one turn of every stage for each step, until shut down.

        Raises LinkError when a record is not the expected one, DeviceFailedError when the
        backend fails.
        """
        while (record := self._receive(links.control)) is not None:
            if record.kind is RecordKind.SHUTDOWN:
                return
            self._step(record, links)

    def _step(self, header: Record, links: Links) -> None:
        assert self._part is not None
        step = step_from_arrays(header.tensors)
        values: dict[str, Array] = {}
        for turn in self._part.schedule.turns:
            for transfer in turn.receive:
                record = self._receive(links.receivers[transfer.source])
                if record is None:
                    return
                self._check(record, header, transfer)
                values.update(zip(transfer.values, record.tensors, strict=True))
            values.update(self._run(turn, step, values))
            for transfer in turn.send:
                self._send(links.senders[transfer.target], header, transfer, values)
            for name in turn.forget:
                del values[name]
        self.counters.steps += 1
        self.counters.rows += step.rows

    def _run(self, turn: StageTurn, step: Step, values: dict[str, Array]) -> dict[str, Array]:
        began = time.perf_counter()
        local = {name: values[name] for name in turn.stage.inputs}
        try:
            for unit in self._runners[turn.stage.number]:
                inputs = {name: local[name] for name in unit.subgraph.inputs}
                local.update(unit.runner.run(step, inputs))
            outputs = {name: local[name] for name in turn.stage.outputs}
        except Exception as error:
            raise DeviceFailedError(
                f"device {self.name} failed in {self._regions(turn.stage.number)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.counters.run_seconds += time.perf_counter() - began
        return outputs

    def _receive(self, receiver: Receiver) -> Record | None:
        """The next record; None when the device is told to stop."""
        began = time.perf_counter()
        while not self._stopping.is_set():
            record = receiver.receive(SLICE_SECONDS)
            if record is not None:
                self.counters.wait_seconds += time.perf_counter() - began
                return record
        return None

    def _send(
        self, sender: Sender, header: Record, transfer: Transfer, values: dict[str, Array]
    ) -> None:
        tensors = tuple(np.ascontiguousarray(values[name]) for name in transfer.values)
        place = (header.epoch, header.step, header.half_batch, transfer.number)
        record = Record(RecordKind.DATA, *place, tensors)
        while not self._stopping.is_set():
            try:
                sender.send(record, SLICE_SECONDS)
            except LinkFullError:
                continue
            self.counters.records_sent += 1
            self.counters.bytes_sent += sum(tensor.nbytes for tensor in tensors)
            return

    def _check(self, record: Record, header: Record, transfer: Transfer) -> None:
        expected = (header.epoch, header.step, header.half_batch, transfer.number)
        found = (record.epoch, record.step, record.half_batch, record.transfer)
        if found != expected:
            raise LinkError(
                f"device {self.name} expected transfer {transfer.number} of step {header.step} "
                f"from {transfer.source}, found a {describe(record)}"
            )

    def _regions(self, number: int) -> str:
        assert self._part is not None
        turns = self._part.schedule.turns
        regions = next(turn.stage.regions for turn in turns if turn.stage.number == number)
        return regions[0] if len(regions) == 1 else f"{regions[0]} to {regions[-1]}"
