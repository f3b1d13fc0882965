"""The engine: requests in, tokens out, half-batches of the whole plan in flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from raygraft.actors.ahead import can_be_sent_ahead
from raygraft.actors.deadlines import MOST_SECONDS, Deadlines
from raygraft.actors.fleet import Fleet
from raygraft.actors.pages import PagePool
from raygraft.actors.records import Record
from raygraft.actors.request import (
    FinishReason,
    GeneratedSequence,
    SamplingParams,
    Token,
    check_ids,
    check_prompt,
)
from raygraft.actors.rounds import InFlight, Rounds
from raygraft.actors.scheduler import Scheduler
from raygraft.actors.timings import Timings
from raygraft.actors.trace import EventKind, Trace
from raygraft.graph.errors import RaygraftError, RunError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Output:
    """What a sequence has grown by, or a position of it that was scored.

    A sequence that ended without a new token, as its time was over, has none.
    """

    sequence: GeneratedSequence
    token: Token | None


class Engine:
    """Steps a plan, once that is loaded. Not thread-safe: one thread adds requests and steps."""

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        model: ModelFile,
        fleet: Fleet,
        *,
        end_of_generation: frozenset[int] = frozenset(),
        step_seconds: float = MOST_SECONDS,
        max_queue: int | None = None,
        half_batches: int | None = None,
    ) -> None:
        """`load` comes next. `half_batches` are as many as pay, or as many as are given.

        A step about which nothing is known may take `step_seconds`; see `deadlines.py`.
        """
        self.plan = plan
        self.graph = graph
        self.fleet = fleet
        self.timings = Timings()
        self.trace = Trace()
        self.epoch = 0
        """Counts what was loaded."""
        self.copy_seconds = 0.0
        """What it took to copy caches when the plan was loaded."""
        self.copied_bytes = 0
        """How much was copied."""
        self._vocabulary = graph.dimensions.vocabulary
        self._end_of_generation = end_of_generation
        self._step_seconds = step_seconds
        pages = PagePool(plan.cache_blocks, plan.block_size)
        self.scheduler = Scheduler(plan.limits, pages, max_queue)
        self._model = model
        self._half_batches = half_batches
        self._marked = 0.0
        self._numbers = count()
        self._failure: RaygraftError | None = None
        self._closed = False
        self._stopping = False
        self.rounds: Rounds | None = None

    def load(self, pages: Sequence[int] | None = None) -> bool:
        """Load the plan in a new epoch; whether the caches have kept what these pages held.

        Raises RunError; it can be tried again with `restart`.
        """
        last = 0 if self.rounds is None else self.rounds.step
        self.epoch += 1
        try:
            wires = self.fleet.load(self.plan, self.graph, self._model, self.epoch, pages)
        except RaygraftError as error:
            self._failure = error
            raise
        except Exception as error:
            self._failure = RunError(f"the plan could not be loaded: {error!r}")
            raise self._failure from error
        feeds = can_be_sent_ahead(self.plan, self.graph)
        self.rounds = Rounds(
            self.plan,
            self.fleet,
            wires,
            self.trace,
            epoch=self.epoch,
            first_step=last,
            deadlines=Deadlines(self._step_seconds),
            half_batches=self._half_batches,
            ahead=feeds and wires.core_left,
            bursts=feeds and not wires.core_left,
        )
        self.rounds.stopping = lambda: self._stopping
        self._failure = None
        self.copy_seconds, self.copied_bytes = wires.copy_seconds, wires.copied_bytes
        return wires.kept

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.busy or self.in_flight

    @property
    def in_flight(self) -> bool:
        """Whether results have not come back."""
        return bool(self.rounds and self.rounds.in_flight)

    @property
    def failure(self) -> RaygraftError | None:
        """Why it is of no use until it is mended, if it is."""
        return self._failure

    def add(
        self, prompt: Sequence[int], params: SamplingParams, *, scoring: bool = False
    ) -> GeneratedSequence:
        """Accept a request.

        Raises RequestError when it can never be served, QueueFullError when too many wait.
        """
        sequence = self.prepare(prompt, params, scoring=scoring)
        self.scheduler.check_room(1)
        self.accept(sequence)
        return sequence

    def prepare(
        self, prompt: Sequence[int], params: SamplingParams, *, scoring: bool = False
    ) -> GeneratedSequence:
        """Check a request, on any thread. Raises RequestError when it can never be served."""
        sequence = GeneratedSequence(next(self._numbers), list(prompt), params, scoring)
        context = min(self.plan.limits.context, self.plan.cache_blocks * self.plan.block_size)
        check_prompt(sequence.prompt, context, self._vocabulary, scoring=scoring)
        check_ids("logit_bias", list(params.logit_bias), self._vocabulary)
        most = context if params.max_tokens is None else len(prompt) + params.max_tokens
        sequence.limit = min(context, most)
        return sequence

    def accept(self, sequence: GeneratedSequence) -> None:
        """Let a prepared request wait for its turn."""
        self.scheduler.add(sequence)

    def cancel(self, sequence: GeneratedSequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence now; later steps do not contain it."""
        self.scheduler.end(sequence, reason)

    def step(
        self, sends: bool = True, meanwhile: Callable[[], None] = lambda: None
    ) -> list[Output]:
        """Send what can be sent, wait for the oldest half-batch, and take its tokens.

        Unless it `sends`, it only takes what is in flight. `meanwhile` is called before it waits.

        Raises DeviceLostError, DeviceFailedError or LinkError; after that the engine raises the
        same error again, until `restart`.
        """
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RunError("this engine was shut down")
        if self.rounds is None:
            raise RunError("this engine's plan was not loaded")
        outputs = [Output(sequence, None) for sequence in self.scheduler.expire()]
        rounds = self.rounds
        try:
            if sends:
                for sent in rounds.send(self.scheduler):
                    self._sent(sent)
            else:
                rounds.complete()
            meanwhile()
            if rounds.in_flight:
                outputs += self._take(*rounds.receive())
        except RaygraftError as error:
            self._failure = error
            raise
        except Exception as error:
            self._failure = RunError(f"the engine failed: {error!r}")
            raise self._failure from error
        return outputs

    def look(self) -> None:
        """While there is nothing to do: are all devices alive? Raises as `step` does."""
        if self._failure is not None or self._closed:
            return
        try:
            self.fleet.check()
        except RaygraftError as error:
            self._failure = error
            raise

    def fail(self, error: RaygraftError) -> None:
        """It is of no use until it is mended."""
        self._failure = self._failure or error

    def switch(self, plan: Plan, graph: Graph) -> bool:
        """Go on with another plan when nothing is in flight; whether the caches could be kept.

        Devices have left their loops. Raises RunError, as `restart`.
        """
        old, scheduler = self.plan, self.scheduler
        sizes = (plan.cache_blocks, plan.block_size, plan.limits)
        same = sizes == (old.cache_blocks, old.block_size, old.limits)
        self._let_go(plan, graph)
        if self.load(scheduler.pages.held() if same else None):
            return True
        self._forget()
        return False

    def restart(self, plan: Plan, graph: Graph) -> None:
        """Go on with a plan on devices that have left their loops, in a new epoch.

        All that was computed and is in flight is given up; sequences are computed from their ids.
        Raises RunError when the plan cannot be loaded; it can be tried again.
        """
        self._let_go(plan, graph)
        self._forget()
        self.load()

    def _let_go(self, plan: Plan, graph: Graph) -> None:
        if self.rounds is not None:
            self.rounds.close()
            self.rounds.in_flight.clear()
        self.plan, self.graph = plan, graph

    def _forget(self) -> None:
        """Let every sequence wait to be computed from its ids."""
        plan = self.plan
        self.scheduler.start_again(PagePool(plan.cache_blocks, plan.block_size), plan.limits)
        context = min(plan.limits.context, plan.cache_blocks * plan.block_size)
        for sequence in [*self.scheduler.waiting]:
            sequence.limit = min(sequence.limit, context)
            if len(sequence.ids) >= sequence.limit and not sequence.scoring:
                self.cancel(sequence, "length")

    def stop_waiting(self) -> None:
        """Let a step that another thread waits in end soon, with an error."""
        self._stopping = True

    def shutdown(self) -> None:
        """End all loops, and everything that the fleet started."""
        if (self._failure is None or self._stopping) and not self._closed:
            self._closed = True
            if self.rounds is not None:
                self.rounds.shut_down()
        self.fleet.shutdown()

    def _sent(self, sent: InFlight) -> None:
        if self.rounds is not None and self.rounds.in_flight[0] is sent:
            self._marked = sent.sent
        self.timings.half_batches += sent.half_batches > 1

    def _take(self, sent: InFlight, record: Record) -> list[Output]:
        """Hand the tokens of a half-batch to their sequences."""
        began = time.perf_counter()
        self._count(sent)
        ids, logprobs, top_ids, top_logprobs = (tensor.tolist() for tensor in record.tensors)
        outputs = []
        row = 0
        for chunk in sent.chunks:
            rows = range(row, row + chunk.logits)
            row += chunk.logits
            tokens = [
                Token(ids[r][0], logprobs[r][0], _best(top_ids[r], top_logprobs[r])) for r in rows
            ]
            if self.scheduler.returned(chunk, tokens):
                self.timings.generated_tokens += len(tokens)
                outputs += [Output(chunk.sequence, token) for token in tokens]
                self._end_if_complete(chunk.sequence)
        if self.trace.on:
            self.trace.add(EventKind.TOKENS, -1, sent.step, sent.half_batch, began)
        return outputs

    def _count(self, sent: InFlight) -> None:
        """Account the time since the last result, or since something was sent."""
        now = time.monotonic()
        seconds, self._marked = now - self._marked, now
        rows = sent.rows
        if self.rounds is not None:
            self.timings.latest_steps.append((rows, self.rounds.took))
        if sent.prefill:
            self.timings.prefill_seconds += seconds
            self.timings.prefill_tokens += rows
        else:
            self.timings.decode_seconds += seconds
            self.timings.decode_tokens += rows
            self.timings.decode_steps += 1

    def _end_if_complete(self, sequence: GeneratedSequence) -> None:
        if not sequence.tokens:
            return
        if sequence.scoring:
            if len(sequence.tokens) == len(sequence.prompt):
                self.cancel(sequence, "length")
            return
        token, params = sequence.tokens[-1].id, sequence.params
        ends = token in self._end_of_generation and not params.ignore_eos
        if ends or token in params.stop_token_ids:
            self.cancel(sequence, "stop")
        elif len(sequence.ids) >= sequence.limit:
            self.cancel(sequence, "length")


def _best(ids: list[int], logprobs: list[float]) -> dict[int, float]:
    return {token: value for token, value in zip(ids, logprobs, strict=True) if token >= 0}
