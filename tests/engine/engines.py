"""Engines over devices in this process, whose headers a test can read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from raygraft.actors.engine import Engine
from raygraft.actors.header import step_of
from raygraft.actors.in_process import InProcessFleet
from raygraft.actors.records import Record
from raygraft.actors.request import GeneratedSequence, SamplingParams
from raygraft.configuration import parse_rules
from raygraft.graph.capability import Limits
from raygraft.graph.step import Step
from raygraft.model import Model
from raygraft.placement.devices import DeviceSpec
from raygraft.planning import plan_on

ATTENTION_AND_FFN = {"*": "b", "kind:attention": "a"}
HALVES = {"*": "a", "blk.1": "b", "head": "b", "sample": "b"}
LIMITS = Limits(max_rows=64, context=128, cache_type="f32", max_sequences=8)
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


class Watched:
    """A control link that remembers the headers it carries."""

    def __init__(self, sender: object, headers: list[Record]) -> None:
        self._sender = sender
        self._headers = headers

    def send(self, record: Record, timeout: float) -> None:
        self._sender.send(record, timeout)  # type: ignore[attr-defined]
        self._headers.append(record)


class WatchedEngine(Engine):
    """An engine, and all step headers that it has sent."""

    headers: list[Record]

    def steps(self) -> list[Step]:
        """What was computed, header by header; those without rows are left out."""
        return [step for header in self.headers if (step := step_of(header)) is not None]

    def finish(self, sequences: Sequence[GeneratedSequence]) -> list[list[int]]:
        """Step until these have ended; their generated ids."""
        while not all(sequence.finished for sequence in sequences):
            self.step()
        return [[token.id for token in sequence.tokens] for sequence in sequences]

    def drain(self) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()


@contextmanager
def engine(
    model: Path,
    *,
    place: Mapping[str, str] | None = None,
    blocks: int | None = None,
    limits: Limits = LIMITS,
    **options: object,
) -> Iterator[WatchedEngine]:
    """An engine over as many devices as `place` names, with a cache of `blocks` pages."""
    opened = Model(model)
    names = dict.fromkeys(place.values()) if place else ["a"]
    fleet = InProcessFleet([DeviceSpec(name, backend="reference", threads=1) for name in names])
    plan, graph, _ = plan_on(
        fleet, opened.graph, parse_rules(place), limits=limits, context=limits.context, model="tiny"
    )
    if blocks is not None:
        plan = replace(plan, cache_blocks=blocks)
    made = WatchedEngine(plan, graph, opened.file, fleet, **options)  # type: ignore[arg-type]
    made.headers = []
    made.load()
    assert made.rounds is not None
    wires = made.rounds.wires
    first = next(iter(wires.control))
    watched = Watched(wires.control[first], made.headers)
    made.rounds.wires = replace(wires, control={**wires.control, first: watched})  # type: ignore[dict-item]
    try:
        yield made
    finally:
        made.shutdown()


def alone(model: Path, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    """What each prompt gets from an engine that never has another one."""
    answers = []
    for prompt in prompts:
        with engine(model) as one:
            answers += one.finish([one.add(prompt, params)])
    return answers
