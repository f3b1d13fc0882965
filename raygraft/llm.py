"""The Python API: a model, its devices and a plan, ready to answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from raygraft.actors.engine import Engine
from raygraft.actors.fleet import Fleet
from raygraft.actors.in_process import InProcessFleet
from raygraft.actors.request import GeneratedSequence, SamplingParams
from raygraft.actors.verification import Results
from raygraft.completion import Chunk, Completion, Writer
from raygraft.configuration import Device, Place, parse_devices, parse_rules
from raygraft.demo_model import demo_model_path
from raygraft.graph.architectures import build_graph
from raygraft.graph.capability import Limits
from raygraft.graph.errors import ModelFileError, RequestError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.placement.devices import DeviceSpec
from raygraft.placement.plan import Plan
from raygraft.placement.rules import AnyRule
from raygraft.planning import check_early, plan_on, with_named_regions, with_overrides
from raygraft.text import ChatTemplate, Tokenizer
from raygraft.verification import verify_on

Progress = Callable[[str], None]
Prompt = str | Sequence[int]
Message = Mapping[str, str]

MAX_SEQUENCES = 8
MAX_ROWS = 256
DEFAULT_DEVICE = DeviceSpec("cpu")
"""What the machine has, when nobody says anything else: all its cores as one device."""
SCORES = 10


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Timings:
    """Measured since the model was loaded."""

    load_s: float
    prefill_tps: float
    decode_tps: float
    hops_per_token: int
    """Records per decode step: between devices, and to the engine."""
    bytes_per_hop: float
    """Mean payload of a record with one row."""
    hop_us: float
    """Time of a step outside of all stages, per hop: links, waiting and the engine's own work."""
    device_busy: dict[str, float]
    """Device -> share of the stepping time that it computed."""


class Model:
    """A model file with its graph and its tokenizer; no devices yet."""

    def __init__(self, path: str | Path | None = None, progress: Progress = _silent) -> None:
        """Read a GGUF file, or the demo model. Raises ModelFileError, UnknownArchitectureError."""
        path = demo_model_path(progress) if path is None else path
        progress(f"reading {Path(path).name}")
        self.file = ModelFile.open(path)
        self.graph: Graph = build_graph(self.file)
        try:
            self.tokenizer = Tokenizer.from_metadata(self.file.metadata)
        except ModelFileError as error:
            raise ModelFileError(f"{self.file.path}: {error}") from error

    def limits(
        self, *, ctx_size: int | None, max_sequences: int, max_rows: int, cache_type: str
    ) -> Limits:
        """The bounds of a plan. Raises RequestError when they make no sense."""
        trained = self.graph.dimensions.context
        if ctx_size is not None and not 1 <= ctx_size <= trained:
            raise RequestError(
                f"a context of {ctx_size} tokens was asked for; "
                f"the model was trained for 1 to {trained}"
            )
        if max_sequences < 1 or max_rows < max_sequences:
            raise RequestError(
                f"max_rows {max_rows} must hold a row for each of max_sequences {max_sequences}"
            )
        return Limits(max_rows, ctx_size or trained, cache_type, max_sequences)


class LLM:
    """A model on its devices. Close it, or use it in a `with` block.

    `devices` are texts like `--device`'s, mappings with the same keys, or DeviceSpecs; `place`
    maps selectors to devices, the last that matches wins; `regions` names regions of your own, as
    name -> selector; `override_tensor` takes llama.cpp's option. `address` joins a running Ray
    cluster. `verify` checks what the devices claim before the plan is made, and warns of what they
    fail in (WithdrawnWarning). `runtime="in-process"` runs the devices as threads without Ray.
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
        max_rows: int = MAX_ROWS,
        cache_type: str = "f32",
        verify: bool = False,
        progress: Progress = _silent,
    ) -> None:
        began = time.perf_counter()
        self.model = model if isinstance(model, Model) else Model(model, progress)
        specs = parse_devices(devices or [DEFAULT_DEVICE])
        graph = with_named_regions(self.model.graph, regions or {})
        rules = with_overrides(graph, _rules(place), override_tensor, specs)
        limits = self.model.limits(
            ctx_size=ctx_size,
            max_sequences=max_sequences,
            max_rows=max_rows,
            cache_type=cache_type,
        )
        check_early(graph, rules, specs)
        fleet = _start_fleet(specs, runtime, address, progress)
        try:
            self.verification: Results = {}
            if verify:
                self.verification = verify_on(
                    fleet, graph, limits=limits, model=self.model.file, progress=progress
                )
            self.plan: Plan
            self.plan, self.graph, _ = plan_on(
                fleet,
                graph,
                rules,
                limits=limits,
                context=ctx_size,
                model=self.model.file.path.name,
            )
            self.tokenizer = self.model.tokenizer
            self._template = ChatTemplate.for_tokenizer(self.tokenizer)
            self._engine = Engine(
                self.plan,
                self.graph,
                self.model.file,
                fleet,
                end_of_generation=self.tokenizer.end_of_generation,
            )
        except BaseException:
            fleet.shutdown()
            raise
        self._fleet = fleet
        self._writers: dict[GeneratedSequence, Writer] = {}
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

    def close(self) -> None:
        """End all devices, and the Ray that was started for them."""
        self._engine.shutdown()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
    ) -> list[Completion]:
        """Answer one prompt or several at once; each is a text, or a list of token ids.

        Raises RequestError for a prompt that cannot be served, before any is computed.
        """
        params = params or SamplingParams()
        many: list[Prompt] = [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[list-item, arg-type]
        writers: list[Writer] = []
        try:
            for prompt in many:
                writers.append(self._start(prompt, params))
            while any(writer.sequence.finish_reason is None for writer in writers):
                self._step()
            return [writer.completion() for writer in writers]
        finally:
            for writer in writers:
                self._end(writer)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[Chunk, None, Completion]:
        """Answer one prompt, token by token; closing the generator ends the answer."""
        writer = self._start(prompt, params or SamplingParams())
        try:
            while writer.unread or writer.sequence.finish_reason is None:
                while writer.unread:
                    yield writer.unread.popleft()
                if writer.sequence.finish_reason is None:
                    self._step()
            return writer.completion()
        finally:
            self._end(writer)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as token ids, by the model's own chat template."""
        text = self._template.render(messages)
        bos = self.tokenizer.bos_id
        begins = bos is not None and text.startswith(self.tokenizer.token_bytes(bos).decode())
        return self.tokenizer.encode(text, add_special=not begins)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation of messages with `role` and `content`."""
        return self.generate(self.encode_chat(messages), params)[0]

    def score(self, token_ids: Sequence[int]) -> list[dict[int, float]]:
        """For each position i the ten best next tokens after `token_ids[: i + 1]`.

        Token id -> log probability, best first.
        """
        params = SamplingParams(temperature=0, logprobs=SCORES)
        sequence = self._engine.add(token_ids, params, scoring=True)
        try:
            while sequence.finish_reason is None:
                self._step()
        finally:
            self._engine.cancel(sequence)
        return [token.top_logprobs for token in sequence.tokens]

    def timings(self) -> Timings:
        """Speeds and hops so far."""
        t, hops = self._engine.timings, self.plan.hops
        counters = self._fleet.counters()
        total = t.prefill_seconds + t.decode_seconds
        steps = max((c.steps for c in counters.values()), default=0)
        outside = total - sum(c.run_seconds for c in counters.values())
        return Timings(
            load_s=self._load_seconds,
            prefill_tps=_rate(t.prefill_tokens, t.prefill_seconds),
            decode_tps=_rate(t.decode_tokens, t.decode_seconds),
            hops_per_token=hops,
            bytes_per_hop=sum(transfer.row_bytes for transfer in self.plan.transfers) / hops,
            hop_us=max(0.0, 1e6 * _rate(outside, steps * hops)),
            device_busy={name: _rate(c.run_seconds, total) for name, c in counters.items()},
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _start(self, prompt: Prompt, params: SamplingParams) -> Writer:
        if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
            raise RequestError(f"a prompt is a text or a list of token ids, not {prompt!r}")
        sequence = self._engine.add(self._encode(prompt), replace(params))
        writer = Writer(sequence, self.tokenizer)
        self._writers[sequence] = writer
        return writer

    def _step(self) -> None:
        """One step of the engine; its tokens go to the answers that they belong to."""
        for output in self._engine.step():
            writer = self._writers.get(output.sequence)
            if writer is not None and writer.push(output.token):
                self._engine.cancel(output.sequence)
                output.sequence.finish_reason = "stop"

    def _end(self, writer: Writer) -> None:
        self._engine.cancel(writer.sequence)
        self._writers.pop(writer.sequence, None)


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _rules(place: Place | Sequence[AnyRule] | None) -> tuple[AnyRule, ...]:
    if place is not None and not isinstance(place, Mapping) and not isinstance(place, str):
        ready = [rule for rule in place if isinstance(rule, AnyRule)]
        if len(ready) == len(place):
            return tuple(ready)
    return parse_rules(place)  # type: ignore[arg-type]


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _start_fleet(
    specs: tuple[DeviceSpec, ...], runtime: str, address: str | None, progress: Progress
) -> Fleet:
    if runtime == "in-process":
        return InProcessFleet(specs)
    from raygraft.actors.ray_fleet import RayFleet  # noqa: PLC0415  # Ray takes a second to import

    return RayFleet(specs, address, progress)
