"""llama.cpp's `-ot/--override-tensor REGEX=BUFFER`, as rules about regions.

There a pattern moves single tensors, and the first that matches wins. Here the tensors of a region
go together: a region goes where the matrices of its products go. Vectors, such as those of norms,
tear nothing apart; a region without matrices, as an attention's core, goes with the others of its
parent when those all go to one device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from raygraft.graph.errors import ConfigurationError
from raygraft.graph.graph import Graph, Region
from raygraft.graph.selectors import Selector, Term
from raygraft.placement.devices import DeviceSpec
from raygraft.placement.rules import Rule

CPU_BACKENDS = ("cpu", "reference")
GPU_BACKENDS = ("cuda",)
_GPU = re.compile(r"CUDA(\d*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Override:
    """One pattern over tensor names, and the device that it sends them to."""

    text: str
    pattern: re.Pattern[str]
    device: str


def parse_overrides(texts: Sequence[str], devices: Sequence[DeviceSpec]) -> list[Override]:
    """Read options of the form `REGEX=BUFFER[,REGEX=BUFFER]`. Raises ConfigurationError."""
    overrides = []
    for text in (part.strip() for option in texts for part in option.split(",")):
        pattern, separator, buffer = text.partition("=")
        if not (pattern and separator and buffer):
            raise ConfigurationError(
                f"-ot {text!r}: expected REGEX=DEVICE, such as 'ffn_.*=CPU' or 'blk.0.=gpu0'"
            )
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ConfigurationError(f"-ot {text!r}: no regular expression: {error}") from error
        overrides.append(Override(text, compiled, find_device(text, buffer, devices)))
    return overrides


def find_device(text: str, buffer: str, devices: Sequence[DeviceSpec]) -> str:
    """The device that a buffer's name means: its name, else CPU or CUDA with its number."""
    names = {spec.name.lower(): spec.name for spec in devices}
    if buffer.lower() in names:
        return names[buffer.lower()]
    gpu = _GPU.fullmatch(buffer)
    if gpu:
        found = [spec.name for spec in devices if spec.backend in GPU_BACKENDS]
        number = int(gpu[1] or 0)
    else:
        found = [spec.name for spec in devices if spec.backend in CPU_BACKENDS]
        number = 0 if buffer.upper() == "CPU" else len(found)
    if number < len(found):
        return found[number]
    there = ", ".join(f"{spec.name} ({spec.backend})" for spec in devices)
    raise ConfigurationError(f"-ot {text!r}: no device is meant by {buffer!r}; there are {there}")


def override_rules(graph: Graph, overrides: Sequence[Override]) -> tuple[Rule, ...]:
    """Rules that put every region where its matrices are sent.

    Raises ConfigurationError for a pattern that matches no tensor, and for a region whose matrices
    are sent to different places.
    """
    for override in overrides:
        if not any(override.pattern.search(tensor) for tensor in graph.tensors):
            raise ConfigurationError(f"-ot {override.text!r} matches no tensor of the model")
    targets: dict[str, Override] = {}
    for leaf in graph.leaves:
        target = _target(graph, leaf, overrides)
        if target is None and not _matrices(graph, leaf) and leaf.parent is not None:
            target = _common(graph, graph.regions[leaf.parent], overrides)
        if target is not None:
            targets[leaf.name] = target
    rules = []
    for override in overrides:
        names = [name for name, target in targets.items() if target is override]
        if names:
            terms = tuple(Term.parse(name, name) for name in names)
            rules.append(
                Rule(Selector(f"-ot {override.pattern.pattern}", terms), (override.device,))
            )
    return tuple(rules)


def _matrices(graph: Graph, region: Region) -> list[str]:
    """Names of the tensors with rows and columns that a region reads."""
    weights = graph.subgraph(region.operators).weights
    names = dict.fromkeys(weight.tensor for weight in weights)
    return [name for name in names if len(graph.tensors[name].shape) > 1]


def _first_match(tensor: str, overrides: Sequence[Override]) -> Override | None:
    return next((override for override in overrides if override.pattern.search(tensor)), None)


def _target(graph: Graph, region: Region, overrides: Sequence[Override]) -> Override | None:
    """Where a region's matrices are sent; None when nowhere."""
    matches = {name: _first_match(name, overrides) for name in _matrices(graph, region)}
    devices = {match.device if match else None for match in matches.values()}
    if len(devices) > 1:
        said = ", ".join(
            f"{name} to {match.device} (-ot {match.text!r})" if match else f"{name} nowhere"
            for name, match in matches.items()
        )
        raise ConfigurationError(
            f"the region {region.name} would be torn apart: {said}; "
            "name all of its matrices, or place the region with --place"
        )
    return next(iter(matches.values()), None)


def _common(graph: Graph, parent: Region, overrides: Sequence[Override]) -> Override | None:
    """What all matrices of a parent region are sent by, if they go to one device."""
    matches = [_first_match(name, overrides) for name in _matrices(graph, parent)]
    devices = {match.device if match else None for match in matches}
    return matches[0] if len(devices) == 1 else None
