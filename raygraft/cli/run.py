"""`raygraft run`: answer one prompt."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from raygraft.actors.request import SamplingParams
from raygraft.actors.timeline import check_path
from raygraft.cli import options as o
from raygraft.cli.report import err, out, plan_line, print_plan, progress
from raygraft.completion import Completion
from raygraft.graph.errors import ConfigurationError
from raygraft.llm import LLM, Timings
from raygraft.verification import print_warnings_as_lines


def run(
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt.")] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")
    ] = None,
    model: o.ModelOption = None,
    ctx_size: o.ContextOption = None,
    n_predict: o.PredictOption = 128,
    temp: o.TemperatureOption = 0.8,
    top_k: o.TopKOption = 40,
    top_p: o.TopPOption = 0.95,
    min_p: o.MinPOption = 0.05,
    repeat_penalty: o.RepeatPenaltyOption = 1.0,
    seed: o.SeedOption = -1,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends the answer, repeated.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", min=0, help="With --json: so many log probabilities a token."),
    ] = None,
    device: o.DeviceOption = None,
    devices: o.DevicesOption = None,
    place: o.PlaceOption = None,
    region: o.RegionOption = None,
    override_tensor: o.OverrideOption = None,
    threads: o.ThreadsOption = None,
    address: o.AddressOption = None,
    verify: o.VerifyOption = False,
    on_loss: o.OnLossOption = "replace",
    name: o.NameOption = None,
    show_plan: Annotated[
        bool, typer.Option("--show-plan", help="Print the plan above the answer.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Write a timeline of the answer: who computed, waited and sent what when. "
            "FILE.json opens in https://ui.perfetto.dev, FILE.parquet holds the same as rows.",
        ),
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Answer one prompt. Without -m, a small demo model is fetched and used.

    Example, attention on one device and feed-forward on another:

    raygraft run -p "Once upon a time" --device a --device b
    --place kind:attention=a --place kind:ffn=b
    """
    text = _prompt(prompt, file)
    if trace is not None:
        check_path(trace)
    params = SamplingParams(
        temperature=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repeat_penalty,
        seed=None if seed < 0 else seed,
        max_tokens=None if n_predict < 0 else n_predict,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    settings = o.configuration(devices, device, place, threads, region, override_tensor)
    with progress(quiet=as_json) as say, warnings.catch_warnings():
        print_warnings_as_lines()
        llm = LLM(
            model,
            devices=settings.devices,
            place=settings.rules,
            regions=settings.regions,
            override_tensor=settings.override_tensor,
            address=address,
            ctx_size=ctx_size,
            verify=verify,
            on_loss=on_loss,
            name=name,
            progress=say,
        )
    with llm:
        if trace is not None:
            llm.start_trace()
        if as_json:
            completion = llm.generate(text, params)[0]
            print(json.dumps(_document(llm, completion), ensure_ascii=False, indent=1))
            _write_timeline(llm, trace)
            return
        if show_plan:
            print_plan(llm.plan, llm.graph)
            out.print()
        _print_answer(llm, text, params)
        _print_timings(llm.timings(), plan_line(llm.plan))
        _write_timeline(llm, trace)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ConfigurationError("give the prompt with -p/--prompt, or its file with -f/--file")
    if file is None:
        return prompt or ""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: cannot be read as a text: {error}") from error


def _print_answer(llm: LLM, text: str, params: SamplingParams) -> None:
    shown = text  # with the first token: a prompt that is refused is not shown
    for chunk in llm.stream(text, params):
        print(shown + chunk.text, end="", flush=True)
        shown = ""
    print()


def _print_timings(timings: Timings, line: str) -> None:
    busy = ", ".join(f"{name} {share:.0%}" for name, share in timings.device_busy.items())
    err.print(
        f"loaded in {timings.load_s:.1f} s; prompt {timings.prefill_tps:.0f} tokens/s, "
        f"decode {timings.decode_tps:.1f} tokens/s; computing: {busy}; "
        f"{timings.hop_us:.0f} us a hop\n{line}",
        style="dim",
        soft_wrap=True,
    )


def _write_timeline(llm: LLM, path: Path | None) -> None:
    if path is None:
        return
    timeline = llm.timeline()
    timeline.write(path)
    said = f"{path}: {len(timeline.events)} events"
    dropped = [f"{count} of {track}" for track, count in timeline.dropped.items() if count]
    if dropped:
        said += f"; the oldest had to go: {', '.join(dropped)}"
    err.print(said, style="dim", soft_wrap=True, markup=False)


def _document(llm: LLM, completion: Completion) -> dict[str, object]:
    document: dict[str, object] = {
        "text": completion.text,
        "prompt_tokens": completion.prompt_token_ids,
        "tokens": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "timings": asdict(llm.timings()),
        "plan": llm.plan.to_dict(),
    }
    if completion.logprobs is not None:
        document["logprobs"] = completion.logprobs
    return document
