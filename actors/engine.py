"""The engine: requests in, tokens out, half-batches of the whole plan in flight."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from raygraft.actors.batch import Chunk
from raygraft.actors.fleet import Fleet, Wires
from raygraft.actors.half_batches import HalfBatches
from raygraft.actors.header import header_of
from raygraft.actors.pages import PagePool
from raygraft.actors.records import Record, RecordKind, describe
from raygraft.actors.request import FinishReason, GeneratedSequence, SamplingParams, Token
from raygraft.actors.scheduler import Scheduler
from raygraft.actors.trace import EventKind, Trace
from raygraft.graph.errors import LinkError, LinkFullError, RaygraftError, RequestError, RunError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import most_half_batches

SLICE_SECONDS = 0.2
"""How long one wait lasts before the engine looks whether all devices are alive."""
STEP_SECONDS = 600.0
"""Deadline of one step: a device that takes longer is taken for hanging."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a sequence has grown by, or a position of it that was scored.

    A sequence that ended without a new token, as its time was over, has none.
    """

    sequence: GeneratedSequence
    token: Token | None


@dataclass(slots=True)
class Timings:
    """Sums so far, in seconds and rows; a step with rows of a prompt counts as prefill."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    half_batches: int = 0
    """Steps that shared their round with others."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A half-batch that was sent and has not come back."""

    step: int
    half_batch: int
    chunks: Sequence[Chunk]
    prefill: bool
    deadline: float


class Engine:
    """Steps a loaded plan. It is not thread-safe: one thread adds requests and steps.

    Headers go out in rounds of one or more half-batches, in turn; a half-batch's next header goes
    out as soon as its last result is back, while the others are still being computed. Results come
    back in the order of the headers.
    """

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        model: ModelFile,
        fleet: Fleet,
        *,
        end_of_generation: frozenset[int] = frozenset(),
        step_seconds: float = STEP_SECONDS,
        max_queue: int | None = None,
        half_batches: int | None = None,
    ) -> None:
        """Load the plan. `half_batches` are as many as pay, or as many as are given."""
        self.plan = plan
        self.graph = graph
        self.fleet = fleet
        self.timings = Timings()
        self.trace = Trace()
        self.epoch = 1
        self._vocabulary = graph.dimensions.vocabulary
        self._end_of_generation = end_of_generation
        self._step_seconds = step_seconds
        pages = PagePool(plan.cache_blocks, plan.block_size)
        self.scheduler = Scheduler(plan.limits, pages, max_queue)
        self._model = model
        self._half_batches = half_batches
        self._rounds = HalfBatches(most_half_batches(plan), half_batches)
        self._round_size = 1
        self._next_half_batch = 0
        self._in_flight: deque[_InFlight] = deque()
        self._marked = 0.0
        self._numbers = count()
        self._step = 0
        self._failure: RaygraftError | None = None
        self._closed = False
        self._stopping = False
        self._wires: Wires = fleet.load(plan, graph, model, self.epoch)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.busy or bool(self._in_flight)

    @property
    def failure(self) -> RaygraftError | None:
        """Why it is of no more use, if it is."""
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
        if not sequence.prompt:
            raise RequestError("the prompt is empty: there is no token to continue from")
        self._check_ids("the prompt", sequence.prompt)
        self._check_ids("logit_bias", list(params.logit_bias))
        context = min(self.plan.limits.context, self.plan.cache_blocks * self.plan.block_size)
        if len(prompt) + (not scoring) > context:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and one more is to be generated, "
                f"the context holds {context}"
            )
        most = context if params.max_tokens is None else len(prompt) + params.max_tokens
        sequence.limit = min(context, most)
        return sequence

    def accept(self, sequence: GeneratedSequence) -> None:
        """Let a prepared request wait for its turn."""
        self.scheduler.add(sequence)

    def cancel(self, sequence: GeneratedSequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence now; later steps do not contain it."""
        self.scheduler.end(sequence, reason)

    def step(self) -> list[Output]:
        """Send what can be sent, wait for the oldest half-batch, and take its tokens.

        Raises DeviceLostError, DeviceFailedError or LinkError; after that the engine raises the
        same error again, until `restart`.
        """
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RunError("this engine was shut down")
        outputs = [Output(sequence, None) for sequence in self.scheduler.expire()]
        try:
            self._send_headers()
            if self._in_flight:
                outputs += self._take(self._receive_result())
        except RaygraftError as error:
            self._failure = error
            raise
        except Exception as error:
            self._failure = RunError(f"the engine failed: {error!r}")
            raise self._failure from error
        return outputs

    def restart(self, plan: Plan, graph: Graph) -> None:
        """Go on with a plan on devices that have left their loops, in a new epoch.

        All that was computed and is in flight is given up; sequences are computed from their ids.
        Raises RunError when the plan cannot be loaded; it can be tried again.
        """
        for sender in self._wires.control.values():
            sender.close()
        self._wires.results.close()
        self.epoch += 1
        self.plan, self.graph = plan, graph
        self._in_flight.clear()
        self._next_half_batch = 0
        self._rounds = HalfBatches(most_half_batches(plan), self._half_batches)
        self.scheduler.start_again(PagePool(plan.cache_blocks, plan.block_size), plan.limits)
        context = min(plan.limits.context, plan.cache_blocks * plan.block_size)
        for sequence in [*self.scheduler.waiting]:
            sequence.limit = min(sequence.limit, context)
            if len(sequence.ids) >= sequence.limit and not sequence.scoring:
                self.cancel(sequence, "length")
        self._wires = self.fleet.load(plan, graph, self._model, self.epoch)
        self._failure = None

    def stop_waiting(self) -> None:
        """Let a step that another thread waits in end soon, with an error."""
        self._stopping = True

    def shutdown(self) -> None:
        """End all loops, and everything that the fleet started."""
        if (self._failure is None or self._stopping) and not self._closed:
            self._closed = True
            with suppress(RaygraftError):  # the fleet stops what cannot be told to end
                self._complete_round()
            record = Record(RecordKind.SHUTDOWN, self.epoch, self._step + 1, 0)
            for sender in self._wires.control.values():
                try:
                    sender.send(record, SLICE_SECONDS)
                except LinkError:
                    continue  # the fleet stops it in another way
        self.fleet.shutdown()

    def _check_ids(self, what: str, ids: list[int]) -> None:
        wrong = [token for token in ids if not 0 <= token < self._vocabulary]
        if wrong:
            raise RequestError(
                f"{what} holds the token id {wrong[0]}; the vocabulary has {self._vocabulary}"
            )

    def _send_headers(self) -> None:
        """Send the headers of all half-batches that are not in flight, in turn."""
        while not any(sent.half_batch == self._next_half_batch for sent in self._in_flight):
            scheduler = self.scheduler
            begins = self._next_half_batch == 0
            if begins:
                scheduler.admit()
                work = (scheduler.decoding, scheduler.prompt_rows)
                self._round_size = self._rounds.choose(*work)
            chunks = scheduler.choose(self._round_size, self._round_size - self._next_half_batch)
            if begins and not chunks:
                self._rounds.pause()
                return  # no round begins before there is something to do
            self._send_header(chunks)
            self._next_half_batch = (self._next_half_batch + 1) % self._round_size

    def _send_header(self, chunks: Sequence[Chunk]) -> None:
        """Send the header of the next half-batch to every device."""
        began = time.perf_counter()
        self._step += 1
        deadline = time.monotonic() + self._step_seconds
        number = self._next_half_batch
        header = header_of(
            chunks,
            epoch=self.epoch,
            step=self._step,
            half_batch=number,
            half_batches=self._round_size,
        )
        if chunks:
            if not self._in_flight:
                self._marked = time.perf_counter()
            prefill = any(chunk.rows > 1 for chunk in chunks)
            sent = _InFlight(self._step, number, chunks, prefill, deadline)
            self._in_flight.append(sent)
            self.timings.half_batches += self._round_size > 1
        for name, sender in self._wires.control.items():
            while True:
                try:
                    sender.send(header, SLICE_SECONDS)
                    break
                except LinkFullError:
                    self._look_after(f"device {name} to take a step's header", deadline)
        if self.trace.on:
            self.trace.add(EventKind.HEADER, -1, self._step, number, began)

    def _complete_round(self) -> None:
        """Devices wait for all headers of a round: send those that are missing, empty."""
        while self._next_half_batch:
            self._send_header(())
            self._next_half_batch = (self._next_half_batch + 1) % self._round_size

    def _receive_result(self) -> Record:
        """Wait for what the oldest half-batch in flight yields."""
        sent = self._in_flight[0]
        began = time.perf_counter()
        while True:
            record = self._wires.results.receive(SLICE_SECONDS)
            if record is None:
                self._look_after(f"the result of step {sent.step}", sent.deadline)
            elif (record.epoch, record.step) == (self.epoch, sent.step):
                if self.trace.on:
                    self.trace.received(record, began)
                return record
            else:
                raise LinkError(f"waited for step {sent.step}, found {describe(record)}")

    def _look_after(self, what: str, deadline: float) -> None:
        """Between two waits: are all devices alive, and is there time left?"""
        if self._stopping:
            raise RunError("this engine was shut down")
        self.fleet.check()
        if time.monotonic() > deadline:
            raise LinkError(f"waited {self._step_seconds:.0f} s for {what}: a device hangs")

    def _take(self, record: Record) -> list[Output]:
        """Hand the tokens of the oldest half-batch to their sequences."""
        began = time.perf_counter()
        sent = self._in_flight.popleft()
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
                outputs += [Output(chunk.sequence, token) for token in tokens]
                self._end_if_complete(chunk.sequence)
        if self.trace.on:
            self.trace.add(EventKind.TOKENS, -1, sent.step, sent.half_batch, began)
        return outputs

    def _count(self, sent: _InFlight) -> None:
        """Account the time since the last result, or since something was sent."""
        now = time.perf_counter()
        seconds, self._marked = now - self._marked, now
        rows = sum(chunk.rows for chunk in sent.chunks)
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
