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
        has = self._has
        tensors = () if all(has[name] for name in names) else trial.check.tensors
        stored = {tensor: ray.put(raw_tensor(self._weights, tensor)) for tensor in tensors}
        shared = ray.put(trial)
        calls = {
            name: self._actors[name].check.remote(
                shared, self._files if has[name] else None, {} if has[name] else stored
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
            return check.result(Outcome.FAILED, detail=str(self._actors.translated(name, error)))
        self._actors.kill([name])
        self._actors.start([name])
        return check.result(Outcome.FAILED, detail=detail)
