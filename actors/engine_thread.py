"""The engine on a thread of its own, for callers on any thread.

The thread steps while there is something to do, and sleeps at no cost when there is not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from raygraft.actors.engine import Engine, Output
from raygraft.actors.events import tell
from raygraft.actors.recovery import Recovery
from raygraft.actors.request import FinishReason, GeneratedSequence, SamplingParams, Token
from raygraft.actors.trace import EventKind
from raygraft.graph.errors import RaygraftError, RunError

T = TypeVar("T")
PATIENCE_SECONDS = 5.0
"""How long a shutdown waits for a recovery that is under way."""
Observer = Callable[[Token | None], bool]
"""Called on the engine's thread with each token, or None when the sequence ended without one;
what it returns says whether the answer is complete ("stop")."""


class Request:
    """A request in the engine's hands: iterate over it for its tokens, each handed out once."""

    def __init__(
        self,
        thread: EngineThread,
        sequence: GeneratedSequence,
        observe: Observer,
        notify: Callable[[], None],
    ) -> None:
        """`notify` is called on the engine's thread when a token has come, and at the end."""
        self.sequence = sequence
        self._notify = notify
        self._thread = thread
        self._observe = observe
        self._tokens: SimpleQueue[Token | None] = SimpleQueue()
        self._ended = threading.Event()
        self._error: BaseException | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """None as long as it grows."""
        return self.sequence.finish_reason

    def __iter__(self) -> Iterator[Token]:
        """Wait for each token. Raises what ended the engine, or the observer."""
        while (token := self._tokens.get()) is not None:
            yield token
        self._tokens.put(None)  # for whoever asks again
        self.wait()

    def wait(self) -> None:
        """Wait for the end. Raises what ended the engine, or the observer."""
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End it soon, if it has not ended; it is not waited for."""
        if not self._ended.is_set():
            self._thread.cancel(self)

    def take(self, token: Token | None) -> bool:
        """A token has come, or the end without one; whether the answer is complete with it."""
        try:
            complete = self._observe(token)
        except Exception as error:  # noqa: BLE001  # belongs to whoever waits for this request
            self._error, complete = error, True
        if token is not None:
            self._tokens.put(token)
            self._notify()
        return complete

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come."""
        if not self._ended.is_set():
            self._error = self._error or error
            self._ended.set()
            self._tokens.put(None)
            self._notify()


class EngineThread:
    """Runs an engine for many callers. From now on only its thread may step the engine."""

    def __init__(self, engine: Engine, recovery: Recovery | None = None) -> None:
        """`recovery` mends the engine when a device is lost; without it every request fails."""
        self.engine = engine
        self.recovery = recovery
        self._changed = threading.Condition()
        self._arrived: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._actions: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._requests: dict[GeneratedSequence, Request] = {}
        self._outputs: list[Output] = []
        """Of the last step: handed out while the devices compute the next one."""
        self._outputs_of = 0
        self._closing = False
        self._looks = False
        engine.fleet.watch(self._notice)
        self._thread = threading.Thread(target=self._run, name="raygraft engine", daemon=True)
        self._thread.start()

    def request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        observe: Observer = lambda _: False,
        notify: Callable[[], None] = lambda: None,
        scoring: bool = False,
    ) -> Request:
        """Check a request, without starting it. Raises RequestError."""
        sequence = self.engine.prepare(prompt, params, scoring=scoring)
        return Request(self, sequence, observe, notify)

    def start(self, requests: Sequence[Request]) -> None:
        """Start requests together: none of them is a step ahead of the others.

        Raises QueueFullError, and what ended the engine; then none has started.
        """
        with self._changed:
            self._check()
            self.engine.scheduler.check_room(len(self._arrived) + len(requests))
            self._arrived.extend(requests)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify()

    def call(self, action: Callable[[], T]) -> T:
        """Have the engine's thread do something when nothing is in flight; what it returns.

        Raises what the action raises, and what ended the engine.
        """
        result: Future[T] = Future()
        with self._changed:
            self._check()
            self._actions.append((action, result))
            self._changed.notify()
        return result.result()

    def shutdown(self) -> None:
        """End the thread, all requests, and the engine with all that it started."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.engine.stop_waiting()
        if threading.current_thread() is not self._thread:
            self._thread.join(PATIENCE_SECONDS)
        self.engine.shutdown()

    def _notice(self) -> None:
        """A device has left its loop: with nothing to do, the thread looks why."""
        with self._changed:
            self._looks = True
            self._changed.notify()

    def _check(self) -> None:
        if self._closing:
            raise RunError("this engine was shut down")
        if self.engine.failure is not None and not self._mendable:
            raise self.engine.failure

    @property
    def _mendable(self) -> bool:
        return self.recovery is not None and self.recovery.policy != "fail"

    def _run(self) -> None:
        while self._wait_for_work():
            while self._arrived:
                request = self._arrived.popleft()
                self._requests[request.sequence] = request
                self.engine.accept(request.sequence)
                self._tell("request", request)
            if self._cancelled:
                self._hand_out()
            while self._cancelled:
                self._end(self._cancelled.popleft(), "cancelled")
            try:
                self._step_or_recover()
            except BaseException as error:  # noqa: BLE001  # handed to whoever waits
                self._fail(error)
            if not self.engine.busy:
                self._hand_out()
        self._fail(RunError("this engine was shut down"))

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the thread is to end."""
        with self._changed:
            self._changed.wait_for(self._has_work)
        return not self._closing

    def _has_work(self) -> bool:
        works = self.engine.busy and self.engine.failure is None
        asked = self._arrived or self._cancelled or self._actions or self._looks
        return works or self._closing or bool(asked)

    def _step_or_recover(self) -> None:
        """One step; after a loss, what it takes to go on. Raises when nothing helps."""
        looks, self._looks = self._looks, False
        before = self.engine.failure
        if before is not None:
            if self.recovery is None:
                raise before
            if self._requests or self._actions:
                self.recovery.look_again(before)
                self._end_forgotten()
            return
        try:
            if looks and not self.engine.busy:
                self.engine.look()
            if self._actions:
                self._act()
                self._end_forgotten()
            self._step()
        except RaygraftError as error:
            self._end_forgotten()
            if self.recovery is None or self._closing:
                raise
            self.recovery.recover(error)
            self._end_forgotten()

    def _step(self, sends: bool = True) -> None:
        outputs = self.engine.step(sends=sends, meanwhile=self._hand_out)
        self._outputs += outputs
        self._outputs_of = self.engine.trace.step

    def _act(self) -> None:
        """What others want done between two steps."""
        while self.engine.in_flight:
            self._step(sends=False)
        self._hand_out()
        while self._actions:
            action, result = self._actions.popleft()
            try:
                result.set_result(action())
            except BaseException as error:
                result.set_exception(error)
                if isinstance(error, RunError):  # devices have left their loops: mend that
                    self.engine.fail(error)
                    raise

    def _hand_out(self) -> None:
        """Give tokens to those who wait for them, and end those whose requests are complete."""
        outputs, self._outputs = self._outputs, []
        ended = []
        trace = self.engine.trace
        if self.recovery is not None and any(output.token is not None for output in outputs):
            self.recovery.progress()
        began = time.perf_counter()
        for output in outputs:
            request = self._requests.get(output.sequence)
            if request is None:
                continue
            if request.take(output.token):
                self.engine.cancel(output.sequence, "stop")
                output.sequence.finish_reason = "stop"
            if output.sequence.finished:
                ended.append(request)
        if trace.on and outputs:
            trace.add(EventKind.TEXT, -1, self._outputs_of, 0, began)
        for request in ended:  # a scored chunk has many outputs
            self._end(request, "stop")

    def _end_forgotten(self) -> None:
        """End requests of sequences that have ended without a word: a step that fails tells nothing
        of those whose time was over, nor does another plan of those that it has no room for."""
        self._hand_out()
        self._outputs = [Output(s, None) for s in self._requests if s.finished]
        self._hand_out()

    def _end(self, request: Request, reason: FinishReason) -> None:
        self.engine.cancel(request.sequence, reason)
        self._requests.pop(request.sequence, None)
        self._tell("end", request)
        request.end()

    def _tell(self, event: str, request: Request) -> None:
        sequence = request.sequence
        said = f"{len(sequence.prompt)} prompt tokens, {len(sequence.tokens)} generated"
        tell(event, said, epoch=self.engine.epoch, request=sequence.number)

    def _fail(self, error: BaseException) -> None:
        """Every request ends with an error; the engine is of no more use."""
        self._hand_out()
        with self._changed:
            requests = [*self._requests.values(), *self._arrived]
            while self._actions:
                self._actions.popleft()[1].set_exception(error)
            self._requests.clear()
            self._arrived.clear()
        for request in requests:
            self.engine.cancel(request.sequence)
            request.end(error)
