"""The engine: requests in, tokens out, one step of the whole plan at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from raygraft.actors.batch import Chunk, build_step, choose_chunks
from raygraft.actors.fleet import Fleet, Wires
from raygraft.actors.pages import PagePool
from raygraft.actors.records import Record, RecordKind, describe
from raygraft.actors.request import FinishReason, GeneratedSequence, SamplingParams, Token
from raygraft.graph.errors import LinkError, LinkFullError, RaygraftError, RequestError, RunError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.graph.step import step_to_arrays
from raygraft.placement.plan import Plan

SLICE_SECONDS = 0.2
"""How long one wait lasts before the engine looks whether all devices are alive."""
STEP_SECONDS = 600.0
"""Deadline of one step: a device that takes longer is taken for hanging."""


@dataclass(frozen=True, slots=True)
class Output:
    """A token that a sequence has grown by, or a position of it that was scored."""

    sequence: GeneratedSequence
    token: Token


@dataclass(slots=True)
class Timings:
    """Sums over all steps so far, in seconds and rows; a step with a prompt counts as prefill."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0


class Engine:
    """Steps a loaded plan. It is not thread-safe: one thread adds requests and steps."""

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        model: ModelFile,
        fleet: Fleet,
        *,
        end_of_generation: frozenset[int] = frozenset(),
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        self.plan = plan
        self.fleet = fleet
        self.timings = Timings()
        self.epoch = 1
        self._vocabulary = graph.dimensions.vocabulary
        self._end_of_generation = end_of_generation
        self._step_seconds = step_seconds
        self._pages = PagePool(plan.cache_blocks, plan.block_size)
        self._waiting: deque[GeneratedSequence] = deque()
        self._running: list[GeneratedSequence] = []
        self._sequences = 0
        self._step = 0
        self._deadline = 0.0
        self._failure: RaygraftError | None = None
        self._closed = False
        self._wires: Wires = fleet.load(plan, graph, model, self.epoch)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._running)

    def add(
        self, prompt: Sequence[int], params: SamplingParams, *, scoring: bool = False
    ) -> GeneratedSequence:
        """Accept a request. Raises RequestError when it can never be served."""
        sequence = GeneratedSequence(self._sequences, list(prompt), params, scoring)
        if not sequence.prompt:
            raise RequestError("the prompt is empty: there is no token to continue from")
        self._check_ids("the prompt", sequence.prompt)
        self._check_ids("logit_bias", list(params.logit_bias))
        context = min(self.plan.limits.context, self._pages.blocks * self._pages.block_size)
        if len(prompt) + (not scoring) > context:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and one more is to be generated, "
                f"the context holds {context}"
            )
        most = context if params.max_tokens is None else len(prompt) + params.max_tokens
        sequence.limit = min(context, most)
        self._sequences += 1
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: GeneratedSequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence now; later steps do not contain it."""
        if sequence.finish_reason is None:
            sequence.finish_reason = reason
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            self._release(sequence)

    def step(self) -> list[Output]:
        """One pass through all stages; the tokens that came out of it.

        Raises DeviceLostError, DeviceFailedError or LinkError; after that the engine is of no
        more use, and raises the same error again.
        """
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RunError("this engine was shut down")
        self._admit()
        chunks = choose_chunks(self._running, self.plan.limits.max_rows)
        if not chunks:
            return []
        began = time.perf_counter()
        try:
            self._send_header(chunks)
            record = self._receive_result()
        except RaygraftError as error:
            self._failure = error
            raise
        self._count(chunks, time.perf_counter() - began)
        return self._take(chunks, record)

    def shutdown(self) -> None:
        """End all loops, and everything that the fleet started."""
        if self._failure is None and not self._closed:
            self._closed = True
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

    def _admit(self) -> None:
        """Let waiting sequences run while there are pages for all that they may grow to."""
        while self._waiting and len(self._running) < self.plan.limits.max_sequences:
            pages = self._pages.needed(self._waiting[0].limit)
            if pages > self._pages.free:
                return
            sequence = self._waiting.popleft()
            sequence.pages = self._pages.take(pages)
            self._running.append(sequence)

    def _release(self, sequence: GeneratedSequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        self._pages.give_back(sequence.pages)
        sequence.pages = []

    def _send_header(self, chunks: Sequence[Chunk]) -> None:
        """Send the step's header to every device."""
        self._step += 1
        self._deadline = time.monotonic() + self._step_seconds
        arrays = step_to_arrays(build_step(chunks))
        header = Record(RecordKind.STEP, self.epoch, self._step, 0, 0, arrays)
        # If an interrupt ends this loop, some devices have the header and others have not.
        self._failure = RunError("a step was interrupted while it was sent; make a new LLM")
        for name, sender in self._wires.control.items():
            while True:
                try:
                    sender.send(header, SLICE_SECONDS)
                    break
                except LinkFullError:
                    self._look_after(f"device {name} to take a step's header")
        self._failure = None

    def _receive_result(self) -> Record:
        """Wait for what comes out at the other end of the plan."""
        while True:
            record = self._wires.results.receive(SLICE_SECONDS)
            if record is None:
                self._look_after(f"the result of step {self._step}")
            elif (record.epoch, record.step) == (self.epoch, self._step):
                return record
            elif record.step > self._step:
                raise LinkError(f"waited for step {self._step}, found {describe(record)}")
            # else the result of a step whose caller was interrupted: nobody waits for it

    def _look_after(self, what: str) -> None:
        """Between two waits: are all devices alive, and is there time left?"""
        self.fleet.check()
        if time.monotonic() > self._deadline:
            raise LinkError(f"waited {self._step_seconds:.0f} s for {what}: a device hangs")

    def _count(self, chunks: Sequence[Chunk], seconds: float) -> None:
        rows = sum(chunk.rows for chunk in chunks)
        if rows > len(chunks):
            self.timings.prefill_seconds += seconds
            self.timings.prefill_tokens += rows
        else:
            self.timings.decode_seconds += seconds
            self.timings.decode_tokens += rows
            self.timings.decode_steps += 1

    def _take(self, chunks: Sequence[Chunk], record: Record) -> list[Output]:
        """Hand the sampled tokens to their sequences."""
        ids, logprobs, top_ids, top_logprobs = record.tensors
        outputs = []
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.computed += chunk.rows
            for _ in range(chunk.logits):
                best = zip(top_ids[row].tolist(), top_logprobs[row].tolist(), strict=True)
                wanted = {token: value for token, value in best if token >= 0}
                token = Token(int(ids[row, 0]), float(logprobs[row, 0]), wanted)
                row += 1
                outputs.append(Output(sequence, token))
                self._grow(sequence, token)
        return outputs

    def _grow(self, sequence: GeneratedSequence, token: Token) -> None:
        if sequence.finish_reason is not None:
            return
        sequence.tokens.append(token)
        if sequence.scoring:
            if len(sequence.tokens) == len(sequence.prompt):
                self.cancel(sequence, "length")
            return
        sequence.ids.append(token.id)
        params = sequence.params
        ends = token.id in self._end_of_generation and not params.ignore_eos
        if ends or token.id in params.stop_token_ids:
            self.cancel(sequence, "stop")
        elif len(sequence.ids) >= sequence.limit:
            self.cancel(sequence, "length")
