"""Timing a loaded model as llama-bench does: prompts alone, or generation alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raygraft.actors.request import SamplingParams
from raygraft.graph.errors import RequestError
from raygraft.graph.gguf_file import ModelFile
from raygraft.llm import LLM
from raygraft.placement.plan import Plan

WARM_UP_STEPS = 24


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: `batch` sequences at once, each a prompt or a generation, not both."""

    n_prompt: int
    """Tokens of each prompt, up to its first new token; 0 when it generates."""
    n_gen: int
    """Decode steps of each sequence, from a single token on."""
    batch: int = 1
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)
    """How tokens are drawn, as in `SamplingParams`; greedily if it says nothing."""

    @property
    def name(self) -> str:
        """As llama-bench names it: pp512, tg128."""
        return f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"

    @property
    def tokens(self) -> int:
        """What a repetition computes, all sequences together."""
        return (self.n_prompt or self.n_gen) * self.batch

    @property
    def context(self) -> int:
        """Tokens that a sequence has in the end."""
        return (self.n_prompt or self.n_gen) + 1


def workloads_of(
    prompts: Sequence[int], generations: Sequence[int], batches: Sequence[int]
) -> list[Workload]:
    """One for each length and batch; a length of 0 is none."""
    lengths = [(n, 0) for n in prompts if n] + [(0, n) for n in generations if n]
    return [Workload(*length, batch) for length in lengths for batch in batches]


@dataclass(frozen=True, slots=True)
class Samples:
    """The repetitions of a workload."""

    workload: Workload
    nanoseconds: tuple[int, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.workload.tokens * 1e9 / ns for ns in self.nanoseconds]

    @property
    def rate(self) -> float:
        """Their mean."""
        return statistics.fmean(self.rates)

    @property
    def rate_deviation(self) -> float:
        return _deviation(self.rates)

    def fields(self) -> dict[str, object]:
        """The fields that llama-bench has for them in a row of its JSON."""
        return {
            "n_prompt": self.workload.n_prompt,
            "n_gen": self.workload.n_gen,
            "n_depth": 0,
            "avg_ns": round(statistics.fmean(self.nanoseconds)),
            "stddev_ns": round(_deviation(self.nanoseconds)),
            "avg_ts": self.rate,
            "stddev_ts": self.rate_deviation,
            "samples_ns": list(self.nanoseconds),
            "samples_ts": self.rates,
        }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def time_workload(llm: LLM, workload: Workload) -> int:
    """Nanoseconds from the first step's header to the last one's result, by the engine's clock.

    The token ids are random, and others every time: no prompt finds itself in the cache. A
    prompt's time ends with its first token; a generation's first step computes its single token of
    prompt, so that all its steps have a row per sequence. Raises RequestError when the plan has no
    room for all sequences at once.
    """
    _check_room(llm.plan, workload)
    thread, timings = llm.engine_thread, llm.engine_thread.engine.timings
    size = (workload.batch, workload.n_prompt or 1)
    prompts = np.random.default_rng().integers(llm.graph.dimensions.vocabulary, size=size)
    own: dict[str, Any] = {"temperature": 0.0, **workload.sampling}
    params = SamplingParams(**own, max_tokens=workload.n_gen or 1, ignore_eos=True)
    requests = [thread.request(prompt, params) for prompt in prompts.tolist()]
    before = timings.prefill_seconds + timings.decode_seconds
    try:
        thread.start(requests)
        for request in requests:
            request.wait()
    finally:
        for request in requests:
            request.cancel()
    return round((timings.prefill_seconds + timings.decode_seconds - before) * 1e9)


def warm_up(llm: LLM, workload: Workload) -> None:
    """The whole prompt once, or a few steps: the engine tries out how it divides a batch."""
    steps = min(WARM_UP_STEPS, workload.n_gen)
    time_workload(llm, replace(workload, n_gen=steps))


def _check_room(plan: Plan, workload: Workload) -> None:
    pages = -(-workload.context // plan.block_size) * workload.batch
    if workload.batch > plan.limits.max_sequences or pages > plan.cache_blocks:
        raise RequestError(
            f"{workload.batch} sequences of {workload.context} tokens take {pages} cache pages; "
            f"the plan has {plan.cache_blocks}, for {plan.limits.max_sequences} sequences"
        )


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model in a line, as llama-bench shows it."""

    type: str
    """Architecture, size where the file says it, and the type that most bytes have."""
    nbytes: int
    parameters: int

    @classmethod
    def of(cls, file: ModelFile) -> ModelSummary:
        """Read off the header."""
        matrices = Counter[str]()
        for tensor in file.tensors.values():
            if tensor.name.startswith("blk."):
                matrices[tensor.type] += tensor.nbytes
        words = [
            str(file.metadata.get("general.architecture", "")),
            str(file.metadata.get("general.size_label", "")),
            *[name for name, _ in matrices.most_common(1)],
        ]
        return cls(
            " ".join(filter(None, words)),
            sum(tensor.nbytes for tensor in file.tensors.values()),
            sum(tensor.rows * tensor.columns for tensor in file.tensors.values()),
        )
