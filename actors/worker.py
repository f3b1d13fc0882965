"""A device: it answers questions, loads its part of a plan, and runs its resident loop.

The worker knows nothing of Ray. An actor, or a thread, holds one and gives it its links.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from raygraft.actors.loop import Counters, LoadedUnit, ResidentLoop, regions_of
from raygraft.actors.part import Answers, Links, Part, Questions
from raygraft.actors.trace import Trace
from raygraft.graph.errors import ConfigurationError, DeviceFailedError, RaygraftError
from raygraft.graph.graph import Subgraph
from raygraft.graph.patterns import find_patterns
from raygraft.graph.tensors import WeightSource
from raygraft.kernels import create_backend
from raygraft.kernels.base import BackendOptions, Description
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

    def load(self, part: Part, weights: WeightSource) -> None:
        """Load the weights of a part of a plan, and make room for its cache.

        Raises DeviceFailedError when the backend fails.
        """
        self._stopping.clear()
        before, self._part, self._loaded = self._loaded, part, part
        if before is not None and replace(before, epoch=part.epoch) == part:
            return  # after a recovery: what the cache holds is written anew
        self._loaded = None
        if self._runners:  # another part: nothing is left of the one before
            self._runners = {}
            self._renew_backend()
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
        self._loaded = part

    def _load_unit(self, part: Part, subgraph: Subgraph, weights: WeightSource) -> LoadedUnit:
        runner = self.backend.load(subgraph, weights, part.limits)
        if subgraph.states:
            runner.allocate_state(part.cache_blocks, part.block_size)
        return LoadedUnit(subgraph, runner)

    def stop(self) -> None:
        """Make the loop return soon, whatever it waits for."""
        self._stopping.set()

    def run(self, links: Links) -> None:
        """The resident loop, until shut down. See `ResidentLoop.run`."""
        assert self._part is not None
        loop = ResidentLoop(self.name, self._part, self._runners, links, self.counters, self.trace)
        loop.run(self._stopping)

    def _regions(self, number: int) -> str:
        assert self._part is not None
        return regions_of(self._part, number)
