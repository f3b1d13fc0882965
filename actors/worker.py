"""A device: it answers questions, loads its part of a plan, and runs its resident loop.

The worker knows nothing of Ray. An actor, or a thread, holds one and gives it its links.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from raygraft.actors.loop import Counters, LoadedUnit, ResidentLoop, regions_of
from raygraft.actors.part import Answers, Links, Part, Questions
from raygraft.actors.trace import Trace
from raygraft.graph.errors import ConfigurationError, DeviceFailedError, RaygraftError
from raygraft.graph.graph import Subgraph
from raygraft.graph.patterns import find_patterns
from raygraft.graph.tensors import WeightSource
from raygraft.kernels import create_backend
from raygraft.kernels.base import Array, Backend, BackendOptions, Description, Runner
from raygraft.kernels.verification.checks import CheckResult
from raygraft.kernels.verification.trial import Trial, run_trial

__all__ = ["Counters", "DeviceWorker"]


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
        self.trace = Trace()
        self._stopping = threading.Event()
        self._part: Part | None = None
        self._loaded: Part | None = None
        """The part whose weights are there, unless loading them has failed."""
        self._runners: dict[int, list[LoadedUnit]] = {}
        self._prepared: tuple[Part, Backend, dict[int, list[LoadedUnit]]] | None = None

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
            self._renew_backend()

    def _renew_backend(self) -> None:
        del self.backend  # two at once may be one too many for the hardware
        self.backend = create_backend(self.backend_name, self.options)

    def prepare(self, part: Part, weights: WeightSource) -> None:
        """Load a part beside the one that runs, if the backend allows it and has the room."""
        if _same(self._loaded, part) or not self.backend.loads_beside:
            return
        backend = create_backend(self.backend_name, self.options)
        with suppress(Exception):  # `load` tries again, when the other part has gone
            self._prepared = part, backend, self._load_all(backend, part, weights)

    def load(self, part: Part, weights: WeightSource) -> None:
        """Load the weights of a part of a plan, and make room for its cache.

        Raises DeviceFailedError when the backend fails.
        """
        self._stopping.clear()
        before, self._part, self._loaded = self._loaded, part, part
        prepared, self._prepared = self._prepared, None
        if _same(before, part):
            return  # after a recovery: what the cache holds is written anew
        if prepared is not None and _same(prepared[0], part):
            _, self.backend, self._runners = prepared
            return
        self._loaded = None
        if self._runners:  # another part: nothing is left of the one before
            self._runners = {}
            self._renew_backend()
        self._runners = self._load_all(self.backend, part, weights)
        self._loaded = part

    def export_states(
        self, names: Collection[str], pages: Sequence[int]
    ) -> dict[str, tuple[Array, ...] | None]:
        """What pages of these attention operators' caches hold; None for what stays inside."""
        return {
            name: runner.export_state(name, pages)
            for name, runner in self._states().items()
            if name in names
        }

    def import_states(self, states: Mapping[str, tuple[Array, ...]], pages: Sequence[int]) -> None:
        """Fill caches with what a device of the same backend had in them."""
        runners = self._states()
        for name, content in states.items():
            runners[name].import_state(name, pages, content)

    def _states(self) -> dict[str, Runner]:
        units = [unit for units in self._runners.values() for unit in units]
        return {
            op.name: unit.runner
            for unit in units
            for op in unit.subgraph.operators
            if op.state is not None
        }

    def _load_all(
        self, backend: Backend, part: Part, weights: WeightSource
    ) -> dict[int, list[LoadedUnit]]:
        runners = {}
        for number, subgraphs in part.subgraphs.items():
            try:
                runners[number] = [
                    _load_unit(backend, part, subgraph, weights) for subgraph in subgraphs
                ]
            except RaygraftError:
                raise
            except Exception as error:
                where = regions_of(part, number)
                raise DeviceFailedError(
                    f"device {self.name} failed to load {where}: {type(error).__name__}: {error}"
                ) from error
        return runners

    def stop(self) -> None:
        """Make the loop return soon, whatever it waits for."""
        self._stopping.set()

    def run(self, links: Links) -> None:
        """The resident loop, until shut down. See `ResidentLoop.run`."""
        assert self._part is not None
        loop = ResidentLoop(self.name, self._part, self._runners, links, self.counters, self.trace)
        loop.run(self._stopping)


def _load_unit(
    backend: Backend, part: Part, subgraph: Subgraph, weights: WeightSource
) -> LoadedUnit:
    runner = backend.load(subgraph, weights, part.limits)
    if subgraph.states:
        runner.allocate_state(part.cache_blocks, part.block_size)
    return LoadedUnit(subgraph, runner)


def _same(before: Part | None, part: Part) -> bool:
    """Whether two parts differ in their epochs at most."""
    return before is not None and replace(before, epoch=part.epoch) == part
