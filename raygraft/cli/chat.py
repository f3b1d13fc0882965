"""`raygraft chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from raygraft.actors.request import SamplingParams
from raygraft.cli import options as o
from raygraft.cli.groups import Loading, Sampling, grouped
from raygraft.cli.report import err
from raygraft.graph.errors import RequestError
from raygraft.llm import LLM
from raygraft.model import Model


@grouped
def chat(
    loading: Loading,
    sampling: Sampling,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message to begin with.")
    ] = None,
    n_predict: o.PredictOption = 512,
    as_json: o.JsonOption = False,
) -> None:
    """Talk with a model, by its own chat template.

    A line is a message. Ctrl-C ends an answer, Ctrl-D or /exit the conversation, /clear forgets
    it. With --json the whole conversation is printed at the end.
    """
    params = sampling.params(n_predict)
    opening = [{"role": "system", "content": system}] if system else []

    def check(model: Model) -> None:
        if opening:
            model.check_prompt(model.encode_chat(opening), loading.ctx_size)

    messages = list(opening)
    with loading.loaded(check, quiet=as_json) as llm:
        while (line := _read_line()) is not None:
            if line == "/clear":
                messages = list(opening)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    answer = _answer(llm, messages, params, quiet=as_json)
                except RequestError as error:
                    err.print(f"error: {error}", markup=False)
                    messages.pop()
                    continue
                messages.append({"role": "assistant", "content": answer})
    if as_json:
        print(json.dumps({"messages": messages}, ensure_ascii=False, indent=1))


def _read_line() -> str | None:
    """The next message; None at the end of the input or of the conversation."""
    if sys.stdin.isatty():
        err.print("> ", end="", style="bold")
    line = sys.stdin.readline()
    text = line.strip()
    return None if not line or text in ("/exit", "/quit") else text


def _answer(
    llm: LLM, messages: list[dict[str, str]], params: SamplingParams, *, quiet: bool
) -> str:
    """Stream one answer; Ctrl-C ends it early, and what is there counts."""
    parts: list[str] = []
    with _interrupts() as interrupted:
        for chunk in llm.stream(llm.encode_chat(messages), params):
            parts.append(chunk.text)
            if not quiet:
                print(chunk.text, end="", flush=True)
            if interrupted.is_set():
                break  # between two steps, so that the next answer finds the engine whole
    if not quiet:
        print()
    return "".join(parts)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising; a second one raises as usual."""
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
