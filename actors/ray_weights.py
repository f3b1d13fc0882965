"""Plans for Ray actors: weights come from files on their own machine, else the object store."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import ray

from raygraft.actors.journeys import NOTHING_STAYS, Staying
from raygraft.actors.part import ActorPart, actor_part_of
from raygraft.actors.ray_actors import RayActors, has_failed
from raygraft.actors.ray_device import raw_tensor
from raygraft.graph.errors import RaygraftError
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.graph.graph import Graph
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import used_actors

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


class PlanLoader:
    """Brings one plan to its actors, in one go or in two: what was prepared needs no long call."""

    def __init__(self, actors: RayActors, plan: Plan, graph: Graph, model: ModelFile) -> None:
        """Asks actors for the model's files, and puts weights into the store for those without."""
        self._actors = actors
        self._of = plan, graph
        self._parts = {name: actor_part_of(plan, graph, name, 0) for name in used_actors(plan)}
        has = have_files(actors, model, self._parts)
        tensors = {name: part.tensors for name, part in self._parts.items() if not has[name]}
        weights = MappedWeights(model.files, model.tensors)
        stored = {
            tensor: ray.put(raw_tensor(weights, tensor))
            for tensor in sorted({tensor for own in tensors.values() for tensor in own})
        }
        self._sources: dict[str, tuple[Any, dict[str, Any]]] = {
            name: (None, {tensor: stored[tensor] for tensor in tensors[name]})
            if name in tensors
            else (model.files, {})
            for name in self._parts
        }
        """By actor: files, or tensors in the object store."""
        self._prepared: Mapping[str, Any] = {}
        """The actors that have their parts by now: who has died since then has another handle."""

    def brings(self, plan: Plan, graph: Graph) -> bool:
        """Whether it is for this very plan."""
        return self._of[0] is plan and self._of[1] is graph

    def parts(self, epoch: int) -> dict[str, ActorPart]:
        """By actor, of the plan in an epoch."""
        return {name: replace(part, epoch=epoch) for name, part in self._parts.items()}

    def prepare(self, failed: set[str]) -> None:
        """Let actors prepare their parts. `failed` gets those that raise an error."""
        calls = {
            name: self._actors[name].prepare.remote(part, *self._sources[name])
            for name, part in self._parts.items()
        }
        self._ask(calls, failed)
        self._prepared = {name: self._actors[name] for name in calls}

    def load(self, epoch: int, staying: Mapping[str, Staying], failed: set[str]) -> bool:
        """Let actors load their parts; whether all is in their caches that stays there."""
        calls = {}
        for name, part in self.parts(epoch).items():
            actor, own = self._actors[name], staying.get(name, NOTHING_STAYS)
            knows = self._prepared.get(name) is actor
            load, what = (actor.load_prepared, epoch) if knows else (actor.load, part)
            calls[name] = load.remote(what, *self._sources[name], own)
        return all(self._ask(calls, failed).values())

    def _ask(self, calls: Mapping[str, Any], failed: set[str]) -> dict[str, Any]:
        try:
            return self._actors.ask(calls, LOAD_SECONDS, watched=True)
        except RaygraftError:
            failed.update(name for name, call in calls.items() if has_failed(call))
            raise
