"""The Python API: a model, its devices and a plan, ready to answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from raygraft.actors.engine import Engine
from raygraft.actors.engine_thread import EngineThread
from raygraft.actors.fleet import Fleet
from raygraft.actors.in_process import InProcessFleet
from raygraft.actors.moves import Move, Moves
from raygraft.actors.recovery import OnLoss, Recovery, first_plan
from raygraft.actors.request import SamplingParams
from raygraft.actors.timeline import Timeline, timeline_of
from raygraft.actors.verification import Results
from raygraft.completion import Answer, Chunk, Completion
from raygraft.configuration import Device, Place, parse_device, parse_devices, parse_rules
from raygraft.graph.errors import RequestError
from raygraft.graph.graph import Graph
from raygraft.graph.operators import DEFAULT_CACHE_TYPE, CacheType
from raygraft.model import Message, Model, Progress
from raygraft.placement.devices import ENGINE, DeviceSpec
from raygraft.placement.plan import Plan
from raygraft.placement.rules import AnyRule
from raygraft.planning import check_early, with_named_regions, with_overrides
from raygraft.replanning import Replanner, Wanted
from raygraft.speeds import Timings, timings_of
from raygraft.verification import verify_on

if TYPE_CHECKING:
    from raygraft.actors.metrics import EngineMetrics
    from raygraft.control import Doorkeeper

Prompt = str | Sequence[int]

MAX_SEQUENCES = 8
DEFAULT_DEVICE = DeviceSpec("cpu")
"""What the machine has, when nobody says anything else: all its cores as one device."""
SCORES = 10


def _silent(_: str) -> None:
    pass


class LLM:
    """A model on its devices. Close it, or use it in a `with` block.

    `devices` are texts like `--device`'s, mappings with the same keys, or DeviceSpecs; `place`
    maps selectors to devices, the last that matches wins; `regions` names regions of your own, as
    name -> selector; `override_tensor` takes llama.cpp's option. `address` joins a running Ray
    cluster. A step has at most `max_rows` tokens of all requests together: 128, or 256 where a
    device is no CPU. The cache holds numbers of 32 bits, or by `cache_type` of 16 ("f16") or 8
    ("q8_0").
    `verify` checks what the devices claim before the plan is made, and warns of what they fail in
    (WithdrawnWarning). At most `max_queue` requests wait. `half_batches` go through the devices at
    once, or as many as pay. `on_loss` says what happens when a device dies: it is started anew, or
    the plan is made without it, or all requests fail. So many `spares` stand by on each node:
    processes without weights, which save most of a new actor's start. `raygraft ctl` finds the
    engine by its `name`. `runtime="in-process"` runs the devices as threads without Ray.
    """

    def __init__(
        self,
        model: str | Path | Model | None = None,
        *,
        devices: Iterable[Device] | None = None,
        place: Place | Sequence[AnyRule] | None = None,
        regions: Mapping[str, str] | None = None,
        override_tensor: Sequence[str] = (),
        address: str | None = None,
        runtime: Literal["ray", "in-process"] = "ray",
        ctx_size: int | None = None,
        max_sequences: int = MAX_SEQUENCES,
        max_rows: int | None = None,
        cache_type: CacheType = DEFAULT_CACHE_TYPE,
        max_queue: int | None = None,
        half_batches: int | None = None,
        on_loss: OnLoss = "replace",
        spares: int = 0,
        name: str | None = None,
        verify: bool = False,
        progress: Progress = _silent,
    ) -> None:
        began = time.perf_counter()
        self.model = model if isinstance(model, Model) else Model(model, progress)
        specs = parse_devices(devices or [DEFAULT_DEVICE])
        graph = with_named_regions(self.model.graph, regions or {})
        rules = with_overrides(graph, _rules(place), override_tensor, specs)
        limits = self.model.limits(
            specs,
            ctx_size=ctx_size,
            max_sequences=max_sequences,
            max_rows=max_rows,
            cache_type=cache_type,
        )
        check_early(graph, rules, specs)
        self._metrics: EngineMetrics | None = None
        self._held = ExitStack()
        """What was started, to be ended from the last to the first."""
        fleet = _start_fleet(specs, runtime, address, progress, spares)
        self._held.callback(fleet.shutdown)
        try:
            self.verification: Results = {}
            if verify:
                self.verification = verify_on(
                    fleet, graph, limits=limits, model=self.model.file, progress=progress
                )
            self._replanner = Replanner(
                fleet,
                graph,
                Wanted(rules, tuple(spec.name for spec in specs)),
                limits=limits,
                context=ctx_size,
                model=self.model.file.path.name,
            )
            plan, planned = first_plan(fleet, on_loss, self._replanner)
            self.tokenizer = self.model.tokenizer
            self._engine = Engine(
                plan,
                planned,
                self.model.file,
                fleet,
                end_of_generation=self.tokenizer.end_of_generation,
                max_queue=max_queue,
                half_batches=half_batches,
            )
            self._recovery = Recovery(self._engine, on_loss, self._replanner)
            self._recovery.load()
            self._thread = EngineThread(self._engine, self._recovery)
            self._held.callback(self._thread.shutdown)
            self._moves = Moves(self._thread, self.model.file)
            self._fleet = fleet
            if name is not None:
                self._held.callback(self._open(name).close)
            if runtime == "ray":
                self._metrics = self._measured(name or "engine")
                self._held.callback(self._metrics.close)
        except BaseException:
            self.close()
            raise
        self._load_seconds = time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def engine_thread(self) -> EngineThread:
        """What takes token ids and hands out tokens, without any text: for measurements."""
        return self._thread

    @property
    def plan(self) -> Plan:
        """Which device computes what, as it is now."""
        return self._engine.plan

    @property
    def graph(self) -> Graph:
        """The model's regions, with those that the devices have found."""
        return self._engine.graph

    def move(self, selector: str, device: str) -> Move:
        """Let a device compute these regions from now on, while requests go on.

        It is one more rule, the last. Raises SelectorError, PlanError: then nothing has changed.
        """
        return self._switch(self._replanner.wanted.with_rules(parse_rules({selector: device})))

    def drain(self, device: str) -> Move:
        """Let others compute what a device did, and let go of it. Raises PlanError."""
        return self._switch(self._replanner.wanted.without(device), [device])

    def add(self, device: Device) -> Move:
        """Take a device in, a new one or one that was drained or lost, and plan with it."""
        spec = parse_device(device)
        self._fleet.add(spec)
        self._recovery.returned(spec.name)
        return self._switch(self._replanner.wanted.with_device(spec.name))

    def _switch(self, wanted: Wanted, leaving: Sequence[str] = ()) -> Move:
        move = self._moves.switch(partial(self._replanner.plan_for, wanted), leaving)
        self._replanner.wanted = wanted
        return move

    def status(self) -> dict[str, Any]:
        """What the engine is doing, and on which devices."""
        engine, scheduler = self._engine, self._engine.scheduler
        regions = Counter(self.plan.device_of.values())
        return {
            "epoch": engine.epoch,
            "failure": None if engine.failure is None else str(engine.failure),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "free_pages": f"{scheduler.pages.free} of {scheduler.pages.blocks}",
            "recoveries": self._recovery.count,
            "moves": self._moves.count,
            "regions_of": dict(sorted(regions.items())),
        }

    def _measured(self, name: str) -> EngineMetrics:
        from raygraft.actors.metrics import EngineMetrics  # noqa: PLC0415  # as Ray

        recovery, moves = self._recovery, self._moves
        return EngineMetrics(self._engine, name, lambda: recovery.count, lambda: moves.count)

    def _open(self, name: str) -> Doorkeeper:
        from raygraft.control import Doorkeeper  # noqa: PLC0415  # Ray takes a second to import

        return Doorkeeper(
            name,
            {
                "status": self.status,
                "move": lambda selector, device: asdict(self.move(selector, device)),
                "drain": lambda device: asdict(self.drain(device)),
                "add": lambda device: asdict(self.add(device)),
            },
        )

    def close(self) -> None:
        """End all devices, and the Ray that was started for them."""
        self._held.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
    ) -> list[Completion]:
        """Answer one prompt or several at once; each is a text, or a list of token ids.

        Raises RequestError for a prompt that cannot be served, before any is computed.
        """
        many: list[Prompt] = [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[list-item, arg-type]
        answers = [self._answer(prompt, params) for prompt in many]
        try:
            self._thread.start([answer.request for answer in answers])
            return [answer.wait() for answer in answers]
        finally:
            for answer in answers:
                answer.cancel()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        notify: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Start to answer one prompt, and do not wait for it. Any thread may call this.

        `notify` is called on the engine's thread when a chunk has come, and at the end. Raises
        RequestError, QueueFullError.
        """
        answer = self._answer(prompt, params, notify)
        self._thread.start([answer.request])
        return answer

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[Chunk, None, Completion]:
        """Answer one prompt, token by token; closing the generator ends the answer."""
        answer = self.submit(prompt, params)
        try:
            yield from answer
            return answer.completion()
        finally:
            answer.cancel()

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as token ids, by the model's own chat template."""
        return self.model.encode_chat(messages)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation of messages with `role` and `content`."""
        return self.generate(self.encode_chat(messages), params)[0]

    def score(self, token_ids: Sequence[int]) -> list[dict[int, float]]:
        """For each position i the ten best next tokens after `token_ids[: i + 1]`.

        Token id -> log probability, best first.
        """
        params = SamplingParams(temperature=0, logprobs=SCORES)
        request = self._thread.request(token_ids, params, scoring=True)
        try:
            self._thread.start([request])
            request.wait()
        finally:
            request.cancel()
        return [token.top_logprobs for token in request.sequence.tokens]

    def timings(self) -> Timings:
        """Speeds and hops so far."""
        return timings_of(self._engine, self._load_seconds)

    def start_trace(self) -> None:
        """Record from now on what the engine and each device do when."""
        self._fleet.start_trace()
        self._engine.trace.start()

    def timeline(self) -> Timeline:
        """What was recorded since `start_trace`."""
        tracks = {ENGINE: self._engine.trace.recorded(), **self._fleet.recorded()}
        return timeline_of(self.plan, tracks)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.model.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _answer(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        notify: Callable[[], None] = lambda: None,
    ) -> Answer:
        if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
            raise RequestError(f"a prompt is a text or a list of token ids, not {prompt!r}")
        ids, params = self._encode(prompt), params or SamplingParams()
        return Answer(self._thread, ids, params, self.tokenizer, notify)


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _rules(place: Place | Sequence[AnyRule] | None) -> tuple[AnyRule, ...]:
    if place is not None and not isinstance(place, Mapping) and not isinstance(place, str):
        ready = [rule for rule in place if isinstance(rule, AnyRule)]
        if len(ready) == len(place):
            return tuple(ready)
    return parse_rules(place)  # type: ignore[arg-type]


def _start_fleet(
    specs: tuple[DeviceSpec, ...],
    runtime: str,
    address: str | None,
    progress: Progress,
    spares: int,
) -> Fleet:
    if runtime == "in-process":
        return InProcessFleet(specs)
    from raygraft.actors.ray_fleet import RayFleet  # noqa: PLC0415  # Ray takes a second to import

    return RayFleet(specs, address, progress, spares)
