"""A device: it answers questions, loads its part of a plan, and keeps its caches.

Its actor runs what it has loaded. A device knows nothing of actors, links and Ray.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from raygraft.actors import compiled_turns
from raygraft.actors.journeys import KeptStates
from raygraft.actors.part import Answers, Part, Questions
from raygraft.actors.trace import Trace
from raygraft.graph.errors import (
    CapacityError,
    ConfigurationError,
    DeviceFailedError,
    RaygraftError,
)
from raygraft.graph.gguf_file import MappedWeights
from raygraft.graph.graph import Subgraph
from raygraft.graph.patterns import find_patterns
from raygraft.graph.tensors import WeightSource
from raygraft.kernels import create_backend
from raygraft.kernels.base import Array, Backend, BackendOptions, Description, Runner
from raygraft.kernels.verification.checks import CheckResult
from raygraft.kernels.verification.trial import Trial, run_trial


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
        self.trace = Trace()
        self.runners: dict[int, list[LoadedUnit]] = {}
        """Those of each stage, by its number."""
        self._part: Part | None = None
        """What is loaded."""
        self._prepared: tuple[Part, Backend, dict[int, list[LoadedUnit]]] | None = None
        self._kept: KeptStates | None = None
        """Between letting go of one part and loading the next."""

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
        self._prepared = None
        if self._part == part:
            self._part = part  # which `load` then knows without comparing all of it
            return
        if not self.backend.loads_beside:
            return
        backend = create_backend(self.backend_name, self.options)
        with suppress(Exception):  # `load` tries again, when the other part has gone
            self._prepared = part, backend, self._load_all(backend, part, weights)

    def make_room(self, part: Part | None, staying: Sequence[str], pages: Sequence[int]) -> None:
        """Let go of what is loaded, unless it is this part, or the part was prepared.

        What these pages hold of the states that are `staying` is kept for `load`.
        """
        self._kept = None
        if self._part == part:
            return
        self._kept = KeptStates(self._states(), staying, pages)
        if self._prepared is not None and self._prepared[0] == part:
            return
        self._part, self._prepared = None, None
        if self.runners:
            self.runners = {}
            self._renew_backend()

    def load(self, part: Part, weights: WeightSource) -> bool:
        """Load the weights of a part of a plan, and make room for its cache.

        `make_room` for this part comes first. Returns whether all is in the caches that was to
        stay. Raises DeviceFailedError when the backend fails, CapacityError when there is no room.
        """
        prepared, self._prepared = self._prepared, None
        kept, self._kept = self._kept, None
        if self._part == part:
            return True  # after a recovery: what the cache holds is written anew
        if prepared is not None:
            self._part, self.backend, self.runners = prepared
        else:
            self.runners = self._load_all(self.backend, part, weights)
            self._part = part
            _give_back_memory()
        return kept is None or kept.give(self._states())

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
        units = [unit for units in self.runners.values() for unit in units]
        return {
            op.name: unit.runner
            for unit in units
            for op in unit.subgraph.operators
            if op.state is not None
        }

    def _load_all(
        self, backend: Backend, part: Part, weights: WeightSource
    ) -> dict[int, list[LoadedUnit]]:
        earlier = self._states()
        runners = {}
        for number, subgraphs in part.subgraphs.items():
            try:
                runners[number] = [
                    _load_unit(backend, part, subgraph, weights, earlier) for subgraph in subgraphs
                ]
            except CapacityError as error:
                raise CapacityError(f"{self._cannot_load(part, number)}: {error}") from error
            except RaygraftError:
                raise
            except Exception as error:
                raise DeviceFailedError(
                    f"{self._cannot_load(part, number)}: {type(error).__name__}: {error}"
                ) from error
        for unit in (unit for own in runners.values() for unit in own):
            if unit.runner.native() is not None:  # which makes it ready
                compiled_turns.prepare()
        if isinstance(weights, MappedWeights):
            weights.release()
        return runners

    def _cannot_load(self, part: Part, number: int) -> str:
        return f"device {self.name} failed to load {span_of(part.regions[number])}"


def _load_unit(
    backend: Backend,
    part: Part,
    subgraph: Subgraph,
    weights: WeightSource,
    earlier: Mapping[str, Runner],
) -> LoadedUnit:
    """`earlier` are runners of states that still run: caches of theirs are taken where they fit."""
    runner = backend.load(subgraph, weights, part.limits)
    if subgraph.states:
        runner.allocate_state(part.cache_blocks, part.block_size)
    for op in subgraph.operators:
        if op.state is not None and op.name in earlier:
            state = earlier[op.name].hand_on_state(op.name)
            if state is not None:
                runner.take_state(op.name, state)
    return LoadedUnit(subgraph, runner)


def _give_back_memory() -> None:
    """Let the C library return to the system what loading has freed."""
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def span_of(regions: Sequence[str]) -> str:
    """Regions for messages, by the first and the last."""
    return regions[0] if len(regions) == 1 else f"{regions[0]} to {regions[-1]}"
