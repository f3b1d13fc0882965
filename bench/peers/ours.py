"""Our side of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layers import balanced_split
from sides import Measured, Setup

from raygraft.benchmark import Workload, time_workload, warm_up
from raygraft.llm import LLM


class Raygraft:
    """Several loaded models, on one local Ray where they need one."""

    def __init__(self, setups: Sequence[Setup]) -> None:
        self._models: dict[str, LLM] = {}
        try:
            for setup in setups:
                self._models[setup.name] = _load(setup)
        except BaseException:
            self.close()
            raise

    def warm_up(self, setup: str, workload: Workload) -> None:
        warm_up(self._models[setup], workload)

    def measure(self, setup: str, workload: Workload) -> Measured:
        llm = self._models[setup]
        before = _run_seconds(llm)
        seconds = time_workload(llm, workload) / 1e9
        busy = {name: after - before[name] for name, after in _run_seconds(llm).items()}
        return Measured(seconds, busy)

    def close(self) -> None:
        for llm in reversed(self._models.values()):  # the first may own the Ray of all
            llm.close()
        self._models = {}


def _load(setup: Setup) -> LLM:
    names = ("a", "b") if setup.cut else ("a",)
    return LLM(
        setup.path,
        devices=[f"{name}:threads={setup.threads}" for name in names],
        place=_rules(setup),
        runtime="in-process" if setup.runtime == "in-process" else "ray",
        ctx_size=setup.context,
        max_sequences=setup.sequences,
        half_batches=setup.half_batches,
    )


def _rules(setup: Setup) -> Mapping[str, str]:
    if setup.cut == "attention":
        return {"*": "b", "kind:attention": "a"}
    if setup.cut == "halves":
        first, layers = balanced_split(setup.path)
        return {
            "embed": "a",
            f"blk.[0-{first - 1}]": "a",
            f"blk.[{first}-{layers - 1}]": "b",
            "head": "b",
        }
    return {}


def _run_seconds(llm: LLM) -> dict[str, float]:
    counters: Mapping[str, Any] = llm.engine_thread.engine.fleet.counters()
    return {name: counter.run_seconds for name, counter in counters.items()}
