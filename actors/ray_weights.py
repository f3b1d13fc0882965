"""Weights for Ray actors: from the files on their own machine, else through the object store."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import ray

from raygraft.actors.part import ActorPart
from raygraft.actors.ray_actors import RayActors, has_failed
from raygraft.actors.ray_device import raw_tensor
from raygraft.graph.errors import RaygraftError
from raygraft.graph.gguf_file import MappedWeights, ModelFile

LOAD_SECONDS = 3600.0
"""Longest wait for weights: a large model from a slow disk takes its time."""


def have_files(actors: RayActors, model: ModelFile, names: Collection[str]) -> dict[str, bool]:
    """Which actors find the model's own files on their machine. Each is asked once."""
    asked = {name: (actors[name], model.files) for name in names}
    new = [name for name in names if actors.found_files.get(name, ((), False))[0] != asked[name]]
    if new:
        files = ray.put(model.files)
        said = actors.ask({name: actors[name].has_files.remote(files) for name in new})
        actors.found_files |= {name: (asked[name], found) for name, found in said.items()}
    return {name: actors.found_files[name][1] for name in names}


def load_parts(
    actors: RayActors,
    parts: Mapping[str, ActorPart],
    model: ModelFile,
    method: Literal["load", "prepare"],
    failed: set[str],
) -> None:
    """Let actors load or prepare their parts. `failed` gets those that raise an error."""
    has = have_files(actors, model, parts)
    missing = {name for actor in parts if not has[actor] for name in parts[actor].tensors}
    weights = MappedWeights(model.files, model.tensors)
    stored = {tensor: ray.put(raw_tensor(weights, tensor)) for tensor in sorted(missing)}
    calls = {}
    for name, part in parts.items():
        own = {} if has[name] else {tensor: stored[tensor] for tensor in part.tensors}
        calls[name] = getattr(actors[name], method).remote(
            part, model.files if has[name] else None, own
        )
    try:
        actors.ask(calls, LOAD_SECONDS, watched=True)
    except RaygraftError:
        failed.update(name for name, call in calls.items() if has_failed(call))
        raise
