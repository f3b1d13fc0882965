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
from raygraft.cli.report import err, progress
from raygraft.graph.errors import RequestError
from raygraft.llm import LLM


def chat(
    system: Annotated[
        str | None, typer.Option("--system", help="A system message to begin with.")
    ] = None,
    model: o.ModelOption = None,
    ctx_size: o.ContextOption = None,
    n_predict: o.PredictOption = 512,
    temp: o.TemperatureOption = 0.8,
    top_k: o.TopKOption = 40,
    top_p: o.TopPOption = 0.95,
    min_p: o.MinPOption = 0.05,
    repeat_penalty: o.RepeatPenaltyOption = 1.0,
    seed: o.SeedOption = -1,
    device: o.DeviceOption = None,
    devices: o.DevicesOption = None,
    place: o.PlaceOption = None,
    region: o.RegionOption = None,
    override_tensor: o.OverrideOption = None,
    threads: o.ThreadsOption = None,
    address: o.AddressOption = None,
    on_loss: o.OnLossOption = "replace",
    name: o.NameOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Talk with a model, by its own chat template.

    A line is a message. Ctrl-C ends an answer, Ctrl-D or /exit the conversation, /clear forgets
    it. With --json the whole conversation is printed at the end.
    """
    params = SamplingParams(
        temperature=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repeat_penalty,
        seed=None if seed < 0 else seed,
        max_tokens=None if n_predict < 0 else n_predict,
    )
    settings = o.configuration(devices, device, place, threads, region, override_tensor)
    with progress(quiet=as_json) as say:
        llm = LLM(
            model,
            devices=settings.devices,
            place=settings.rules,
            regions=settings.regions,
            override_tensor=settings.override_tensor,
            address=address,
            ctx_size=ctx_size,
            on_loss=on_loss,
            name=name,
            progress=say,
        )
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with llm:
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
