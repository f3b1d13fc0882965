"""`raygraft run`: answer one prompt."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from raygraft.actors.request import SamplingParams
from raygraft.actors.timeline import check_path
from raygraft.cli import options as o
from raygraft.cli.groups import Loading, Sampling, grouped
from raygraft.cli.report import err, out, plan_line, print_plan
from raygraft.completion import Completion
from raygraft.graph.errors import ConfigurationError
from raygraft.llm import LLM
from raygraft.speeds import Timings


@grouped
def run(
    loading: Loading,
    sampling: Sampling,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt.")] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")
    ] = None,
    n_predict: o.PredictOption = 128,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends the answer, repeated.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", min=0, help="With --json: so many log probabilities a token."),
    ] = None,
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
    params = sampling.params(n_predict, stop=tuple(stop or ()), logprobs=logprobs)
    with loading.loaded(
        lambda model: model.check_prompt(model.encode(text), loading.ctx_size), quiet=as_json
    ) as llm:
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
