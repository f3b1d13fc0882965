"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raygraft.actors.recovery import OnLoss
from raygraft.configuration import (
    Configuration,
    parse_devices,
    parse_regions,
    parse_rules,
    read_configuration,
)
from raygraft.graph.operators import CacheType
from raygraft.llm import DEFAULT_DEVICE

_MODEL = "Model"
_PLACES = "Devices and placement"
_SAMPLING = "Sampling"

ModelOption = Annotated[
    Path | None,
    typer.Option(
        "-m", "--model", help="A GGUF file. Default: the demo model.", rich_help_panel=_MODEL
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--ctx-size",
        min=1,
        help="Tokens of context. Default: what fits, at most what the model was trained for.",
        rich_help_panel=_MODEL,
    ),
]
CacheTypeOption = Annotated[
    CacheType,
    typer.Option(
        "--cache-type",
        help="How the cache of earlier tokens holds a number: f32 takes 4 bytes, f16 2, q8_0 about "
        "1 (8 bits, a scale for every 32); with the demo model 45, 22.5 or 12 KiB a token. Long "
        "contexts get faster; log probabilities move by some 0.001 with f16, 0.03 with q8_0.",
        rich_help_panel=_MODEL,
    ),
]
DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="NAME[:KEY=VALUE,...]",
        help="A device, repeated. Keys: backend, threads, memory (2GiB), "
        "regions (attention+head), node (a label, host or address of the cluster), "
        "gpu (its number), actor (devices of one name share an actor).",
        rich_help_panel=_PLACES,
    ),
]
DevicesOption = Annotated[
    Path | None,
    typer.Option(
        "--devices",
        "--cluster",
        metavar="FILE",
        help="Devices from a YAML file, or from a cluster.yaml.",
        rich_help_panel=_PLACES,
    ),
]
PlaceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--place",
        metavar="SELECTOR=DEVICE",
        help="A rule, repeated; the last that matches wins. "
        "'blk.[0-15].attn=gpu0', 'kind:ffn=a|b'.",
        rich_help_panel=_PLACES,
    ),
]
RegionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--region",
        metavar="NAME=SELECTOR",
        help="A region of your own, repeated: 'tail=blk.[28-29]+head'. --place may name it.",
        rich_help_panel=_PLACES,
    ),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(
        "-ot",
        "--override-tensor",
        metavar="REGEX=DEVICE",
        help="As in llama.cpp, by names of tensors; turned into rules that --place overrides. "
        "CPU and CUDA0 name devices by their backends.",
        rich_help_panel=_PLACES,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "-t",
        "--threads",
        min=1,
        help="Threads of each device that names none itself. Default: the cores, shared.",
        rich_help_panel=_PLACES,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_ADDRESS",
        help="Join this Ray cluster ('auto' finds a local one). Default: start one, and stop it.",
        rich_help_panel=_PLACES,
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="First check what the devices claim, as `raygraft verify` does, and plan without "
        "what fails.",
        rich_help_panel=_PLACES,
    ),
]
OnLossOption = Annotated[
    OnLoss,
    typer.Option(
        "--on-loss",
        help="When a device dies: start it anew, plan without it, or fail. Answers go on with the "
        "same tokens.",
        rich_help_panel=_PLACES,
    ),
]
SparesOption = Annotated[
    int,
    typer.Option(
        "--spares",
        min=0,
        help="Processes on each node that stand by for devices that die: a third of the time "
        "until answers go on, for the memory of an empty device each.",
        rich_help_panel=_PLACES,
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="Let `raygraft ctl --engine NAME` move regions while it runs.",
        rich_help_panel=_PLACES,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")
]
PredictOption = Annotated[
    int,
    typer.Option(
        "-n",
        "--n-predict",
        min=-1,
        help="Most tokens to generate; -1 goes on to the end of the context.",
        rich_help_panel=_SAMPLING,
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option("--temp", min=0, help="0 takes the best token.", rich_help_panel=_SAMPLING),
]
TopKOption = Annotated[
    int,
    typer.Option("--top-k", min=0, help="0 keeps all tokens.", rich_help_panel=_SAMPLING),
]
TopPOption = Annotated[float, typer.Option("--top-p", min=0, max=1, rich_help_panel=_SAMPLING)]
MinPOption = Annotated[float, typer.Option("--min-p", min=0, max=1, rich_help_panel=_SAMPLING)]
RepeatPenaltyOption = Annotated[
    float,
    typer.Option("--repeat-penalty", help="1 is none.", rich_help_panel=_SAMPLING),
]
SeedOption = Annotated[
    int,
    typer.Option("-s", "--seed", min=-1, help="-1 draws one.", rich_help_panel=_SAMPLING),
]


def configuration(
    devices: Path | None,
    device: list[str] | None,
    place: list[str] | None = None,
    threads: int | None = None,
    region: list[str] | None = None,
    override_tensor: list[str] | None = None,
) -> Configuration:
    """Devices and rules of a command; those of the command line come after those of the file."""
    given = read_configuration(devices) if devices else Configuration((), ())
    specs = parse_devices((*given.devices, *(device or ()))) or (DEFAULT_DEVICE,)
    if threads is not None:
        specs = tuple(spec.with_threads(threads) for spec in specs)
    return Configuration(
        specs,
        (*given.rules, *parse_rules(place)),
        {**given.regions, **parse_regions(region or ())},
        (*(override_tensor or ()), *given.override_tensor),
    )
