"""`raygraft bench`: how fast a model is on its devices, as llama-bench measures it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

import raygraft
from raygraft.benchmark import ModelSummary, Samples, Workload, time_workload, warm_up, workloads_of
from raygraft.cli import options as o
from raygraft.cli.report import progress
from raygraft.configuration import Configuration
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.operators import DEFAULT_CACHE_TYPE, CacheType
from raygraft.kernels.base import Description
from raygraft.kernels.host import processor_name
from raygraft.llm import LLM
from raygraft.model import Model, Progress
from raygraft.placement.costs import size
from raygraft.placement.schedule import used_devices

_TESTS = "Tests"


def bench(
    model: o.ModelOption = None,
    cache_type: o.CacheTypeOption = DEFAULT_CACHE_TYPE,
    n_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--n-prompt",
            metavar="N,...",
            help="Prompt lengths, a list or repeated; 0 is none.  [default: 512]",
            rich_help_panel=_TESTS,
        ),
    ] = None,
    n_gen: Annotated[
        list[str] | None,
        typer.Option(
            "-n",
            "--n-gen",
            metavar="N,...",
            help="Tokens to generate, a list or repeated; 0 is none.  [default: 128]",
            rich_help_panel=_TESTS,
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            "-b",
            "--batch",
            metavar="N,...",
            help="Sequences at once, a list or repeated.  [default: 1]",
            rich_help_panel=_TESTS,
        ),
    ] = None,
    ubatch_size: Annotated[
        int | None,
        typer.Option(
            "-ub",
            "--ubatch-size",
            min=1,
            help="Most rows of one step: longer prompts take several.  [default: 128, or 256 "
            "where a device is no CPU]",
            rich_help_panel=_TESTS,
        ),
    ] = None,
    threads: Annotated[
        list[str] | None,
        typer.Option(
            "-t",
            "--threads",
            metavar="N,...",
            help="Threads of each device that names none itself, a list or repeated; the model is "
            "loaded anew for each.  [default: the cores, shared]",
            rich_help_panel=_TESTS,
        ),
    ] = None,
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, rich_help_panel=_TESTS)
    ] = 5,
    no_warmup: Annotated[
        bool,
        typer.Option(
            "--no-warmup", help="Leave out the run that is not counted.", rich_help_panel=_TESTS
        ),
    ] = False,
    device: o.DeviceOption = None,
    devices: o.DevicesOption = None,
    place: o.PlaceOption = None,
    region: o.RegionOption = None,
    override_tensor: o.OverrideOption = None,
    address: o.AddressOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Measure prompts (pp) and generation (tg) apart, as llama-bench does, on any devices.

    A row says tokens per second, mean and standard deviation over the repetitions, all sequences
    together; prompts are random tokens. The times are the engine's: text is left out.

    raygraft bench -p 512 -n 128 -t 1,2 -b 1,8

    raygraft bench --device a --device b --place kind:attention=a --place kind:ffn=b -t 1
    """
    batches = _numbers("-b", batch, "1", least=1)
    workloads = workloads_of(_numbers("-p", n_prompt, "512"), _numbers("-n", n_gen, "128"), batches)
    if not workloads:
        raise ConfigurationError("nothing to measure: -p and -n are both 0")
    counts: list[int | None] = [*_numbers("-t", threads, "", least=1)] or [None]
    setups = [o.configuration(devices, device, place, n, region, override_tensor) for n in counts]
    table = None if as_json else _Table(setups[0], batches)
    rows: list[dict[str, Any]] = []
    with progress() as say:
        loaded = Model(model, say)
        for settings in setups:
            with _load(loaded, settings, workloads, ubatch_size, cache_type, address, say) as llm:
                frame = _frame(llm, settings, cache_type)
                for workload in workloads:
                    say(f"{workload.name}, {workload.batch} at once")
                    samples = _measure(llm, workload, repetitions, not no_warmup)
                    rows.append(frame | samples.fields() | {"n_batch": workload.batch})
                    if table:
                        table.add(rows[-1], samples)
    if as_json:
        print(json.dumps({"model": loaded.file.path.name, "results": rows}, indent=1))


def _numbers(option: str, texts: Sequence[str] | None, default: str, least: int = 0) -> list[int]:
    """The numbers of a list option, given at once or one by one. Raises ConfigurationError."""
    items = [item.strip() for text in texts or [default] for item in text.split(",") if item]
    wrong = [item for item in items if not item.isdecimal() or int(item) < least]
    if wrong or (texts and not items):
        raise ConfigurationError(
            f"{option} {','.join(texts or ())}: expected whole numbers from {least} on, "
            "separated by commas"
        )
    return list(dict.fromkeys(map(int, items)))


def _load(
    model: Model,
    settings: Configuration,
    workloads: Sequence[Workload],
    max_rows: int | None,
    cache_type: CacheType,
    address: str | None,
    say: Progress,
) -> LLM:
    sequences = max(workload.batch for workload in workloads)
    return LLM(
        model,
        devices=settings.devices,
        place=settings.rules,
        regions=settings.regions,
        override_tensor=settings.override_tensor,
        address=address,
        ctx_size=max(workload.context for workload in workloads),
        max_sequences=sequences,
        max_rows=max_rows and max(max_rows, sequences),
        cache_type=cache_type,
        progress=say,
    )


def _measure(llm: LLM, workload: Workload, repetitions: int, warm: bool) -> Samples:
    if warm:
        warm_up(llm, workload)
    return Samples(workload, tuple(time_workload(llm, workload) for _ in range(repetitions)))


def _frame(llm: LLM, settings: Configuration, cache_type: CacheType) -> dict[str, Any]:
    """What all rows of one loading share; names as in llama-bench where it has them."""
    file = llm.model.file
    summary = ModelSummary.of(file)
    said = llm.engine_thread.engine.fleet.describe()
    used = {name: said[name][1] for name in used_devices(llm.plan.stages)}
    return {
        "raygraft_version": raygraft.__version__,
        "cpu_info": processor_name(),
        "backends": "+".join(dict.fromkeys(what.backend for what in used.values())),
        "model_filename": str(file.path),
        "model_type": summary.type,
        "model_size": summary.nbytes,
        "model_n_params": summary.parameters,
        "n_ubatch": llm.plan.limits.max_rows,
        "n_threads": sum(what.threads for what in used.values()),
        "type_k": cache_type,
        "type_v": cache_type,
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "devices": [_device(name, what) for name, what in used.items()],
        "rules": [*(f"-ot {text}" for text in settings.override_tensor), *map(str, settings.rules)],
        "hops_per_token": llm.plan.hops,
        "load_s": llm.timings().load_s,
    }


def _device(name: str, what: Description) -> dict[str, object]:
    return {
        "name": name,
        "backend": what.backend,
        "type": what.type,
        "hardware": what.hardware,
        "threads": what.threads,
    }


class _Table:
    """Results as a Markdown table, a row as soon as it is there."""

    def __init__(self, settings: Configuration, batches: Sequence[int]) -> None:
        self._several = len(settings.devices) > 1
        self._ruled = bool(settings.rules or settings.override_tensor)
        self._batched = batches != [1]
        self._begun = False

    def add(self, row: Mapping[str, Any], samples: Samples) -> None:
        """Print a row, before the first one the head."""
        columns = self._columns(row, samples)
        if not self._begun:
            self._begun = True
            self._print(f"{title:>{width}}" for title, _, width in columns)
            self._print("-" * (width - 1) + ":" for _, _, width in columns)
        self._print(f"{text:>{width}}" for _, text, width in columns)

    def _columns(self, row: Mapping[str, Any], samples: Samples) -> list[tuple[str, str, int]]:
        """Titles, texts and least widths, as llama-bench has them; ours where they say much."""
        devices = row["devices"]
        columns = [
            ("model", row["model_type"], 24),
            ("size", size(row["model_size"]), 10),
            ("params", f"{row['model_n_params'] / 1e6:.2f} M", 10),
            ("backend", row["backends"], 10),
            ("threads", "+".join(str(device["threads"]) for device in devices), 7),
        ]
        if self._several:
            columns.append(("devices", "+".join(device["name"] for device in devices), 12))
        if self._ruled:
            columns.append(("rules", " ".join(row["rules"]).replace("|", "\\|"), 12))
        if self._batched:
            columns.append(("n_batch", str(row["n_batch"]), 7))
        rate = f"{samples.rate:.2f} ± {samples.rate_deviation:.2f}"
        return [*columns, ("test", samples.workload.name, 12), ("t/s", rate, 20)]

    def _print(self, cells: Iterable[str]) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)
