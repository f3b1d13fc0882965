"""Verifying devices that are Ray actors: checks with deadlines, and a new actor after a hang."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from raygraft.actors.ray_actors import RayActors
from raygraft.actors.ray_device import raw_tensor
from raygraft.graph.gguf_file import MappedWeights, ModelFile
from raygraft.kernels.verification.checks import Check, CheckResult, Outcome
from raygraft.kernels.verification.trial import Trial


class RayChecks:
    """One attempt at a trial on several devices after the other."""

    def __init__(
        self, actors: RayActors, model: ModelFile, has_files: Mapping[str, bool], deadline: float
    ) -> None:
        self._actors = actors
        self._files = model.files
        self._weights = MappedWeights(model.files, model.tensors)
        self._has = has_files
        self._deadline = deadline

    def __call__(self, trial: Trial, names: Sequence[str]) -> dict[str, CheckResult]:
        results: dict[str, CheckResult] = {}
        while left := [name for name in names if name not in results]:  # one of each actor at once
            first = {self._actors.actor_of[name]: name for name in reversed(left)}
            results |= self._at_once(trial, tuple(first.values()))
        return results

    def _at_once(self, trial: Trial, names: Sequence[str]) -> dict[str, CheckResult]:
        actor_of = self._actors.actor_of
        has = {name: self._has[actor_of[name]] for name in names}
        tensors = () if all(has.values()) else trial.check.tensors
        stored = {tensor: ray.put(raw_tensor(self._weights, tensor)) for tensor in tensors}
        shared = ray.put(trial)
        calls = {
            name: self._actors[actor_of[name]].check.remote(
                name, shared, self._files if has[name] else None, {} if has[name] else stored
            )
            for name in names
        }
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=self._deadline)
        return {name: self._result(name, call, trial.check) for name, call in calls.items()}

    def _result(self, name: str, call: Any, check: Check) -> CheckResult:
        """The result of a check that was given its time; a device that is stuck starts anew."""
        try:
            result: CheckResult = ray.get(call, timeout=0.1)
            return result
        except GetTimeoutError:
            detail = f"no answer within {self._deadline:g} s"
        except RayActorError:
            detail = "its process died"
        except RayError as error:
            said = str(self._actors.translated(self._actors.actor_of[name], error))
            return check.result(Outcome.FAILED, detail=said)
        self._actors.restart(self._actors.actor_of[name])
        return check.result(Outcome.FAILED, detail=detail)
